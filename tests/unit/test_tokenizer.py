"""Tokenizers and chat templates that belong to another model, fail, or never end: refused in a line.

Every case is the tokenizer of a small chat model with one change. Not covered here: which files a dry run looks at
(test_hf_files.py), bad rows (test_rows.py).
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from megatron_mcpo.config.config import Config, ConfigError
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.data.domains import load_domains, token_problems
from megatron_mcpo.data.tokenizer import check_config, load_tokenizer, stop_token_ids
from tests.support.data_configs import make_config
from tests.support.tiny_run import CHAT_TEMPLATE, VOCAB, save_chat_model

TEMPLATE, TOKENIZER, SETTINGS = "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"
LONG = "1 " * 30
"""So long that an expression with two nested repetitions gives up on it."""
EXTRA = {"id": len(VOCAB), "content": "<extra>", "special": True}
EXTRA |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_chat_model(folder, trained=False)
    return folder


@pytest.fixture
def folder(chat_model: Path, tmp_path: Path) -> Path:
    return copytree(chat_model, tmp_path / "model")


def config_of(folder: Path, *questions: str) -> Config:
    """Return a configuration with one domain of these questions, or of twelve others, for the model in a folder."""
    rows = [
        {"question": q, "answer": "1", "verifier": "math"} for q in questions or [f"{i} = {LONG} ?" for i in range(12)]
    ]
    file = folder.parent / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    config = make_config({"name": "sums", "shots": 0, "sources": [{"file": str(file)}]})
    return config.model_copy(update={"model": config.model.model_copy(update={"path": str(folder)})})


def start(folder: Path, *questions: str) -> tuple[int, ...]:
    """Do with a model's tokenizer what the start of a run does; return the stop tokens."""
    config = config_of(folder, *questions)
    check_config(folder)
    model, tokenizer = from_folder(folder, with_weights=False), load_tokenizer(config)
    stops = stop_token_ids(model, tokenizer)
    domains = load_domains(config, tokenizer, cache_dir=Path("/nonexistent"))
    if problems := token_problems(domains, tokenizer, model.vocab_size):
        raise ConfigError(problems)
    return stops


def edit(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))


def template(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / TEMPLATE).write_text(text) and None


def without_default(folder: Path) -> None:
    (folder / TEMPLATE).unlink()
    templates = [{"name": name, "template": CHAT_TEMPLATE} for name in ("chat", "rag")]
    edit(folder, SETTINGS, lambda settings: settings.update(chat_template=templates))


def pre_tokenized_by(pattern: str) -> Callable[[Path], None]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return lambda folder: edit(folder, TOKENIZER, lambda values: values.update(pre_tokenizer=split))


def with_extra_token(folder: Path, **settings: str) -> None:
    edit(folder, TOKENIZER, lambda values: values["added_tokens"].append(EXTRA))
    edit(folder, SETTINGS, lambda values: values.update(settings))


def extra_in_the_template(folder: Path) -> None:
    with_extra_token(folder)
    template("<extra>" + CHAT_TEMPLATE)(folder)


def extra_ends_a_text(folder: Path) -> None:
    with_extra_token(folder, eos_token="<extra>")


def unknown_character(folder: Path) -> None:
    edit(folder, TOKENIZER, lambda values: values["model"].update(unk_token="[nothing]"))
    edit(folder, TOKENIZER, lambda values: values["model"]["vocab"].pop("="))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (template("{{ 1 / 0 }}"), "its chat template fails for a plain question (ZeroDivisionError: division by zero)"),
        (
            template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
            "its chat template fails for a plain question (RecursionError",
        ),
        (template("{% include 'x' %}"), "its chat template fails for a plain question (TypeError: no loader"),
        (template("{% if %}"), "its chat template can't be compiled (TemplateSyntaxError: Expected an expression"),
        (template("Hello!"), "its chat template leaves the question out (it gives 'Hello!')"),
        (template("{{ messages[0].content.foo.bar }}"), "12 malformed (first: line 1 is refused by the chat template"),
        (template("{% if messages[0].content[0] == '7' %}{{ 1 / 0 }}{% endif %}{{ messages[0].content }}"), "line 8"),
        (without_default, "This model has multiple chat templates with no default specified"),
        (pre_tokenized_by("((1|b| )+)+$!"), "makes the tokenizer fail: Onig: Regex search error: retry-limit"),
        (unknown_character, "makes the tokenizer fail: WordLevel error: Missing [UNK] token"),
        (
            extra_in_the_template,
            "12 of 12 prompts have tokens that the model has not, such as '<extra>' (id 101",
        ),
        (extra_ends_a_text, "the tokenizer's eos_token '<extra>': its id 101 must be below vocab_size = 101"),
        (lambda folder: (folder / SETTINGS).write_text("[" * 10**5), "its tokenizer can't be read (RecursionError"),
        (
            lambda folder: edit(folder, "config.json", lambda values: values.update(attention_bias="x")),
            "attention_bias",
        ),
    ],
)
def test_what_makes_no_prompts_is_refused_in_a_line(folder: Path, change: Callable[[Path], Any], words: str) -> None:
    assert start(folder) == (1,)
    change(folder)
    with pytest.raises(ConfigError) as refused:
        start(folder)
    assert words in refused.value.problems[0] and "\n" not in refused.value.problems[0]


def test_a_token_that_only_the_tokenizer_has_is_found_in_the_data(folder: Path) -> None:
    with_extra_token(folder)
    questions = [f"{i} = ?" for i in range(12)]
    assert start(folder, *questions) == (1,), "nothing uses it"
    with pytest.raises(ConfigError, match="1 of 12 prompts have tokens that the model has not, such as '<extra>'"):
        start(folder, *questions[1:], "What is <extra>?")


def test_responses_end_with_what_any_file_names(folder: Path) -> None:
    model, tokenizer = from_folder(folder, with_weights=False), load_tokenizer(config_of(folder))
    assert tokenizer.eos_token_id == 1
    assert stop_token_ids(replace(model, eos_token_ids=(0,)), tokenizer) == (0, 1)
    assert stop_token_ids(replace(model, eos_token_ids=()), tokenizer) == (1,)
    tokenizer.eos_token = None
    assert stop_token_ids(replace(model, eos_token_ids=(0,)), tokenizer) == (0,)
    with pytest.raises(ConfigError, match="else no response would ever end"):
        stop_token_ids(replace(model, eos_token_ids=()), tokenizer)


def test_an_endless_loop_ends_the_process_with_a_line() -> None:
    code = (
        "from megatron_mcpo.data.tokenizer import time_limit\n"
        "with time_limit(0.2, 'domain x: the chat template'):\n    while True: pass"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert ended.stderr.startswith("domain x: the chat template: must take less than 0 s (an endless loop, or an expre")
