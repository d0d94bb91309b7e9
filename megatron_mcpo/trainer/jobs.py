"""Complete and verify prompts on one rank: in its own engine, or in the background on servers.

Both ways take the same jobs and give the same groups. Shape legend: see megatron_mcpo.types.
"""

import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Protocol

from megatron_mcpo.rewards.scorer import Scorer
from megatron_mcpo.rollout.decoding import ResponseDecoder
from megatron_mcpo.rollout.engine import Engine, SamplingRequest
from megatron_mcpo.rollout.sampler import Response, split
from megatron_mcpo.rollout.vllm_server import VllmServers
from megatron_mcpo.types import Completion, Prompt, RolloutGroup

Key = tuple[int, int]
"""What a job is called on all ranks. Jobs with smaller keys are completed first."""

_WAIT_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class Job:
    """A prompt that is to be completed.

    place: determines the engine
    begun: what is known of its completions already: one entry per sample, or empty
    scored: whether the completions are verified
    """

    key: Key
    place: int
    prompt: Prompt
    request: SamplingRequest
    begun: tuple[Completion, ...] = ()
    scored: bool = True


class Workshop(Protocol):
    """What completes the jobs of one rank."""

    def submit(self, jobs: Sequence[Job]) -> None:
        """Begin with some jobs."""

    def sample(self) -> None:
        """Sample for a while. Ranks that share an engine call it together."""

    def finish(self) -> list[Key]:
        """Verify what is sampled; return the jobs that are finished and were not taken."""

    def take(self, keys: Collection[Key]) -> dict[Key, RolloutGroup]:
        """Return the groups of those of these jobs that are finished here, and forget them."""

    @property
    def num_live(self) -> int:
        """Return how many engines of this rank work."""

    def news(self) -> list[str]:
        """Return what a user should know since the last call."""

    def so_far(self, keys: Collection[Key]) -> dict[Key, tuple[Completion, ...]]:
        """Return what there is of the completions of jobs that were not taken."""

    def busy_seconds(self) -> list[float]:
        """Return for how long each server has had requests since the start; empty without servers."""


class EngineWorkshop:
    """Jobs in the engine of this rank, which completes all of them at once. scorer: None on ranks that do not verify"""

    def __init__(self, engine: Engine, scorer: Scorer | None, decoder: ResponseDecoder):
        self._engine = engine
        self._scorer = scorer
        self._decoder = decoder
        self._waiting: list[Job] = []
        self._sampled: list[tuple[Job, RolloutGroup]] = []
        self._finished: dict[Key, RolloutGroup] = {}

    def submit(self, jobs: Sequence[Job]) -> None:
        """Keep the jobs for `sample`."""
        self._waiting += jobs

    def sample(self) -> None:
        """Complete all jobs. Raises what the engine raises."""
        jobs, self._waiting = self._waiting, []
        for job, completions in zip(jobs, self._engine.generate([job.request for job in jobs]), strict=True):
            self._sampled.append((job, group_of(job.prompt, completions, self._decoder)))

    def finish(self) -> list[Key]:
        """Verify what was sampled. Raises VerifierUnavailable."""
        sampled, self._sampled = self._sampled, []
        if self._scorer is not None:
            self._finished |= scored(sampled, self._scorer)
        return list(self._finished)

    def take(self, keys: Collection[Key]) -> dict[Key, RolloutGroup]:
        """Return finished groups."""
        return {key: self._finished.pop(key) for key in keys if key in self._finished}

    @property
    def num_live(self) -> int:
        """Return 1: an engine in this process that fails ends the run."""
        return 1

    def news(self) -> list[str]:
        """Return nothing: an error of the engine is raised."""
        return []

    def so_far(self, keys: Collection[Key]) -> dict[Key, tuple[Completion, ...]]:
        """Return nothing: no job is under way between two steps."""
        return {}

    def busy_seconds(self) -> list[float]:
        """Return nothing: there are no servers."""
        return []


@dataclass(eq=False)
class _UnderWay:
    """A job on servers. left: how many of its responses have not ended"""

    job: Job
    left: int
    responses: list[Response] = field(default_factory=list)


