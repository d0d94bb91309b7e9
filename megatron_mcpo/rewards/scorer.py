"""From completions to rewards; a verifier's failure never becomes a silent 0."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Self

from megatron_mcpo.rewards.pool import Subject, VerificationError, WorkerPool
from megatron_mcpo.sections import RewardsConfig
from megatron_mcpo.types import Completion, RolloutGroup, StopReason

FULL_MARKS = 0.99
REASONING_GYM = "megatron_mcpo.rewards.reasoning_gym:score"

_ItemKey = tuple[int, str, int]


class TooManyErrors(RuntimeError):
    """Verifiers failed on a larger share of a step's groups than the configuration allows."""


class Scorer:
    """Binary rewards from worker processes, which start at construction so that their imports overlap other work.

    The reward is 1 for a score of at least 0.99, else 0: reasoning-gym's scorers give 0.01 to 0.05 for nonsense, and a
    share of the marks for any long text that happens to contain the answer. Either would teach rambling.
    """

    def __init__(self, config: RewardsConfig, *, verifier: str = REASONING_GYM):
        self._pool = WorkerPool(verifier, num_workers=config.workers, timeout=config.timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the workers."""
        self._pool.close()

    def wait_ready(self) -> None:
        """Wait until a worker has imported the verifier; `score` does it too. Raises VerifierUnavailable."""
        self._pool.wait_ready()

    def score(self, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        """The groups with `rewards` filled, or, where any of its verifications failed, with `error` set instead.

        `Completion.text` must hold the decoded response. A response that was cut or is blank gets 0 unasked; the same
        answer to the same item is verified once. Groups that already carry an error are handed back as they are.
        Takes at most (start-up + timeout) * items / workers. Raises VerifierUnavailable when no worker can start.
        """
        self.wait_ready()
        subjects: dict[_ItemKey, Subject] = {}
        verdicts: dict[tuple[_ItemKey, str], Future[float]] = {}
        for group in groups:
            if group.error is not None:
                continue
            item = _key(group)
            subject = subjects.setdefault(item, Subject(group.prompt.entry))
            for answer in map(_answer, group.completions):
                if answer and (item, answer) not in verdicts:
                    verdicts[item, answer] = self._pool.submit(subject, answer)
        return [_with_rewards(group, verdicts) for group in groups]


def check_error_rate(groups: Sequence[RolloutGroup], *, domain_names: Sequence[str], max_error_rate: float) -> None:
    """Raise TooManyErrors when more than `max_error_rate` of ALL groups of a step failed to be verified."""
    failed = [group for group in groups if group.error is not None]
    if len(failed) <= max_error_rate * len(groups):
        return
    first = failed[0]
    counts = {name: sum(domain_names[g.prompt.domain] == name for g in failed) for name in domain_names}
    where = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
    raise TooManyErrors(
        f"verifiers failed on {len(failed)} of {len(groups)} groups ({where}), more than rewards.max_error_rate = "
        f"{max_error_rate:g}; first: domain {domain_names[first.prompt.domain]!r}, source {first.prompt.source!r}, "
        f"item {first.prompt.index}: {first.error}. Mend the verifier, raise rewards.timeout, or allow more errors"
    )


def _key(group: RolloutGroup) -> _ItemKey:
    return (group.prompt.domain, group.prompt.source, group.prompt.index)


def _answer(completion: Completion) -> str:
    """What the verifier sees of a completion; empty where there is nothing to verify."""
    return completion.text.strip() if completion.stop_reason is StopReason.STOP else ""


def _with_rewards(group: RolloutGroup, verdicts: dict[tuple[_ItemKey, str], "Future[float]"]) -> RolloutGroup:
    if group.error is not None:
        return group
    item = _key(group)
    try:
        scores = [verdicts[item, answer].result() if answer else 0.0 for answer in map(_answer, group.completions)]
    except VerificationError as error:
        return replace(group, rewards=(), error=str(error))
    return replace(group, rewards=tuple(float(score >= FULL_MARKS) for score in scores), error=None)
