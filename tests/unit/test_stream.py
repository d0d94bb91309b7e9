"""The order in which a stream deals prompts: shares, epochs, what it learns from pass rates, resuming.

Domains are made up; those of real generators and files are in test_data.py and test_rows.py.
"""

import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.config.domain_schema import DataConfig
from megatron_mcpo.data.batch import minibatches
from megatron_mcpo.data.mixing import capped, mixing_shares, nearness
from megatron_mcpo.data.stream import PromptStream
from megatron_mcpo.types import Completion, Prompt, RolloutGroup, StopReason
from tests.support.streams import made_up_domain, names


def make_stream(seed: int = 0, weights: Sequence[float] = (1.0, 1.0, 1.0), **data: Any) -> PromptStream:
    made = [made_up_domain(i, [5 + i, 3]) for i in range(len(weights))]
    return PromptStream(made, weights=weights, seed=seed, data=DataConfig(**data))


def test_order_is_a_function_of_the_seed_alone() -> None:
    first = make_stream(seed=3)
    order = names(first.next(50))
    random.seed(99)
    assert names(make_stream(seed=3).next(50)) == order
    assert names(make_stream(seed=4).next(50)) != order


def test_every_epoch_holds_every_prompt_once_in_a_new_order() -> None:
    stream = PromptStream([made_up_domain(0, [20])], weights=[1.0], seed=0, data=DataConfig())
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
    with pytest.raises(ConfigError, match=r"seed 1.*seed 2"):
        make_stream(seed=2).load_state_dict(saved)
    with pytest.raises(ConfigError, match="must have the seed and sources of the run"):
        make_stream(seed=1, weights=(1.0, 1.0)).load_state_dict(saved)


def test_a_source_with_other_items_begins_its_next_epoch() -> None:
    """Also where there are as many; the other sources go on where they were."""
    domains = [made_up_domain(0, [20, 10]), made_up_domain(1, [8])]
    before = PromptStream(domains, weights=[1.0, 1.0], seed=0, data=DataConfig())
    before.next(12)
    saved = json.loads(json.dumps(before.state_dict()))
    source = domains[0].sources[0]
    answer = replace(source.train[0], entry={**source.train[0].entry, "answer": "another"})
    domains[0] = replace(
        domains[0], sources=(replace(source, train=(answer, *source.train[1:])), domains[0].sources[1])
    )
    after = PromptStream(domains, weights=[1.0, 1.0], seed=0, data=DataConfig())
    name = f"{domains[0].name}/{source.name}"
    assert after.load_state_dict(saved) == [name]
    ours, theirs = after.state_dict()["domains"], saved["domains"]
    assert (ours[0]["sources"][0]["epoch"], ours[0]["sources"][0]["position"]) == (1, 0)
    assert (ours[0]["sources"][1], ours[1]) == (theirs[0]["sources"][1], theirs[1])
    changed = [i for i, (a, b) in enumerate(zip(after.digests()[name], before.digests()[name], strict=True)) if a != b]
    assert changed == [0]


@settings(deadline=None)
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


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("num_domains", [2, 3, 4, 5])
def test_every_optimizer_step_has_every_domain(num_domains: int, count: int) -> None:
    """Dealt by turns, two domains would alternate between two minibatches and never meet."""
    stream = make_stream(weights=[1.0] * num_domains)
    for _ in range(3):
        groups = [scored(prompt, [True, False]) for prompt in stream.next(num_domains * count)]
        parts = minibatches(groups, count)
        assert [Counter(g.prompt.domain for g in part) for part in parts] == [Counter(range(num_domains))] * count
        place_of = {id(group): place for place, group in enumerate(groups)}
        places = [[place_of[id(group)] for group in part] for part in parts]
        assert all(part == sorted(part) for part in places)
        assert sorted(chain.from_iterable(places)) == list(range(len(groups)))


def test_a_domain_in_want_of_groups_is_in_as_many_optimizer_steps_as_it_can_be() -> None:
    prompts = make_stream(weights=[1.0, 1.0, 4.0]).next(12)
    groups = [scored(prompt, [True, False]) for prompt in prompts]
    parts = minibatches(groups, 4)
    assert [len(part) for part in parts] == [3] * 4
    assert sum(any(g.prompt.domain == 0 for g in part) for part in parts) == 2
    assert all(len({g.prompt.domain for g in part}) > 1 for part in parts)
    failed = scored(prompts[0], [], error="timeout")
    assert minibatches([failed], 2) == [] and minibatches([failed, groups[1]], 2) == [[groups[1]]]


def test_equal_weights_take_turns() -> None:
    stream = make_stream(weights=[1.0] * 5)
    domains = [[prompt.domain for prompt in stream.next(2)] for _ in range(5)]
    assert domains == [[0, 1], [2, 3], [4, 0], [1, 2], [3, 4]]


