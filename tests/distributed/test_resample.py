"""Groups whose rewards are all equal are replaced: by what, in which place, with which seeds, and what is told of it.

Engine and scorer are made up: they answer as the prompt says. Collecting, sharing out and the stream are real. Not
covered: several ranks, which tests of the whole program have.
"""

from collections.abc import Sequence
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_mcpo.config.domain_schema import DataConfig
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.data.stream import PromptStream
from megatron_mcpo.distributed import parallel
from megatron_mcpo.rollout.decoding import ResponseDecoder
from megatron_mcpo.rollout.engine import SamplingRequest
from megatron_mcpo.trainer.collector import Collector, Sampling
from megatron_mcpo.trainer.dynamic_sampling import Collected, num_seeds, with_nonzero_advantage
from megatron_mcpo.trainer.jobs import EngineWorkshop
from megatron_mcpo.types import Completion, RolloutGroup, StopReason
from tests.support.data_configs import make_config
from tests.support.paths import EMBEDDED_MODEL
from tests.support.ranks import run_ranks
from tests.support.streams import made_up_domain, names

SIZES = [2, 5, 3]
LIMITS = [4, 8, 16]


class ScriptedEngine:
    """Answers with the prompt's own token; keeps what it was asked for."""

    def __init__(self) -> None:
        self.requests: list[SamplingRequest] = []

    def generate(self, requests: Sequence[SamplingRequest]) -> list[tuple[Completion, ...]]:
        self.requests += requests
        return [
            tuple(
                Completion(token_ids=tuple(r.token_ids), logprobs=(0.0,), stop_reason=StopReason.STOP, versions=(0,))
                for _ in range(r.num_samples)
            )
            for r in requests
        ]


