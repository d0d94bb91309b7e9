"""Domains from real reasoning-gym generators and from files: what a prompt consists of, what is held out.

Not covered: generators outside the quick start (their items are checked when they are made), and base models without a
chat template beyond the refusal.
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.config.domain_schema import SourceConfig
from megatron_mcpo.data.domains import Domain, load_domains, splits_of
from megatron_mcpo.data.generators import ItemRequest, generate
from megatron_mcpo.data.tokenizer import load_tokenizer
from megatron_mcpo.types import Prompt
from tests.support.data_configs import make_config
from tests.support.paths import EMBEDDED_MODEL

ARITHMETIC = {
    "name": "arithmetic",
    "items": 40,
    "sources": [
        {
            "generator": "chain_sum",
            "weight": 3.0,
            "options": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
        },
        {"generator": "count_bits", "options": {"max_n": 15}},
    ],
}
LOGIC = {"name": "logic", "items": 30, "instruction": "One word.", "sources": [{"generator": "syllogism"}]}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    if not EMBEDDED_MODEL.exists():
        pytest.skip(f"{EMBEDDED_MODEL} is missing: make model")
    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("items")


@pytest.fixture(scope="module")
def domains(tokenizer: PreTrainedTokenizerBase, cache_dir: Path) -> list[Domain]:
    return load_domains(make_config(ARITHMETIC, LOGIC), tokenizer, cache_dir=cache_dir)


def question(prompt: Prompt) -> str:
    return str(prompt.entry["question"])


def test_questions_are_distinct_and_held_out_ones_are_nowhere_else(
    domains: list[Domain], tokenizer: PreTrainedTokenizerBase
) -> None:
    train = [prompt for domain in domains for source in domain.sources for prompt in source.train]
    held_out = [prompt for domain in domains for prompt in domain.held_out]
    questions = [question(prompt) for prompt in train + held_out]
    assert len(set(questions)) == len(questions)
    for prompt in train:
        text = tokenizer.decode(prompt.token_ids)
        assert not any(f"user\n{question(held)}" in text for held in held_out)


def test_sizes_follow_the_configuration_where_the_generator_can(domains: list[Domain]) -> None:
    arithmetic, logic = domains
    assert [len(source.train) for source in logic.sources] == [30] and len(logic.held_out) == 10
    assert logic.notes == ()
    assert [source.weight for source in arithmetic.sources] == [3.0, 1.0]
    held_out = Counter(prompt.source for prompt in arithmetic.held_out)
    assert held_out == {"chain_sum": 8, "count_bits": 2}
    assert [len(source.train) for source in arithmetic.sources] == [40, 11]
    assert arithmetic.notes == (
        "domain 'arithmetic', source 'count_bits': has 15 unique questions of 44 requested: trains on 11, evaluates 2, "
        "shows 2 in prompts",
    )


def test_a_prompt_is_worked_examples_then_the_question(
    domains: list[Domain], tokenizer: PreTrainedTokenizerBase
) -> None:
    logic = domains[1]
    prompts = [*logic.sources[0].train, *logic.held_out]
    heads = set()
    for prompt in prompts:
        text = tokenizer.decode(prompt.token_ids)
        head, _, last = text.rpartition("<|im_start|>user\n")
        heads.add(head)
        assert last == f"{question(prompt)}\nOne word.<|im_end|>\n<|im_start|>assistant\n"
    [shared] = heads
    answers = [turn.partition("<|im_end|>")[0] for turn in shared.split("<|im_start|>assistant\n")[1:]]
    assert sorted(answers) == ["No", "Yes"]


def test_items_do_not_depend_on_the_seed_and_are_made_once(
    domains: list[Domain], tokenizer: PreTrainedTokenizerBase, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    again = load_domains(make_config(ARITHMETIC, LOGIC, seed=5), tokenizer, cache_dir=cache_dir)
    assert again == domains
    assert not list(cache_dir.glob("*.tmp"))


def test_items_are_the_same_in_another_cache(
    domains: list[Domain], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    assert load_domains(make_config(ARITHMETIC, LOGIC), tokenizer, cache_dir=tmp_path) == domains


def test_a_prompt_that_is_too_long_is_refused(
    domains: list[Domain], tokenizer: PreTrainedTokenizerBase, cache_dir: Path
) -> None:
    longest = max(len(prompt.token_ids) for prompt in domains[1].held_out + domains[1].sources[0].train)
    config = make_config(ARITHMETIC, LOGIC, max_prompt_tokens=longest - 1)
    with pytest.raises(ConfigError) as refused:
        load_domains(config, tokenizer, cache_dir=cache_dir)
    assert all("'logic'" in problem for problem in refused.value.problems)
    assert f"{longest} tokens" in str(refused.value) and "max_prompt_tokens" in str(refused.value)


def test_every_generator_that_fails_is_named_with_a_fix(tmp_path: Path) -> None:
    cases = {
        "chain_sum": {"min_term": 2},
        "count_bits": {"max_n": 0},
        "syllogism": {"seed": 3},
        "propositional_logic": {},
        "no_such_set": {},
    }
    requests = [
        ItemRequest(domain=f"of {name}", source=SourceConfig(generator=name, options=options), size=4, seed=0)
        for name, options in cases.items()
    ]
    with pytest.raises(ConfigError) as refused:
        generate(requests, cache_dir=tmp_path)
    unknown, invalid, reserved, unanswered, missing = refused.value.problems
    assert "'of chain_sum'" in unknown and "did you mean 'min_terms'?" in unknown
    assert "'of count_bits'" in invalid and "min_n must be between" in invalid
    assert "'of syllogism'" in reserved and "remove it" in reserved
    assert "'of propositional_logic'" in unanswered and "answer None" in unanswered
    assert "'of no_such_set'" in missing and "not a reasoning-gym dataset" in missing
    assert list(tmp_path.iterdir()) == []


def test_a_source_with_too_few_questions_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tiny = {"name": "tiny", "sources": [{"generator": "count_bits", "options": {"max_n": 5}}]}
    with pytest.raises(
        ConfigError, match="'tiny', source 'count_bits': 5 unique questions: must be at least 2 few-shot"
    ):
        load_domains(make_config(tiny), tokenizer, cache_dir=tmp_path)


def test_a_tokenizer_that_cannot_be_used_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    config = make_config(LOGIC)
    folder = tmp_path / "model"
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(folder)})})
    folder.mkdir()
    with pytest.raises(ConfigError, match="tokenizer can't be read"):
        load_tokenizer(config)
    template, tokenizer.chat_template = tokenizer.chat_template, None
    tokenizer.save_pretrained(folder)
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match="no chat template"):
        load_tokenizer(config)


def test_the_trainers_process_never_imports_reasoning_gym() -> None:
    code = """