def test_sources_of_a_domain_follow_their_weights() -> None:
    stream = PromptStream([made_up_domain(0, [4, 4], weights=[3.0, 1.0])], weights=[1.0], seed=0, data=DataConfig())
    assert Counter(prompt.source for prompt in stream.next(40)) == {"s0": 30, "s1": 10}


def scored(prompt: Prompt, correct: Sequence[bool], *, error: str | None = None) -> RolloutGroup:
    completion = Completion(token_ids=(1,), logprobs=(0.0,), stop_reason=StopReason.STOP, versions=(0,))
    return RolloutGroup(
        prompt=prompt,
        completions=(completion,) * len(correct),
        rewards=() if error else tuple(map(float, correct)),
        correct=() if error else tuple(correct),
        error=error,
    )


def outcome(prompts: Sequence[Prompt], draw: random.Random) -> list[RolloutGroup]:
    """Made-up results: domain d is right with probability d / 3; some verifiers fail."""
    return [
        scored(
            prompt,
            [draw.random() < prompt.domain / 3 for _ in range(3 + prompt.domain)],
            error="failed" if draw.random() < 0.1 else None,
        )
        for prompt in prompts
    ]


def observed_stream(pass_rates: Sequence[float], **data: Any) -> PromptStream:
    """A stream that saw these pass rates, of 100 rollouts each."""
    stream = make_stream(weights=[2.0, 1.0, 1.0], **data)
    prompts = stream.replacements([0, 1, 2])
    stream.observe(
        [scored(p, [k < 100 * rate for k in range(100)]) for p, rate in zip(prompts, pass_rates, strict=True)]
    )
    return stream


def test_temperature_shares_in_closed_form() -> None:
    data = DataConfig(mixing="temperature", mixing_temperature=2.0)
    shares = mixing_shares(data, weights=[1.0, 2.0, 1.0], sizes=[100, 400, 900], pass_rates=[None] * 3)
    assert shares == pytest.approx([10 / 80, 40 / 80, 30 / 80])
    whole = mixing_shares(DataConfig(mixing="temperature"), weights=[1, 1], sizes=[30, 90], pass_rates=[None] * 2)
    assert whole == pytest.approx([0.25, 0.75])
    flat = DataConfig(mixing="temperature", mixing_temperature=1e9)
    assert mixing_shares(flat, weights=[1, 1], sizes=[1, 10**6], pass_rates=[None] * 2) == pytest.approx([0.5, 0.5])


def test_curriculum_shares_in_closed_form() -> None:
    assert [nearness(p) for p in (0.0, 0.1, 0.2, 0.5, 0.8, 0.9, 1.0)] == pytest.approx([0, 0.5, 1, 1, 1, 0.5, 0])
    # Weights 2, 1, 1 times 1 (within 0.2 .. 0.8), 0.5 (half way out), 0.01 (never nothing).
    shares = observed_stream([0.5, 0.1, 0.0], mixing="curriculum").shares()
    assert shares == pytest.approx([2 / 2.51, 0.5 / 2.51, 0.01 / 2.51])
    assert observed_stream([1.0, 0.0, 1.0], mixing="curriculum").shares() == pytest.approx([0.5, 0.25, 0.25])
    assert make_stream(weights=[2.0, 1.0, 1.0], mixing="curriculum").shares() == pytest.approx([0.5, 0.25, 0.25])


def test_worst_shares_in_closed_form() -> None:
    factors = [2 * math.exp(-0.9 / 0.5), math.exp(-0.2 / 0.5), math.exp(-0.5 / 0.5)]
    shares = observed_stream([0.9, 0.2, 0.5], mixing="worst", worst_temperature=0.5).shares()
    assert shares == pytest.approx([factor / sum(factors) for factor in factors])
    sharp = observed_stream([0.9, 0.2, 0.5], mixing="worst", worst_temperature=1e-3).shares()
    assert sharp == pytest.approx([0.02 / 1.03, 1 / 1.03, 0.01 / 1.03])
    assert make_stream(weights=[2.0, 1.0, 1.0], mixing="worst").shares() == pytest.approx([0.5, 0.25, 0.25])


@settings(deadline=None)
@given(
    mixing=st.sampled_from(["weights", "temperature", "curriculum", "worst"]),
    rates=st.lists(st.none() | st.floats(0, 1), min_size=3, max_size=3),
    temperature=st.floats(1e-6, 1e6),
    num=st.integers(2, 9),
)
def test_shares_are_positive_and_no_domain_fills_a_step(
    mixing: Any, rates: list[float | None], temperature: float, num: int
) -> None:
    data = DataConfig(mixing=mixing, mixing_temperature=temperature, worst_temperature=temperature)
    shares = mixing_shares(data, weights=[3.0, 1.0, 1.0], sizes=[10, 20, 30], pass_rates=rates)
    assert sum(shares) == pytest.approx(1) and min(shares) >= 0
    assert sum(capped(shares, num)) == pytest.approx(1) and max(capped(shares, num)) <= (num - 1) / num + 1e-9


