"""Sample and verify prompts, divided over all engines of the job.

Every engine completes its share of the prompts and one of its ranks verifies them; then all ranks are told of all
groups (exchange.py). So a step's data do not depend on how the trainer is laid out. Shape legend: megatron_mcpo.types.
"""

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from megatron_mcpo import progress
from megatron_mcpo.distributed.peers import Peers, gather_lists, gather_objects, gather_on_first, together
from megatron_mcpo.rollout.engine import NUM_SEEDS, SamplingRequest
from megatron_mcpo.trainer.exchange import tell
from megatron_mcpo.trainer.jobs import Job, Key, Workshop
from megatron_mcpo.types import Completion, Prompt, RolloutGroup


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The settings that prompts are completed with.

    num_samples, max_tokens: of each domain, in the configuration's order
    seed: of the first prompt's first sample, of any size; see `first_seed`
    """

    num_samples: Sequence[int]
    max_tokens: Sequence[int]
    temperature: float
    seed: int

    def first_seed(self, position: int) -> int:
        """Return the seed of the first sample of the prompt at a position; those of the others follow it.

        Seeds are consecutive over all samples of a step, modulo what an engine takes: a run's seed may be so large that
        the steps' seeds are not.
        """
        most = max(self.num_samples)
        return (self.seed + position * most) % (NUM_SEEDS - most)

    def request(self, prompt: Prompt, position: int, stop_token_ids: tuple[int, ...]) -> SamplingRequest:
        """Return the request for a prompt at a position."""
        return SamplingRequest(
            token_ids=prompt.token_ids,
            num_samples=self.num_samples[prompt.domain],
            seed=self.first_seed(position),
            max_tokens=self.max_tokens[prompt.domain],
            temperature=self.temperature,
            stop_token_ids=stop_token_ids,
        )


@dataclass(frozen=True, kw_only=True)
class _Report:
    """Report which jobs of a rank are finished, how many of its engines work, and what a user should know."""

    finished: list[Key]
    num_live: int
    news: list[str]


class Collector:
    """The completion and verification of prompts. All ranks call it together, with the same prompts or jobs."""

    def __init__(
        self,
        workshop: Workshop,
        groups: Peers,
        *,
        num_engines: int,
        my_engines: Collection[int],
        stop_token_ids: tuple[int, ...],
        restore: Callable[[], object],
        note: Callable[[str], None],
    ):
        """Keep the parts.

        Args:
            workshop: What completes this rank's jobs.
            groups: The ranks of the job.
            num_engines: How many engines the job has.
            my_engines: Which of them are behind `workshop` on this rank, by number.
            stop_token_ids: The tokens that end a response.
            restore: Waits until an engine is there again, and gives it the weights; collective.
            note: Is called on every rank with what a user should know.
        """
        self.workshop = workshop
        self.groups = groups
        self.stop_token_ids = stop_token_ids
        self.num_engines = num_engines
        self._my_engines = my_engines
        self._restore = restore
        self._note = note
        self._numbers = itertools.count()
        self._prompts: dict[Key, Prompt] = {}

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[RolloutGroup]:
        """Return one group per prompt, in order, without rewards; completions are on the rank that has them."""
        return self._divide(prompts, sampling, scored=False)

    def collect(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[RolloutGroup]:
        """Return the groups with rewards. A group whose verifier failed has the reason in `error` and no reward."""
        return self._divide(prompts, sampling, scored=True)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Begin with some jobs."""
        self._prompts |= {job.key: job.prompt for job in jobs}
        with together(self.groups):
            self.workshop.submit([job for job in jobs if job.place % self.num_engines in self._my_engines])

    def poll(self) -> set[Key]:
        """Return the jobs that are finished, the same on every rank, after waiting a little for more."""
        # The ranks of an engine wait for each other: one that fails must end at once, for torchrun to end the others.
        self.workshop.sample()
        with together(self.groups), progress.phase("verification of responses"):
            finished = self.workshop.finish()
        mine = _Report(finished=finished, num_live=self.workshop.num_live, news=self.workshop.news())
        reports = gather_objects(mine, self.groups)
        for line in (line for report in reports for line in report.news):
            self._note(line)
        if not any(report.num_live for report in reports):
            self._restore()
        return {key for report in reports for key in report.finished}

    def take(self, keys: Collection[Key]) -> list[RolloutGroup]:
        """Return the groups of jobs that `poll` has returned, in the order of the keys.

        Every rank has their outlines, and the completions of those that it sampled.
        """
        with together(self.groups):
            mine = self.workshop.take(keys)
        found = tell(mine, {key: self._prompts.pop(key) for key in keys}, self.groups)
        return [found[key] for key in keys]

    def so_far(self, keys: Collection[Key]) -> dict[Key, tuple[Completion, ...]]:
        """Return what there is of the completions of jobs that were not taken, on rank 0; nothing on the others."""
        parts = gather_on_first(self.workshop.so_far(keys), self.groups)
        return {key: completions for part in parts for key, completions in part.items()}

    def lengths_so_far(self, keys: Collection[Key]) -> list[int]:
        """Return the lengths in tokens of what there is of the completions of such jobs, the same on every rank."""
        mine = self.workshop.so_far(keys).values()
        return gather_lists([len(c.token_ids) for completions in mine for c in completions], self.groups)

    def busy_seconds(self) -> float:
        """Return for how long the job's servers have had requests, on average; 0 without servers. Collective."""
        seconds = gather_lists(self.workshop.busy_seconds(), self.groups)
        return sum(seconds) / len(seconds) if seconds else 0.0

    def _divide(self, prompts: Sequence[Prompt], sampling: Sampling, *, scored: bool) -> list[RolloutGroup]:
        jobs = [
            Job(
                key=(0, next(self._numbers)),
                place=place,
                prompt=prompt,
                request=sampling.request(prompt, place, self.stop_token_ids),
                scored=scored,
            )
            for place, prompt in enumerate(prompts)
        ]
        keys = [job.key for job in jobs]
        self.submit(jobs)
        while not self.poll().issuperset(keys):
            pass
        return self.take(keys)
