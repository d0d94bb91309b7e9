"""Rows of files, in our schema and verl's, as items: what is taken, what is refused and how it is counted.

Real data are some rows of GSM8K and CommonsenseQA (data/README.md). Hugging Face datasets are read where the package
`datasets` is installed; without it, that this is said. Not covered: the hub, because tests are offline.
"""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_mcpo.cli import data_check
from megatron_mcpo.config.config import Config, ConfigError
from megatron_mcpo.data import verl
from megatron_mcpo.data.domains import Domain, inspect_domains, load_domains
from megatron_mcpo.data.item_pools import read_pools
from megatron_mcpo.data.rows import COLUMNS, MAX_QUESTION, RowError, parse_row
from megatron_mcpo.data.verl import from_verl
from tests.support.data_configs import make_config
from tests.support.paths import DATA, EMBEDDED_MODEL

GOOD: dict[str, Any] = {"question": "1 + 1 = ?", "answer": "2", "verifier": "math"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    if not EMBEDDED_MODEL.exists():
        pytest.skip(f"{EMBEDDED_MODEL} is missing: make model")
    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    """Rows as they are where they are bytes, else as JSON."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def questions(num: int, **more: Any) -> list[dict[str, Any]]:
    return [{"question": f"{i} + {i} = ?", "answer": 2 * i, "verifier": "math", **more} for i in range(num)]


def config_of(file: Path, *, data: dict[str, Any] | None = None, **domain: Any) -> Config:
    source = {"file": str(file), **domain.pop("source", {})}
    config = make_config({"name": "sums", "shots": 0, "sources": [source], **domain})
    return config if data is None else Config.model_validate({**config.model_dump(), "data": data})


def load(config: Config, tokenizer: PreTrainedTokenizerBase) -> Domain:
    return load_domains(config, tokenizer, cache_dir=Path("/nonexistent"))[0]


def test_both_schemas_say_the_same() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1 = ?"}]
    ours = parse_row({"prompt": messages, "answer": 2, "verifier": "math", "metadata": {"index": 7}}, 5, [])
    verl = {
        "data_source": "openai/gsm8k",
        "prompt": messages,
        "ability": "code",
        "reward_model": {"style": "rule", "ground_truth": "2"},
        "extra_info": {"index": 7},
    }
    theirs = parse_row(from_verl(verl, []), 5, [])
    assert ours.entry == {"question": "1 + 1 = ?", "answer": "2", "metadata": {"index": 7}, "verifier": "math"}
    assert theirs.entry == {**ours.entry, "metadata": {"index": 7, "data_source": "openai/gsm8k"}}
    assert theirs.messages == ours.messages == tuple(messages) and ours.position == 5
    assert ours.key == theirs.key == parse_row({"question": "1 + 1 = ?  \n", "answer": "2"}, 0, ["math"]).key


@pytest.mark.parametrize(
    ("data_source", "truth", "expected"),
    [
        ("openai/gsm8k", "72", "math"),
        ("lighteval/MATH", "\\frac{1}{2}", "math"),
        ("HuggingFaceH4/MATH-500", "3", "math"),
        ("tau/commonsense_qa", "C", "choice"),
        ("allenai/ai2_arc", "(D)", "choice"),
        ("codecontests", '{"inputs": ["1"], "outputs": ["2"]}', "code"),
    ],
)
def test_verifiers_of_verls_data_sources(data_source: str, truth: str, expected: str) -> None:
    row = {"data_source": data_source, "prompt": "Question?", "reward_model": {"ground_truth": truth}}
    assert parse_row(from_verl(row, []), 0, []).entry["verifier"] == expected


def test_a_data_source_that_is_not_known_needs_the_domains_verifiers() -> None:
    row = {"data_source": "my/set", "prompt": "Question?", "reward_model": {"ground_truth": "yes"}}
    with pytest.raises(RowError, match="names no verifier") as refused:
        parse_row(from_verl(row, []), 0, [])
    assert refused.value.reason == "no verifier"
    assert "verifier" not in parse_row(from_verl(row, ["text"]), 0, ["text"]).entry


def test_unit_tests_of_verls_code_sets() -> None:
    def entry(truth: dict[str, Any], data_source: str = "codeforces") -> dict[str, Any]:
        row = {"data_source": data_source, "prompt": "Write it.", "reward_model": {"ground_truth": json.dumps(truth)}}
        return parse_row(from_verl(row, ["code"]), 0, ["code"]).entry

    assert entry({"inputs": ["1 2\n", ["3", "4"]], "outputs": ["3\n", ["7"]]}, "some/thing")["tests"] == [
        {"input": "1 2\n", "output": "3\n"},
        {"input": "3\n4", "output": "7"},
    ]
    calls = entry({"fn_name": "add", "inputs": [[1, [2]], '1\n"a"'], "outputs": [3, "[4]"]})
    assert calls["function"] == "add" and calls["answer"] is None
    assert calls["tests"] == [{"arguments": [1, [2]], "result": 3}, {"arguments": [1, "a"], "result": [4]}]
    nothing = entry({"fn_name": "f", "inputs": [[1]], "outputs": [None]})
    assert nothing["tests"] == [{"arguments": [1], "result": None}]


def code_row(*tests: str) -> dict[str, Any]:
    return {"question": "q", "verifier": "code", "tests": [{"assert": test} for test in tests]}


CHAT = [{"role": "user", "content": "Question?"}, {"role": "assistant", "content": "What?"}]
BAD: list[tuple[Any, str, str]] = [
    (b'{"question": "trailing", }', "malformed", "not JSON"),
    (b'{"question": "\xff"}', "malformed", "not UTF-8"),
    (b"[1, 2]", "malformed", "is a list"),
    (b'{"question": "q", "answer": NaN, "verifier": "math"}', "bad answer", "its answer is nan"),
    (b"[" * 100_000, "malformed", "not JSON"),
    (b'{"question": "q", "answer": ' + b"9" * 5000 + b"}", "malformed", "not JSON"),
    ({**GOOD, "question": "a\0b"}, "malformed", "NUL"),
    ({**GOOD, "question": "\ud800"}, "malformed", "contains invalid Unicode (an unpaired surrogate)"),
    ({**GOOD, "question": 3}, "malformed", "type int"),
    ({**GOOD, "prompt": "both"}, "malformed", "remove one of them"),
    ({"prompt": CHAT, "answer": "2", "verifier": "math"}, "malformed", "must be user"),
    ({"prompt": [{"role": "tool", "content": "x"}], "answer": "2", "verifier": "math"}, "malformed", "'tool'"),
    ({"prompt": [{"role": "user", "content": ["x"]}], "answer": "2", "verifier": "math"}, "malformed", "text content"),
    ({**GOOD, "metadata": None, "function": "\ud800"}, "bad tests", "must be the name of a function"),
    ({**GOOD, "choices": ["\ud800"]}, "malformed", "unpaired surrogate"),
    ({**GOOD, "prompt": '[{"role": "user", "content": "x"}]', "question": "y"}, "malformed", "remove one of them"),
    ({"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": "2"}, "malformed", "text content"),
    ({**GOOD, "answer": ["2"]}, "malformed", "type list"),
    ({**GOOD, "answer": True}, "malformed", "type bool"),
    ({**GOOD, "domain": "somms"}, "malformed", "has no such [[domain]]"),
    ({**GOOD, "domain": ["Algebra"]}, "malformed", "domain = ['Algebra']: must be text"),
    ({**GOOD, "choices": "ab"}, "malformed", "list of texts"),
    ({**GOOD, "choices": ["x"] * 27}, "malformed", "has 27 choices: must be at most 26"),
    ({"answer": "2", "verifier": "math"}, "no question", "neither"),
    ({**GOOD, "question": "  "}, "no question", "blank"),
    ({"prompt": [], "answer": "2", "verifier": "math"}, "no question", "no messages"),
    ({"question": "q", "verifier": "math"}, "no answer", "'math' needs"),
    ({**GOOD, "answer": "\n"}, "no answer", "'math' needs"),
    ({**GOOD, "answer": None}, "no answer", "'math' needs"),
    ({"question": "q", "answer": "2"}, "no verifier", "names no verifier"),
    ({**GOOD, "verifier": "judge"}, "no verifier", "must be one of reasoning_gym, math, choice"),
    ({**GOOD, "verifier": "reasoning_gym"}, "no verifier", "source_dataset"),
    (
        {**GOOD, "verifier": "reasoning_gym", "metadata": {"source_dataset": ["gcd"]}},
        "no verifier",
        "source_dataset = ['gcd']: must name a generator",
    ),
    ({**GOOD, "answer": "2 is 1 + 1 #### 2"}, "bad answer", "whole solution"),
    ({**GOOD, "answer": "blue", "verifier": "choice"}, "bad answer", "not a letter"),
    ({**GOOD, "answer": "C", "verifier": "choice", "choices": ["x", "y"]}, "bad answer", "choices"),
    ({**GOOD, "answer": "E", "verifier": "choice", "choices": ["O", "A", "B", "AB"]}, "bad answer", "'E'"),
    ({**GOOD, "answer": "abc", "verifier": "numeric"}, "bad answer", "verifier 'numeric': the item's answer, 'abc'"),
    ({**GOOD, "answer": "10^5", "verifier": "numeric"}, "bad answer", "'10^5', does not end in a number"),
    ({**GOOD, "answer": "\\frac{", "verifier": "math"}, "bad answer", "brace"),
    ({**GOOD, "answer": "The", "verifier": "text"}, "bad answer", "articles"),
    (b'{"question": "q", "answer": 1e999, "verifier": "math"}', "bad answer", "inf"),
    ({"question": "q", "verifier": "code"}, "bad tests", "no tests"),
    ({"question": "q", "verifier": "code", "tests": []}, "bad tests", "not empty"),
    ({"question": "q", "verifier": "code", "tests": [{"input": "1"}]}, "bad tests", "tests[0]"),
    ({"question": "q", "verifier": "code", "tests": [{"assert": "a"}], "function": "f()"}, "bad tests", "f()"),
    (code_row("assert f(1) == 1", "assert f("), "bad tests", "tests[1]: '(' was never closed"),
    (code_row("assert all(f(x) == x for x in (1, 2))"), "bad tests", "loop's variable"),
    (code_row("try:\n    f(1)\nexcept ValueError:\n    pass"), "bad tests", "at the top level"),
    (code_row("assert P(1) == P(1)"), "bad tests", "both sides"),
    ({**code_row("assert f(1)"), "function": "class"}, "bad tests", "function = 'class'"),
    ({**GOOD, "question": "long " * 600}, "too long", "allows 512"),
    ({**GOOD, "question": "x" * (MAX_QUESTION + 1)}, "too long", "more than 1,048,576 characters"),
    ({"reward_model": {"ground_truth": "2"}, "data_source": "gsm8k"}, "no question", "neither"),
    ({"reward_model": "2", "prompt": "q", "data_source": "gsm8k"}, "malformed", "ground_truth"),
    ({"reward_model": {"ground_truth": None}, "prompt": "q", "data_source": "gsm8k"}, "no answer", "needs"),
    (
        {"reward_model": {"ground_truth": "{"}, "prompt": "q", "data_source": "taco"},
        "bad tests",
        "must be unit tests as JSON",
    ),
    ({"reward_model": {"ground_truth": "{}"}, "prompt": "q", "data_source": "apps"}, "bad tests", "inputs"),
]


def test_every_kind_of_bad_row_is_counted_and_the_first_of_each_named(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [*questions(20), *(row for row, _, _ in BAD), b""]
    config = config_of(write_jsonl(tmp_path / "rows.jsonl", rows), data={"max_bad_rows": 0.0})
    inspection = inspect_domains(config, tokenizer, cache_dir=tmp_path)
    [row_statistics] = inspection.row_statistics
    expected = Counter(reason for _, reason, _ in BAD)
    assert (row_statistics.rows, row_statistics.bad, row_statistics.reasons) == (20 + len(BAD), len(BAD), expected)
    [problem] = inspection.problems
    assert "domain 'sums', source 'rows.jsonl'" in problem and f"{len(BAD)} of {20 + len(BAD)} rows are bad" in problem
    for reason, count in expected.items():
        first = next(i for i, (_, kind, _) in enumerate(BAD) if kind == reason)
        assert f"{count} {reason} (first: line {21 + first} " in problem


@pytest.mark.parametrize(("row", "reason", "text"), BAD)
def test_what_is_wrong_with_a_bad_row_is_said(
    row: Any, reason: str, text: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    config = config_of(write_jsonl(tmp_path / "rows.jsonl", [*questions(20), row]), data={"max_bad_rows": 0.05})
    domain = load(config, tokenizer)
    assert len(domain.sources[0].train) + len(domain.held_out) == 20
    note = domain.notes[0]
    assert f"1 of 21 rows are skipped: 1 {reason} (first: line 21 " in note and text in note


def test_more_bad_rows_than_allowed_stop_the_run_and_as_many_do_not(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [*questions(96), b"{", b"", *[{"question": "q"}] * 3])
    assert len(load(config_of(file, data={"max_bad_rows": 0.04}), tokenizer).notes) == 1
    with pytest.raises(ConfigError) as refused:
        load(config_of(file, data={"max_bad_rows": 0.03}), tokenizer)
    assert refused.value.problems == [
        "domain 'sums', source 'rows.jsonl': 4 of 100 rows are bad, data.max_bad_rows = 0.03 allows 3: 1 malformed "
        "(first: line 97 is not JSON: Expecting property name enclosed in double quotes at character 3), 3 "
        "no verifier (first: line 99 names no verifier, and the domain has no [[domain.verifiers]]). Correct the rows, "
        "or raise data.max_bad_rows"
    ]


ODD_VALUES: list[Any] = [None, True, 3, 2.5, "x", "", [], ["x"], [["x"]], {}, {"x": ["y"]}, [{"x": 1}]]


@pytest.mark.parametrize("column", [*COLUMNS, "metadata.source_dataset", "ability", *verl.COLUMNS])
def test_no_value_of_a_column_is_more_than_a_bad_row(column: str, tmp_path: Path) -> None:
    bases: list[dict[str, Any]] = [
        {**GOOD, "verifier": "reasoning_gym", "metadata": {"source_dataset": "gcd"}},
        {"question": "q", "answer": "A", "choices": ["x", "y"], "verifier": "choice"},
        {"question": "q", "verifier": "code", "function": "f", "tests": [{"assert": "assert f(1)"}]},
        {"prompt": "q", "data_source": "taco", "reward_model": {"ground_truth": "{}"}, "extra_info": {}},
    ]
    outer, _, inner = column.partition(".")
    rows = [{**base, outer: {inner: value} if inner else value} for base in bases for value in ODD_VALUES]
    rows = [{**row, "question": f"{row['question']} {i}"} if row.get("question") == "q" else row
            for i, row in enumerate(rows)]  # fmt: skip
    [[pools]] = read_pools(config_of(write_jsonl(tmp_path / "rows.jsonl", rows)), cache_dir=tmp_path)
    counted = pools.train.row_statistics
    assert counted.rows == len(rows) == len(pools.train.items) + counted.bad + counted.repeated


@pytest.mark.parametrize("ground_truth", ODD_VALUES)
@pytest.mark.parametrize("key", ["inputs", "outputs", "fn_name"])
def test_no_unit_tests_of_verls_are_more_than_a_bad_row(key: str, ground_truth: Any) -> None:
    truth = {"fn_name": "f", "inputs": [[1]], "outputs": [1], key: ground_truth}
    row = {"data_source": "taco", "prompt": "q", "reward_model": {"ground_truth": json.dumps(truth)}}
    try:
        parse_row(from_verl(row, []), 0, [])
    except RowError as error:
        assert error.reason in ("bad tests", "malformed")


CHOICES = {"choices": ["red", "blue sky"], "answer": "B", "verifier": "choice"}


def test_choices_are_put_below_the_question() -> None:
    for column in ("question", "prompt"):
        item = parse_row({column: "The sky is?\n", **CHOICES}, 0, [])
        assert item.messages == ({"role": "user", "content": "The sky is?\nA. red\nB. blue sky"},)
        assert item.entry["question"] == item.messages[0]["content"] and item.entry["choices"] == CHOICES["choices"]
    named = parse_row({"question": "Is it red or blue sky?", **CHOICES}, 0, [])
    assert named.entry["question"].endswith("\nA. red\nB. blue sky"), "named, but without letters"


@pytest.mark.parametrize(
    "shown",
    [
        "A. red\nB. blue sky",
        "(A) red (B) blue\nsky",
        "a) Red, b) Blue sky",
        "A: red; B: blue sky",
        "[A]red [B]blue sky.",
    ],
)
def test_choices_that_the_question_has_are_not_put_twice(shown: str) -> None:
    question = f"The sky is?\n{shown}"
    assert parse_row({"question": question, **CHOICES}, 0, []).entry["question"] == question


def test_choices_are_not_put_into_chats_nor_bare_letters_below_a_question() -> None:
    chat = [{"role": "user", "content": "The sky is?"}]
    assert parse_row({"prompt": chat, **CHOICES}, 0, []).messages == tuple(chat)
    letters = {"question": "The sky is? A red B blue", **CHOICES, "choices": ["A", "B"]}
    assert parse_row(letters, 0, []).entry["question"] == letters["question"]


def test_a_byte_order_mark_and_blank_lines_are_no_fault(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    first, *others = (json.dumps(row).encode() for row in questions(20))
    file = write_jsonl(tmp_path / "rows.jsonl", [b"\xef\xbb\xbf" + first, b"", b"  ", *others])
    domain = load(config_of(file), tokenizer)
    assert {prompt.index for prompt in (*domain.sources[0].train, *domain.held_out)} == {0, *range(3, 22)}


def test_a_line_without_end_is_not_held_in_memory(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    with file.open("wb") as out:
        out.write(b'{"question": "')
        for _ in range(40):
            out.write(b"x" * (1 << 20))
        out.write(b'"}\n' + json.dumps(GOOD).encode())
    [[pools]] = read_pools(config_of(file), cache_dir=tmp_path)
    assert pools.train.row_statistics.reasons == {"malformed": 1} and [item.position for item in pools.train.items] == [
        1
    ]


def test_parquet_has_the_same_items_as_jsonl(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Print {i}."}],
            "verifier": "code",
            "tests": [{"input": "", "output": f"{i}\n"}, {"assert": f"assert f() == {i}"}],
            "metadata": {"level": i},
            "blob": b"\0" * 10,
        }
        for i in range(12)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    jsonl = write_jsonl(tmp_path / "rows.jsonl", [{k: v for k, v in row.items() if k != "blob"} for row in rows])
    of_parquet = load(config_of(tmp_path / "rows.parquet"), tokenizer)
    of_jsonl = load(config_of(jsonl), tokenizer)
    entries = [prompt.entry for prompt in of_jsonl.sources[0].train]
    assert [prompt.entry for prompt in of_parquet.sources[0].train] == entries == json.loads(json.dumps(entries))


@pytest.mark.parametrize("content", [b"", b"PAR1 no, it is not"])
def test_a_file_that_is_no_parquet_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(content)
    with pytest.raises(ConfigError, match=r"rows\.parquet' can't be read"):
        read_pools(config_of(tmp_path / "rows.parquet"), cache_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"none\.jsonl' can't be read"):
        read_pools(config_of(tmp_path / "none.jsonl"), cache_dir=tmp_path)


@pytest.mark.skipif(find_spec("datasets") is not None, reason="the package datasets is installed")
def test_without_the_package_datasets_a_dataset_is_refused(tmp_path: Path) -> None:
    config = make_config({"name": "sums", "sources": [{"dataset": "openai/gsm8k", "subset": "main"}]})
    with pytest.raises(ConfigError, match=r"'openai/gsm8k': needs the package datasets; pip install"):
        read_pools(config, cache_dir=tmp_path)


def test_a_local_hugging_face_dataset(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    splits = {"train": questions(20), "test": [{**row, "question": "Now: " + row["question"]} for row in questions(8)]}
    made = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})
    made.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "files").mkdir()
    for name, rows in splits.items():
        write_jsonl(tmp_path / "files" / f"{name}.jsonl", rows)
    for folder in ("saved", "files"):
        source = {"dataset": str(tmp_path / folder), "held_out_split": "test"}
        domain = load(make_config({"name": "sums", "shots": 0, "sources": [source]}), tokenizer)
        assert len(domain.sources[0].train) == 20 and len(domain.held_out) == 8
        assert all(prompt.entry["question"].startswith("Now") for prompt in domain.held_out)
    for split in ("no_such", "train"):
        bad = {"dataset": str(tmp_path / "files" / split), "split": split}
        with pytest.raises(ConfigError, match="can't be read"):
            load(make_config({"name": "sums", "sources": [bad]}), tokenizer)


def test_a_hundred_thousand_rows_take_little_memory(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    with file.open("w") as out:
        out.writelines(f'{{"question": "{i} + 1", "answer": {i + 1}, "verifier": "math"}}\n' for i in range(100_000))
    before = psutil.Process().memory_info().rss
    domain = load(config_of(file, items=100_000), tokenizer)
    assert len(domain.sources[0].train) == 100_000 - 10 and len(domain.held_out) == 10
    assert psutil.Process().memory_info().rss - before < 500 << 20


def test_real_gsm8k_and_commonsense_qa(tokenizer: PreTrainedTokenizerBase) -> None:
    train, test, commonsense_qa = (DATA / f"{name}.parquet" for name in ("gsm8k_train", "gsm8k_test", "commonsense_qa"))
    gsm8k = {"file": str(train), "held_out_file": str(test)}
    config = make_config(
        {"name": "math", "shots": 0, "items": 100, "sources": [gsm8k]},
        {"name": "qa", "items": 50, "sources": [{"file": str(commonsense_qa)}]},
        max_prompt_tokens=600,
    )
    inspection = inspect_domains(config, tokenizer, cache_dir=Path("/nonexistent"))
    rows = [pyarrow.parquet.read_metadata(file).num_rows for file in (train, test, commonsense_qa)]
    assert [(row_statistics.rows, row_statistics.bad) for row_statistics in inspection.row_statistics] == [
        (num, 0) for num in rows
    ]
    assert min(rows) > 100
    math, qa = inspection.domains
    assert {prompt.entry["verifier"] for prompt in (*math.sources[0].train, *math.held_out)} == {"math"}
    assert {prompt.entry["metadata"]["split"] for prompt in math.held_out} == {"test"}
    assert {prompt.entry["verifier"] for prompt in (*qa.sources[0].train, *qa.held_out)} == {"choice"}
    assert {prompt.entry["answer"] for prompt in qa.sources[0].train} == set("ABCDE")
    first = tokenizer.decode(math.sources[0].train[0].token_ids)
    assert first.count("<|im_start|>user") == 1 and math.sources[0].train[0].entry["question"] in first
    assert tokenizer.decode(qa.held_out[0].token_ids).count("<|im_start|>user") == 3


def test_check_data_prints_a_row_a_source(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if not EMBEDDED_MODEL.exists():
        pytest.skip(f"{EMBEDDED_MODEL} is missing: make model")
    file = write_jsonl(tmp_path / "rows.jsonl", [*questions(98), b"{", {"question": "q", "verifier": "math"}])
    config = tmp_path / "config.toml"
    config.write_text(
        f'[run]\nsteps = 1\n[model]\npath = "{EMBEDDED_MODEL}"\n'
        "[batch]\nprompts = 4\nsamples = 2\n[optimizer]\nlr = 1e-5\n"
        f'[[domain]]\nname = "sums"\nshots = 0\n[[domain.sources]]\nfile = "{file}"\n'
    )
    assert data_check.main([str(config), "--json"]) == 1
    out, err = capfd.readouterr()
    row = json.loads(out)
    assert row.pop("first")["malformed"].startswith("line 99 is not JSON")
    assert row == {
        "domain": "sums",
        "source": "rows.jsonl",
        "rows": 100,
        "repeated": 0,
        "contradicting": 0,
        "bad": 2,
        "reasons": {"malformed": 1, "no answer": 1},
    }
    assert "2 of 100 rows are bad" in err
    assert data_check.main([str(config), "--data.max_bad_rows", "0.02"]) == 0
    out, err = capfd.readouterr()
    assert "rows.jsonl" in out and "1 no answer: line 100 has no answer" in out and err == ""
    file.unlink()
    assert data_check.main([str(config)]) == 2
    assert "no such file" in capfd.readouterr().err


def test_datasets_is_imported_only_when_a_source_names_one() -> None:
    code = "import sys, megatron_mcpo.data.domains; print([m for m in ('datasets', 'pyarrow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