class ServerWorkshop:
    """Jobs on servers. Threads sample them, and another one verifies each group as soon as it is complete."""

    def __init__(self, engine: VllmServers, scorer: Scorer | None, decoder: ResponseDecoder):
        """scorer: None on ranks that get no jobs"""
        self._engine = engine
        self._scorer = scorer
        self._decoder = decoder
        self._under_way: dict[Key, _UnderWay] = {}
        self._finished: dict[Key, RolloutGroup] = {}
        self._complete: SimpleQueue[_UnderWay] = SimpleQueue()
        self._changed = threading.Condition()
        self._error: Exception | None = None
        threading.Thread(target=self._verify, name="verification", daemon=True).start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Send the requests of the jobs. Raises ValueError for a job that can't be served."""
        if jobs and not self._under_way:
            self._engine.prepare()
        for job in jobs:
            requests = split(job.request)
            begun = job.begun or (None,) * len(requests)
            under_way = _UnderWay(job, left=len(requests))
            with self._changed:
                self._under_way[job.key] = under_way
            under_way.responses += [
                self._engine.submit(request, priority=job.key, begun=part)
                for request, part in zip(requests, begun, strict=True)
            ]
            for response in under_way.responses:
                response.future.add_done_callback(lambda _, one=under_way: self._look_at(one))  # type: ignore[misc]

    def sample(self) -> None:
        """Wait a little for the threads."""
        with self._changed:
            self._changed.wait(_WAIT_SECONDS)

    def finish(self) -> list[Key]:
        """Return what is finished. Raises what a thread raised."""
        with self._changed:
            if self._error is not None:
                raise self._error
            return list(self._finished)

    def take(self, keys: Collection[Key]) -> dict[Key, RolloutGroup]:
        """Return finished groups. Raises EngineError where another trainer's weights may have sampled them."""
        self._engine.check_versions()
        with self._changed:
            for key in keys:
                self._under_way.pop(key, None)
            return {key: self._finished.pop(key) for key in keys if key in self._finished}

    @property
    def num_live(self) -> int:
        """Return how many servers of this rank answer."""
        return self._engine.num_live

    def news(self) -> list[str]:
        """Return which servers were lost and which are back."""
        return self._engine.news()

    def so_far(self, keys: Collection[Key]) -> dict[Key, tuple[Completion, ...]]:
        """Return what there is of the completions of jobs that were not taken."""
        with self._changed:
            found = [self._under_way[key] for key in keys if key in self._under_way]
        return {one.job.key: tuple(response.so_far for response in one.responses) for one in found}

    def busy_seconds(self) -> list[float]:
        """Return for how long each server has had requests since the start."""
        return self._engine.busy_seconds()

    def _look_at(self, one: _UnderWay) -> None:
        """Pass a group on when its last response has ended."""
        with self._changed:
            one.left -= 1
            is_last = one.left == 0
        if is_last:
            self._complete.put(one)

    def _verify(self) -> None:
        """Verify groups, all that are complete together. A thread of its own."""
        while True:
            batch = [self._complete.get()]
            while not self._complete.empty():  # no other thread takes from it
                batch.append(self._complete.get())
            try:
                groups = [(one.job, self._group(one)) for one in batch]
                assert self._scorer is not None, "a rank without verifiers has got a job"
                finished = scored(groups, self._scorer)
            except Exception as error:
                with self._changed:
                    self._error = self._error or error
                    self._changed.notify_all()
                return
            with self._changed:
                self._finished |= finished
                self._changed.notify_all()

    def _group(self, one: _UnderWay) -> RolloutGroup:
        """Put a group together. Raises what a thread raised that sampled for it."""
        completions = [response.future.result() for response in one.responses]
        copies = one.job.request.num_samples // len(completions)
        return group_of(one.job.prompt, completions * copies, self._decoder)


def group_of(prompt: Prompt, completions: Sequence[Completion], decoder: ResponseDecoder) -> RolloutGroup:
    """Return a group without rewards, whose completions have their text."""
    texts = decoder.texts(prompt, completions)
    completions = tuple(replace(c, text=text) for c, text in zip(completions, texts, strict=True))
    aborted = any(not c.stop_reason.is_end for c in completions)
    return RolloutGroup(prompt=prompt, completions=completions, error="the engine aborted" if aborted else None)


def scored(groups: Sequence[tuple[Job, RolloutGroup]], scorer: Scorer) -> dict[Key, RolloutGroup]:
    """Verify the groups of the jobs that ask for it; return all of them."""
    finished = {job.key: group for job, group in groups}
    to_score = [job.key for job, _ in groups if job.scored]
    if to_score:
        finished |= zip(to_score, scorer.score([finished[key] for key in to_score]), strict=True)
    return finished
