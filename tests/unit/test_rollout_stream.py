"""The stream of rollouts: which prompts a step learns from, whatever finishes first. Responses are made up.

Not covered: servers (tests/system/test_asynchronous.py).
"""

import json
import random
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mcpo.config.config import Config
from megatron_mcpo.config.domain_schema import DataConfig
from megatron_mcpo.data.stream import ItemId, PromptStream
from megatron_mcpo.distributed.peers import Team
from megatron_mcpo.trainer.choice import choose, step_of
from megatron_mcpo.trainer.collector import Collector
from megatron_mcpo.trainer.jobs import Job, Key
from megatron_mcpo.trainer.rollout_stream import RolloutStream
from megatron_mcpo.trainer.unfinished import Unfinished, decode, encode
from megatron_mcpo.types import Completion, RolloutGroup, StopReason
from tests.support import tiny_models
from tests.support.streams import made_up_domain

STEPS = 12


class RandomWorkshop:
    """Finishes one job of those under way at every look, often one of the newest."""

    num_live = 1

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.jobs: dict[Key, Job] = {}
        self.waiting: list[Job] = []
        self.done: dict[Key, RolloutGroup] = {}
        self.version = 0

    def submit(self, jobs: Sequence[Job]) -> None:
        assert not self.jobs.keys() & {job.key for job in jobs}
        self.jobs |= {job.key: job for job in jobs}
        self.waiting += jobs

    def sample(self) -> None:
        if self.waiting:
            place = -1 if self.random.random() < 0.6 else self.random.randrange(len(self.waiting))
            job = self.waiting.pop(place)
            self.done[job.key] = self._group(job, StopReason.STOP)

    def finish(self) -> list[Key]:
        return list(self.done)

    def take(self, keys: Collection[Key]) -> dict[Key, RolloutGroup]:
        return {key: self.done.pop(key) for key in keys}

    def news(self) -> list[str]:
        return []

    def so_far(self, keys: Collection[Key]) -> dict[Key, tuple[Completion, ...]]:
        groups = {job.key: self._group(job, StopReason.ABORT) for job in self.waiting} | self.done
        return {key: groups[key].completions for key in keys}

    def busy_seconds(self) -> list[float]:
        return [0.0]

    def _group(self, job: Job, reason: StopReason) -> RolloutGroup:
        """With one right response, from the version at which this is called."""
        completion = Completion(
            token_ids=(1, 0), logprobs=(-1.0, -0.5), stop_reason=reason, versions=(self.version,) * 2
        )
        num = job.request.num_samples
        correct = (True,) + (False,) * (num - 1)
        rewards = tuple(map(float, correct))
        return RolloutGroup(prompt=job.prompt, completions=(completion,) * num, rewards=rewards, correct=correct)


def make_config(*, staleness: int, oversample: float | None = None, prompts: int = 4) -> Config:
    return tiny_models.config(
        Path("model"),
        run={"steps": STEPS},
        batch={"prompts": prompts, "samples": 2},
        engine={"staleness": staleness, "oversample": oversample, "servers": ["http://localhost:1"]},
    )


def make_stream(config: Config, workshop: RandomWorkshop, *, first_step: int = 0) -> RolloutStream:
    collector = Collector(
        workshop, Team(), num_engines=1, my_engines=[0], stop_token_ids=(0,), restore=lambda: None, note=print
    )
    domains = [made_up_domain(i, [60]) for i in range(3)]
    prompts = PromptStream(domains, weights=[1.0] * 3, seed=0, data=DataConfig())
    return RolloutStream(config, collector, prompts, first_step=first_step)


def train(stream: RolloutStream, workshop: RandomWorkshop, steps: Sequence[int]) -> list[tuple[RolloutGroup, ...]]:
    """What every step learns from; the weights have the number of the step."""
    learned = []
    stream.start_ahead()
    for step in steps:
        learned.append(stream.next(step).groups)
        workshop.version = step
        stream.start_ahead()
    return learned


def items(groups: Sequence[RolloutGroup]) -> list[tuple[int, int]]:
    return [(group.prompt.domain, group.prompt.index) for group in groups]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 4), st.floats(0.05, 1.0), st.integers(1, 6), st.integers(0, 2**16))
def test_no_prompt_is_lost_or_learned_from_twice_or_too_late(
    staleness: int, part: float, prompts: int, seed: int
) -> None:
    """For any staleness and oversampling, and in any order in which prompts are finished."""
    oversample = None if staleness == 0 else staleness * part
    workshop = RandomWorkshop(seed)
    stream = make_stream(make_config(staleness=staleness, oversample=oversample, prompts=prompts), workshop)
    learned = train(stream, workshop, range(1, STEPS + 1))
    assert [len(groups) for groups in learned] == [prompts] * STEPS
    assert Counter(item for groups in learned for item in items(groups)) == Counter(
        (job.prompt.domain, job.prompt.index) for job in workshop.jobs.values()
    ), "all that was drawn is learned from, once"
    for step, groups in enumerate(learned, start=1):
        ages = [step - 1 - version for group in groups for c in group.completions for version in c.versions]
        assert min(ages) >= 0 and max(ages) <= staleness


