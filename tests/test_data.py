"""Domains from real reasoning-gym generators, and the order in which a stream deals their prompts.

Not covered: generators outside the quick start (their items are checked when they are made), and base models without a
chat template beyond the refusal.
"""

import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_mcpo.config import Config, ConfigError
from megatron_mcpo.data.domains import Domain, Source, load_domains, load_tokenizer
from megatron_mcpo.data.generators import ItemRequest, generate
from megatron_mcpo.data.stream import PromptStream
from megatron_mcpo.sections import SourceConfig
from megatron_mcpo.types import Prompt

TOKENIZER = Path(__file__).parents[1] / ".cache/models/smollm2-135m-instruct"

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


def make_config(*domains: dict[str, Any], seed: int = 0, max_prompt_tokens: int = 512) -> Config:
    return Config.model_validate(
        {
            "run": {"steps": 1, "seed": seed},
            "model": {"path": "model"},
            "batch": {"prompts": 4, "samples": 2},
            "optimizer": {"lr": 1e-5},
            "rollout": {"max_prompt_tokens": max_prompt_tokens},
            "evaluation": {"items": 10},
            "domain": list(domains),
        }
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    if not TOKENIZER.exists():
        pytest.skip(f"{TOKENIZER} is missing: make model")
    return AutoTokenizer.from_pretrained(TOKENIZER)


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
        "domain 'arithmetic', source 'count_bits': 15 distinct questions of 44 asked for: "
        "2 worked examples, 2 held out, 11 to train on",
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
    with pytest.raises(ConfigError, match="'tiny', source 'count_bits': only 5 distinct questions"):
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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "False"


def made_up_domain(index: int, sizes: Sequence[int], weights: Sequence[float] | None = None) -> Domain:
    sources = [
        Source(
            name=f"s{i}",
            weight=weight,
            train=tuple(
                Prompt(domain=index, source=f"s{i}", index=k, token_ids=(k,), entry={"question": str(k)})
                for k in range(size)
            ),
        )
        for i, (size, weight) in enumerate(zip(sizes, weights or [1.0] * len(sizes), strict=True))
    ]
    return Domain(name=f"d{index}", sources=tuple(sources), held_out=(), notes=())


def make_stream(seed: int = 0, weights: Sequence[float] = (1.0, 1.0, 1.0)) -> PromptStream:
    made = [made_up_domain(i, [5 + i, 3]) for i in range(len(weights))]
    return PromptStream(made, weights=weights, seed=seed)


def names(prompts: Sequence[Prompt]) -> list[tuple[int, str, int]]:
    return [(prompt.domain, prompt.source, prompt.index) for prompt in prompts]


def test_order_is_a_function_of_the_seed_alone() -> None:
    first = make_stream(seed=3)
    order = names(first.next(50))
    random.seed(99)
    assert names(make_stream(seed=3).next(50)) == order
    assert names(make_stream(seed=4).next(50)) != order


def test_every_epoch_holds_every_prompt_once_in_a_new_order() -> None:
    stream = PromptStream([made_up_domain(0, [20])], weights=[1.0], seed=0)
    epochs = [[prompt.index for prompt in stream.next(20)] for _ in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(20))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("steps", [0, 1, 4, 5, 6, 7, 13])
def test_resume_is_exact_also_at_an_epoch_boundary(steps: int) -> None:
    whole, part = make_stream(seed=1), make_stream(seed=1)
    for _ in range(steps):
        whole.next(6)
        part.next(6)
    saved = json.loads(json.dumps(part.state_dict()))
    resumed = make_stream(seed=1)
    resumed.load_state_dict(saved)
    assert resumed.state_dict() == whole.state_dict()
    assert [names(resumed.next(6)) for _ in range(12)] == [names(whole.next(6)) for _ in range(12)]


def test_a_state_of_other_data_is_refused() -> None:
    saved = make_stream(seed=1).state_dict()
    with pytest.raises(ValueError, match=r"seed 1.*seed 2"):
        make_stream(seed=2).load_state_dict(saved)
    with pytest.raises(ValueError, match="can't be continued"):
        make_stream(seed=1, weights=(1.0, 1.0)).load_state_dict(saved)


@given(
    weights=st.lists(st.floats(min_value=0.1, max_value=10), min_size=1, max_size=6),
    num=st.integers(min_value=1, max_value=12),
)
@example(weights=[40.0, 1.0, 1.0, 3.0, 2.0], num=8)  # by credit alone, step 24 would have one domain
def test_shares_are_kept_and_every_step_has_two_domains(weights: list[float], num: int) -> None:
    stream = make_stream(weights=weights)
    total: Counter[int] = Counter()
    steps = 60
    for _ in range(steps):
        prompts = stream.next(num)
        assert len(prompts) == num
        counts = Counter(prompt.domain for prompt in prompts)
        assert len(counts) >= min(2, num, len(weights))
        total += counts
    for domain, share in enumerate(expected_shares(weights, num)):
        assert abs(total[domain] - steps * num * share) < len(weights)


def expected_shares(weights: list[float], num: int) -> list[float]:
    """The shares by weight; a domain that would fill a whole step leaves one prompt of it to the others."""
    shares = [weight / sum(weights) for weight in weights]
    top, cap = max(shares), (num - 1) / num
    if len(shares) == 1 or num == 1 or top <= cap:
        return shares
    biggest = shares.index(top)
    return [cap if i == biggest else (1 - cap) * share / (1 - top) for i, share in enumerate(shares)]


def test_equal_weights_take_turns() -> None:
    stream = make_stream(weights=[1.0] * 5)
    domains = [[prompt.domain for prompt in stream.next(2)] for _ in range(5)]
    assert domains == [[0, 1], [2, 3], [4, 0], [1, 2], [3, 4]]


def test_sources_of_a_domain_follow_their_weights() -> None:
    stream = PromptStream([made_up_domain(0, [4, 4], weights=[3.0, 1.0])], weights=[1.0], seed=0)
    assert Counter(prompt.source for prompt in stream.next(40)) == {"s0": 30, "s1": 10}