def test_a_step_follows_the_observed_shares_and_has_two_domains() -> None:
    stream = observed_stream([0.9, 0.2, 0.5], mixing="worst", worst_temperature=0.5)
    shares = stream.shares()
    counts: Counter[int] = Counter()
    for _ in range(100):
        prompts = stream.next(4)
        assert len({prompt.domain for prompt in prompts}) >= 2
        counts.update(prompt.domain for prompt in prompts)
    assert all(abs(counts[domain] - 400 * share) < 3 for domain, share in enumerate(shares))


def test_the_window_forgets_and_counts_rollouts() -> None:
    stream = make_stream(mixing="worst", window=2)
    [prompt] = stream.replacements([1])
    for correct in ([True] * 8, [True, False], [False] * 4, [True] * 2):
        stream.observe([scored(prompt, correct)])
        stream.observe([])  # a step without the domain is none of its newest
    assert stream.pass_rates() == [None, 2 / 6, None]
    stream.observe([scored(prompt, [True], error="failed")])
    assert stream.pass_rates() == [None, 2 / 6, None]


MIXINGS: list[dict[str, Any]] = [
    {},
    {"mixing": "temperature", "mixing_temperature": 3.0},
    {"mixing": "curriculum", "window": 2},
    {"mixing": "worst", "window": 3, "item_curriculum": True},
    {"item_curriculum": True},
]


@pytest.mark.parametrize("data", MIXINGS)
def test_resume_is_exact_after_every_step_with_any_mixing(data: dict[str, Any]) -> None:
    whole = make_stream(seed=1, **data)
    draw = random.Random(0)
    history, states = [], [json.dumps(whole.state_dict())]
    for _ in range(25):  # sources of 3 to 7 prompts: every step is an end of an epoch for some
        groups = outcome(whole.next(6), draw)
        extra = outcome(whole.replacements([0, 2, 2]), draw)
        whole.observe(groups + extra)
        history.append(groups + extra)
        states.append(json.dumps(whole.state_dict()))
    for step, state in enumerate(states):
        resumed = make_stream(seed=1, **data)
        resumed.load_state_dict(json.loads(state))
        for groups, after in zip(history[step:], states[step + 1 :], strict=True):
            prompts = resumed.next(6) + resumed.replacements([0, 2, 2])
            assert names(prompts) == names([group.prompt for group in groups])
            resumed.observe(groups)
            assert json.dumps(resumed.state_dict()) == after


def test_the_order_of_what_is_observed_does_not_matter() -> None:
    first, second = (make_stream(mixing="worst", item_curriculum=True) for _ in range(2))
    draw, shuffle = random.Random(1), random.Random(2)
    for _ in range(20):
        groups = outcome(first.next(8), draw)
        second.next(8)
        first.observe(groups)
        second.observe(shuffle.sample(groups, len(groups)))
        assert first.state_dict() == second.state_dict()


def test_decided_items_are_skipped_in_every_other_epoch() -> None:
    data = DataConfig(item_curriculum=True)
    stream = PromptStream([made_up_domain(0, [6])], weights=[1.0], seed=0, data=data)
    epochs = []
    for size in (6, 3, 6, 3, 6):
        prompts = stream.next(size)
        stream.observe([scored(prompt, [True, prompt.index < 3]) for prompt in prompts])
        epochs.append(sorted(prompt.index for prompt in prompts))
    assert epochs == [[*range(6)], [3, 4, 5], [*range(6)], [3, 4, 5], [*range(6)]]
    stream.observe([scored(prompt, [True, False]) for prompt in prompts if prompt.index in (0, 1)])
    assert sorted(prompt.index for prompt in stream.next(5)) == [0, 1, 3, 4, 5]


def test_a_source_of_decided_items_alone_goes_on_with_the_next_epoch() -> None:
    stream = PromptStream([made_up_domain(0, [4])], weights=[1.0], seed=0, data=DataConfig(item_curriculum=True))
    for _ in range(5):
        prompts = stream.next(4)
        assert sorted(prompt.index for prompt in prompts) == [0, 1, 2, 3]
        stream.observe([scored(prompt, [False, False]) for prompt in prompts])


def test_replacements_are_of_the_domains_asked_for_and_leave_the_shares_alone() -> None:
    stream, other = make_stream(), make_stream()
    assert [prompt.domain for prompt in stream.replacements([2, 0, 2])] == [2, 0, 2]
    counts = [Counter(prompt.domain for prompt in each.next(7)) for each in (stream, other)]
    assert counts[0] == counts[1]