class ScriptedScorer:
    """By the number of the item: 0 fails, odd ones have different rewards, the others are all wrong."""

    def score(self, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        return [self._score(group) for group in groups]

    def _score(self, group: RolloutGroup) -> RolloutGroup:
        index = group.prompt.index
        correct = tuple(index % 2 == 1 and sample == 0 for sample in range(len(group.completions)))
        known: dict[str, Any] = {"rewards": tuple(map(float, correct)), "correct": correct}
        if index == 0:
            known = {"error": "scripted"}
        return RolloutGroup(prompt=group.prompt, completions=group.completions, **known)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    if not EMBEDDED_MODEL.exists():
        pytest.skip(f"{EMBEDDED_MODEL} is missing: make model")
    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


def collect(
    tokenizer: PreTrainedTokenizerBase, *, rounds: int, num_engines: int = 1, steps: int = 1
) -> tuple[list[Collected], list[SamplingRequest], PromptStream]:
    """Some steps of 6 prompts of three domains of 12 items."""

    def rank_main() -> tuple[list[Collected], list[SamplingRequest], PromptStream]:
        return _collect(tokenizer, rounds=rounds, num_engines=num_engines, steps=steps)

    return run_ranks(1, rank_main)[0]


def _collect(
    tokenizer: PreTrainedTokenizerBase, *, rounds: int, num_engines: int, steps: int
) -> tuple[list[Collected], list[SamplingRequest], PromptStream]:
    engine = ScriptedEngine()
    stream = PromptStream([made_up_domain(i, [12]) for i in range(3)], weights=[1.0] * 3, seed=0, data=DataConfig())
    groups = parallel.init(Layout(), seed=0, timeout_seconds=60)
    scripted: Any = (engine, ScriptedScorer())
    collector = Collector(
        EngineWorkshop(*scripted, ResponseDecoder(tokenizer)),
        groups,
        num_engines=num_engines,
        my_engines=range(num_engines),
        stop_token_ids=(),
        restore=lambda: None,
        note=print,
    )
    collected = []
    for step in range(steps):
        seed = step * num_seeds(6, SIZES, rounds=rounds)
        sampling = Sampling(num_samples=SIZES, max_tokens=LIMITS, temperature=1.0, seed=seed)
        groups_of_step = collector.collect(stream.next(6), sampling)
        collected.append(with_nonzero_advantage(groups_of_step, collector, stream, sampling, rounds=rounds))
    return collected, engine.requests, stream


def test_every_domain_has_its_own_number_of_samples_and_limit(tokenizer: PreTrainedTokenizerBase) -> None:
    [collected], requests, _ = collect(tokenizer, rounds=0)
    domains = [group.prompt.domain for group in collected.groups]
    assert sorted(domains) == [0, 0, 1, 1, 2, 2]
    assert [len(group.completions) for group in collected.groups] == [SIZES[domain] for domain in domains]
    assert [(r.num_samples, r.max_tokens) for r in requests] == [(SIZES[d], LIMITS[d]) for d in domains]
    assert collected.metrics == {"resample/rounds": 0, "resample/replaced": 0, "resample/prompts": 6}


def test_groups_of_equal_rewards_are_replaced_in_their_place(tokenizer: PreTrainedTokenizerBase) -> None:
    [before], _, _ = collect(tokenizer, rounds=0)
    [after], requests, _ = collect(tokenizer, rounds=20)
    assert all(group.has_nonzero_advantage for group in after.groups) and not all(
        group.has_nonzero_advantage for group in before.groups
    )
    assert [g.prompt.domain for g in after.groups] == [g.prompt.domain for g in before.groups]
    for old, new in zip(before.groups, after.groups, strict=True):
        assert new == old if old.has_nonzero_advantage else new.prompt != old.prompt
    assert not any(group.has_nonzero_advantage for group in after.replaced)
    assert {g.error for g in after.replaced} <= {None, "scripted"}
    # What was sampled altogether: the step's prompts and one for every group that was replaced.
    assert len(requests) == len(after.sampled) == 6 + len(after.replaced)
    assert after.metrics["resample/prompts"] == len(requests)
    assert after.metrics["resample/replaced"] == len(after.replaced) > 0
    assert len(set(names([g.prompt for g in after.sampled]))) == len(requests)


def test_groups_of_equal_rewards_after_the_last_round_stay(tokenizer: PreTrainedTokenizerBase) -> None:
    [none], _, _ = collect(tokenizer, rounds=0)
    [one], _, stream = collect(tokenizer, rounds=1)
    lost = [group for group in none.groups if not group.has_nonzero_advantage]
    assert one.rounds == 1 and list(one.replaced) == lost
    # The stream of the run without rounds would deal the replacements next.
    [_], _, untouched = collect(tokenizer, rounds=0)
    fresh = untouched.replacements([group.prompt.domain for group in lost])
    assert names([new.prompt for old, new in zip(none.groups, one.groups, strict=True) if old in lost]) == names(fresh)
    assert any(not group.has_nonzero_advantage for group in one.groups)
    assert stream.state_dict() == untouched.state_dict()


def test_no_two_rollouts_have_a_seed_in_common(tokenizer: PreTrainedTokenizerBase) -> None:
    collected, requests, _ = collect(tokenizer, rounds=3, steps=5)
    assert max(step.rounds for step in collected) == 3
    seeds = [request.seed + sample for request in requests for sample in range(request.num_samples)]
    assert len(set(seeds)) == len(seeds) == sum(len(g.completions) for step in collected for g in step.sampled)


def test_the_number_of_engines_changes_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    one, requests, stream = collect(tokenizer, rounds=2, steps=4)
    three, other_requests, other_stream = collect(tokenizer, rounds=2, num_engines=3, steps=4)
    assert one == three and requests == other_requests
    assert stream.state_dict() == other_stream.state_dict()


def test_has_nonzero_advantage() -> None:
    prompt = made_up_domain(0, [1]).sources[0].train[0]
    assert RolloutGroup(prompt=prompt, completions=(), rewards=(0.0, 0.5)).has_nonzero_advantage
    assert not RolloutGroup(prompt=prompt, completions=(), rewards=(0.5, 0.5)).has_nonzero_advantage
    assert not RolloutGroup(prompt=prompt, completions=(), error="failed").has_nonzero_advantage


def test_sizes_and_limits_of_domains_are_the_runs_unless_they_have_their_own() -> None:
    source = {"sources": [{"generator": "chain_sum"}]}
    config = make_config({"name": "a", **source}, {"name": "b", "samples": 7, "max_response_tokens": 3, **source})
    assert config.group_sizes == [2, 7] and config.response_limits == [16, 3]