import sys
import megatron_mcpo.data.domains, megatron_mcpo.data.stream, megatron_mcpo.rewards.scorer
print("reasoning_gym" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=400)
    assert done.stdout.strip() == "False"


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sums(numbers: range, **more: Any) -> list[dict[str, Any]]:
    return [{"question": f"{i} + {i} = ?", "answer": 2 * i, "verifier": "math", **more} for i in numbers]


def load(tokenizer: PreTrainedTokenizerBase, *domains: dict[str, Any]) -> list[Domain]:
    return load_domains(make_config(*domains), tokenizer, cache_dir=Path("/nonexistent"))


def indices(prompts: tuple[Prompt, ...]) -> list[int]:
    return [prompt.index for prompt in prompts]


def test_chat_rows_keep_their_messages(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    own = [{"role": "system", "content": "Own."}, {"role": "user", "content": "First?"}]
    own += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Then?"}]
    rows: list[dict[str, Any]] = [{"prompt": own, "verifier": "code", "tests": [{"assert": "assert f()"}]}]
    file = write(tmp_path / "rows.jsonl", [*rows, *sums(range(9))])
    domain = {"name": "sums", "system": "Ours.", "instruction": "Be brief.", "sources": [{"file": file}]}
    [loaded] = load(tokenizer, {**domain, "shots": 1})
    prompts = {p.index: tokenizer.decode(p.token_ids) for p in (*loaded.sources[0].train, *loaded.held_out)}
    [shot] = set(range(10)) - set(prompts)
    number = shot - 1  # the chat row has no answer: it is not a few-shot example
    worked = f"user\n{number} + {number} = ?\nBe brief.<|im_end|>\n<|im_start|>assistant\n{2 * number}<|im_end|>\n"
    turns = (
        "user\nFirst?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nThen?\nBe brief.<|im_end|>\n"
    )
    question = "<|im_start|>assistant\n"
    assert prompts.pop(0) == f"<|im_start|>system\nOwn.<|im_end|>\n<|im_start|>{worked}<|im_start|>{turns}{question}"
    for index, text in prompts.items():
        asked = f"user\n{index - 1} + {index - 1} = ?\nBe brief.<|im_end|>\n"
        assert text == f"<|im_start|>system\nOurs.<|im_end|>\n<|im_start|>{worked}<|im_start|>{asked}{question}"


def test_held_out_questions_of_a_file_are_trained_on_nowhere(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    first = write(tmp_path / "first.jsonl", sums(range(30)))
    second = write(tmp_path / "second.jsonl", sums(range(20, 60)))
    test = write(tmp_path / "test.jsonl", sums(range(5, 25)))
    one, two = load(
        tokenizer,
        {"name": "one", "shots": 1, "sources": [{"file": first}]},
        {"name": "two", "shots": 1, "sources": [{"file": second, "held_out_file": test}]},
    )
    trained = {prompt.entry["question"] for prompt in (*one.sources[0].train, *two.sources[0].train)}
    held_out = {prompt.entry["question"] for prompt in (*one.held_out, *two.held_out)}
    tested = {row["question"] for row in sums(range(5, 25))}
    assert not trained & (held_out | tested)
    assert len(two.held_out) == 10 and all(p.entry["question"] in tested for p in two.held_out)
    # 30 - 20 tested are left to the first domain; of the second's 40, 5 more are tested and 5 are the first's.
    assert len(one.sources[0].train) + len(one.held_out) == 9 and len(two.sources[0].train) == 40 - 10 - 1
    assert "skipping 20 questions in an earlier source or held out" in one.notes[0]


def test_rows_are_taken_in_a_fixed_shuffle_and_the_surplus_is_told(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    file = write(tmp_path / "rows.jsonl", sums(range(100)))
    domain = {"name": "sums", "shots": 0, "items": 60, "sources": [{"file": file}]}
    [loaded] = load(tokenizer, domain)
    taken = [*indices(loaded.held_out), *indices(loaded.sources[0].train)]
    assert len(loaded.held_out) == 10 and len(set(taken)) == 70 and taken != sorted(taken)
    assert loaded.notes == (
        "domain 'sums', source 'rows.jsonl': training on 60 of 90 questions; raise domain.items for more",
    )
    again = load_domains(make_config(domain, seed=9), tokenizer, cache_dir=tmp_path)
    assert again == [loaded]


def test_fewer_held_out_questions_than_asked_for_are_a_warning(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    domain = {
        "name": "sums",
        "shots": 0,
        "items": 60,
        "sources": [{"file": write(tmp_path / "r.jsonl", sums(range(20)))}],
    }
    [loaded] = load(tokenizer, domain)
    assert loaded.notes == (
        "WARNING: domain 'sums', source 'r.jsonl': evaluates 5 of the 10 that evaluation.items asks for",
    )


def test_what_was_held_out_stays_held_out_where_rows_are_added(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Also worked examples stay what they are, and the order of the rows has no influence."""
    domain = {"name": "sums", "sources": [{"file": write(tmp_path / "rows.jsonl", sums(range(30)))}]}
    [before] = load(tokenizer, domain)
    write(tmp_path / "rows.jsonl", sums(range(29, -1, -1)))
    assert texts(load(tokenizer, domain)[0]) == texts(before)
    write(tmp_path / "rows.jsonl", sums(range(300, 330)) + sums(range(30)))
    [anew] = load(tokenizer, domain)
    config = make_config(domain)
    [after] = load_domains(config, tokenizer, cache_dir=tmp_path, splits=splits_of([before]))
    held, train = texts(before)
    assert texts(anew)[0] != held, "30 new rows of 60 are held out, too, in a new run"
    assert texts(after)[0] == held and set(train) < set(texts(after)[1]) and len(texts(after)[1]) == len(train) + 30
    assert splits_of([after]) == splits_of([before])
    fewer = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"items": 3})})
    [after] = load_domains(fewer, tokenizer, cache_dir=tmp_path, splits=splits_of([before]))
    assert texts(after)[0] == held[:3] and not set(held) & set(texts(after)[1])
    write(tmp_path / "rows.jsonl", [row for row in sums(range(30)) if row["question"] != question(before.held_out[0])])
    [after] = load_domains(config, tokenizer, cache_dir=tmp_path, splits=splits_of([before]))
    assert texts(after) == (held[1:], train)


def texts(domain: Domain) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    return [p.token_ids for p in domain.held_out], [p.token_ids for p in domain.sources[0].train]


def test_a_file_may_serve_several_domains(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = sums(range(10), domain="red") + sums(range(10, 25), domain="blue") + sums(range(25, 30))
    source = {"file": write(tmp_path / "rows.jsonl", rows)}
    red, blue = load(
        tokenizer,
        {"name": "red", "shots": 0, "sources": [source]},
        {"name": "blue", "shots": 0, "sources": [source]},
    )
    of = {d.name: {*indices(d.sources[0].train), *indices(d.held_out)} for d in (red, blue)}
    assert of == {"red": {*range(10), *range(25, 30)}, "blue": set(range(10, 25))}
    with pytest.raises(ConfigError, match=r"source 'rows\.jsonl': must have rows for this domain"):
        write(tmp_path / "rows.jsonl", sums(range(10), domain="red"))
        load(tokenizer, {"name": "red", "sources": [source]}, {"name": "blue", "sources": [source]})


def test_worked_examples_need_an_answer(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [
        {"question": f"Print {i}.", "verifier": "code", "tests": [{"input": "", "output": str(i)}]} for i in range(9)
    ]
    rows.append({**rows[0], "question": "Print 99.", "answer": "print(99)"})
    domain = {"name": "code", "sources": [{"file": write(tmp_path / "rows.jsonl", rows)}]}
    [loaded] = load(tokenizer, {**domain, "shots": 1})
    assert all("print(99)" in tokenizer.decode(prompt.token_ids) for prompt in loaded.sources[0].train)
    with pytest.raises(ConfigError, match="2 few-shot examples, with answers"):
        load(tokenizer, {**domain, "shots": 2})