def test_a_step_learns_from_its_own_prompts_in_order_unless_it_oversamples_less_than_it_may() -> None:
    synchronous = train(make_stream(make_config(staleness=0), workshop := RandomWorkshop(0)), workshop, range(1, 13))
    for staleness in (1, 3):
        workshop = RandomWorkshop(staleness)
        ahead = train(make_stream(make_config(staleness=staleness), workshop), workshop, range(1, STEPS + 1))
        assert [items(groups) for groups in ahead] == [items(groups) for groups in synchronous]
    workshop = RandomWorkshop(1)
    stream = make_stream(make_config(staleness=3, oversample=1.0), workshop)
    learned = train(stream, workshop, [1, 2])
    assert [items(groups) for groups in learned] != [items(groups) for groups in synchronous[:2]]
    assert stream.metrics["rollouts/under_way"] == 4 and stream.metrics["rollouts/passed_over"] > 0
    assert stream.metrics["rollouts/passed_over_length"] == 2.0


def test_the_staleness_is_that_of_the_tokens() -> None:
    workshop = RandomWorkshop(0)
    stream = make_stream(make_config(staleness=1), workshop)
    train(stream, workshop, [1])
    assert (stream.metrics["staleness/mean"], stream.metrics["staleness/max"]) == (0.0, 0.0)
    train(stream, workshop, [2, 3])
    assert stream.metrics["staleness/max"] <= 1.0


def test_the_order_in_which_prompts_finish_decides_nothing() -> None:
    finished = [2, 3, 5, 7, 8, 9]
    for order in ([2, 9, 3, 8, 5, 7], finished):
        assert choose(range(2, 10), order, step=1, prompts=4, slack=1) == [2, 3, 5, 7]
    assert choose(range(2, 10), [2, 3, 5], step=1, prompts=4, slack=1) is None
    assert choose(range(4, 12), [5, 6, 7, 8, 9], step=2, prompts=4, slack=0) is None, "it must be prompt 4"
    assert choose(range(3, 12), [4, 5, 6, 7], step=1, prompts=4, slack=1) == [4, 5, 6, 7]
    assert choose(range(3, 12), [4, 5, 6, 7], step=2, prompts=4, slack=1) is None, "3 is due"
    assert [step_of(number, prompts=4) for number in (0, 3, 4)] == [1, 1, 2]


def test_a_resumed_run_goes_on_with_what_was_under_way() -> None:
    config = make_config(staleness=2, oversample=1.0)
    workshop = RandomWorkshop(3)
    whole = make_stream(config, workshop)
    train(whole, workshop, [1, 2])
    state, under_way = whole.state_dict(), decode(encode(whole.unfinished()))
    prompts = json.loads(json.dumps(whole.prompts.state_dict()))
    assert len(under_way) == 8 and {c.stop_reason for one in under_way for c in one.completions} <= {*StopReason}

    again = RandomWorkshop(4)
    resumed = make_stream(config, again, first_step=2)
    resumed.prompts.load_state_dict(prompts)
    [note] = resumed.resume(json.loads(json.dumps(state)), under_way)
    assert note.startswith("8 prompts were under way at the checkpoint and go on")
    resumed.start_ahead()
    assert [key for key in again.jobs] == [(1, one.number) for one in under_way]
    assert [job.begun for job in again.jobs.values()] == [one.completions for one in under_way]
    before = {(job.prompt.domain, job.prompt.index) for job in workshop.jobs.values()}
    learned = train(resumed, again, range(3, STEPS + 1))
    drawn = Counter(item for groups in learned for item in items(groups))
    assert set(drawn.values()) == {1} and len(drawn) == 4 * (STEPS - 2)
    assert len(before & drawn.keys()) == 8


def test_an_item_that_has_changed_gives_way_and_other_settings_drop_what_was_under_way() -> None:
    config = make_config(staleness=1)
    workshop = RandomWorkshop(0)
    stream = make_stream(config, workshop)
    train(stream, workshop, [1])
    state, under_way = stream.state_dict(), stream.unfinished()
    other = replace(under_way[0], item=under_way[0].item._replace(digest=1))
    resumed = make_stream(config, again := RandomWorkshop(0), first_step=1)
    resumed.resume(state, [other, *under_way[1:]])
    assert len(train(resumed, again, range(2, STEPS + 1))) == STEPS - 1
    assert again.jobs[(1, under_way[0].number)].begun == ()

    resumed = make_stream(make_config(staleness=2), again := RandomWorkshop(0), first_step=1)
    [note] = resumed.resume(state, under_way)
    assert note.startswith("WARNING: 8 prompts were under way at the checkpoint; they are dropped")
    assert len(train(resumed, again, range(2, STEPS + 1))) == STEPS - 1
    assert resumed.resume(state, []) == []


def test_what_is_under_way_is_written_and_read_without_loss() -> None:
    half = Completion(token_ids=(7, 2**20), logprobs=(-0.1, 0.0), stop_reason=StopReason.ABORT, versions=(3, 4))
    half = replace(half, logprobs=(-0.10000000149011612, 0.0))  # an engine's log-probs are fp32
    whole = replace(half, stop_reason=StopReason.LENGTH, versions=(3, 3))
    kept = [
        Unfinished(number=9, item=ItemId(1, "s/0 ü", 5, 2**63 + 1), completions=(half, whole)),
        Unfinished(number=11, item=ItemId(0, "x", 0, 0), completions=()),
    ]
    assert decode(encode(kept)) == kept
    for dtype, top in ((torch.uint8, 255), (torch.int16, 300)):
        experts = torch.tensor([[[1, 2], [top, 0]]], dtype=dtype)
        [again] = decode(encode([replace(kept[0], completions=(replace(half, experts=experts),))]))
        found = again.completions[0].experts
        assert found is not None and found.dtype is dtype and torch.equal(found, experts)
    for bad in (b"", b"{}", b'[{"number": 1}]', encode(kept).replace(b"abort", b"what"), encode(kept)[:-9]):
        with pytest.raises(ValueError):
            decode(bad)
