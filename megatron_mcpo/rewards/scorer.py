"""Turn completions into rewards; a verifier's failure never becomes a silent 0.

A rollout's reward is the weighted mean of its verifiers' scores, less the penalties for its length, within 0 and 1. It
is `correct` where the weighted mean of the verifiers that JUDGE it (all kinds but format and length; format where
there is no other) reaches algorithm.pass_threshold. So neither form nor length makes a correct response incorrect for
the contrastive terms. A response that was cut at its limit or is blank gets 0, is incorrect, and no verifier is asked.
Nor is one that judges, about a response that consists of thoughts alone.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

from megatron_mcpo.config.config import Config, RunError
from megatron_mcpo.config.domain_schema import DomainConfig, RewardsConfig, VerifierConfig
from megatron_mcpo.rewards.pool import Task, WorkerPool
from megatron_mcpo.rewards.registry import ROW_VERIFIERS, VERIFIERS, Check, check_of
from megatron_mcpo.rewards.verifier_queue import Verdict
from megatron_mcpo.types import Completion, RolloutGroup, StopReason

_TaskKey = tuple[Hashable, str, str]
"""Item, what the verifier gets of the response, name and position of the verifier."""


class TooManyErrors(RunError):
    """Verifiers failed on a larger share of a step's groups than the configuration allows."""


class Scorer:
    """Rewards from worker processes, which start at construction so that their imports overlap other work."""

    def __init__(self, config: Config):
        self._rewards = config.rewards
        self._threshold = config.algorithm.pass_threshold
        self._rules = [
            DomainRules(domain, config.rewards, response_limit=limit)
            for domain, limit in zip(config.domain, config.response_limits, strict=True)
        ]
        self._pool = WorkerPool([function for rules in self._rules for function in rules.functions], config.rewards)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the workers."""
        self._pool.close()

    def wait_ready(self) -> None:
        """Wait until a worker has imported the verifiers; `score` does it too. Raises VerifierUnavailable."""
        self._pool.wait_ready()

    def score(self, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        """Return the groups with `rewards` and `correct` filled, or `error` where any of their verifications failed.

        `Completion.text` must hold the decoded response; verifiers get it without the blanks around it, and those that
        judge without its thoughts (thoughts.py). The same text for the same item is verified once. Groups that already
        have an error are returned unchanged. verifier_queue.py says how long responses that hang can take. Raises
        VerifierUnavailable when no worker starts.
        """
        tasks: dict[_TaskKey, Task] = {}
        refused: dict[int, str] = {}
        for number, group in enumerate(groups):
            if group.error is not None:
                continue
            try:
                checks = self._checks(group)
            except ValueError as error:
                refused[number] = str(error)
                continue
            responses = list(filter(None, map(_response, group.completions)))
            for place, check in enumerate(checks):
                for seen in filter(None, map(check.seen, responses)):
                    tasks.setdefault(_task_key(group, seen, place, check), _task(group, seen, place, check))
        verdicts = self._pool.run(list(tasks.values()), max_error_rate=self._rewards.max_error_rate)
        by_key = dict(zip(tasks, verdicts, strict=True))
        return [
            replace(group, error=refused[number]) if number in refused else self._judged(group, by_key)
            for number, group in enumerate(groups)
        ]

    def _checks(self, group: RolloutGroup) -> Sequence[Check]:
        return self._rules[group.prompt.domain].checks(group.prompt.entry, self._rewards)

    def _judged(self, group: RolloutGroup, verdicts: Mapping[_TaskKey, Verdict]) -> RolloutGroup:
        if group.error is not None:
            return group
        checks = self._checks(group)
        rewards, correct = [], []
        for completion in group.completions:
            response = _response(completion)
            if not response:
                rewards.append(0.0)
                correct.append(False)
                continue
            found = [_verdict(verdicts, group, response, place, check) for place, check in enumerate(checks)]
            failed = next((verdict for verdict in found if verdict.error is not None), None)
            if failed is not None:
                return replace(group, rewards=(), correct=(), error=failed.error, timed_out=failed.timed_out)
            scores = [_marks(verdict.score, check) for verdict, check in zip(found, checks, strict=True)]
            penalty = self._rules[group.prompt.domain].penalty(len(completion.token_ids))
            rewards.append(min(max(_mean(scores, checks) - penalty, 0.0), 1.0))
            correct.append(_judgement(scores, checks) >= self._threshold)
        return replace(group, rewards=tuple(rewards), correct=tuple(correct), error=None)


class DomainRules:
    """The verifiers and length penalties of one domain."""

    def __init__(self, domain: DomainConfig, rewards: RewardsConfig, *, response_limit: int):
        self._name = domain.name
        self._configured = [check_of(verifier, rewards) for verifier in domain.scoring]
        self._lengths = [(v.weight, v.buffer_tokens) for v in domain.verifiers if v.kind == "length"]
        self._limit = response_limit
        self._has_generator = any(source.generator is not None for source in domain.sources)

    @property
    def functions(self) -> list[str]:
        """Return the functions that workers import, as far as the configuration tells; rows may name more."""
        own = VERIFIERS["reasoning_gym"].function
        by_default = [own] if own is not None and self._has_generator and not self._configured else []
        return [check.function for check in self._configured] + by_default

    def checks(self, entry: Mapping[str, Any], rewards: RewardsConfig) -> Sequence[Check]:
        """Return what scores the responses to an item: the domain's verifiers, or the one of its row or generator.

        A row names a kind as entry["verifier"]; a generated item has metadata.source_dataset. Raises ValueError for
        an item that has neither, or names a kind that needs more than the row.
        """
        if self._configured:
            return self._configured
        named = entry.get("verifier")
        if named is None and "source_dataset" in (entry.get("metadata") or {}):
            named = "reasoning_gym"
        if named not in ROW_VERIFIERS:
            raise ValueError(
                f"verifier {named!r} of the item: must be one of {', '.join(ROW_VERIFIERS)}; correct the row, or give "
                f"domain {self._name!r} [[domain.verifiers]]"
            )
        return [check_of(VerifierConfig.model_validate({"kind": named}), rewards)]

    def penalty(self, num_tokens: int) -> float:
        """Return the sum of the length penalties, at least 0: DAPO's soft overlong punishment, times -weight.

        arXiv 2503.14476, eq. 13: each is 0 up to limit - buffer tokens, then grows linearly to its weight at the limit.
        """
        parts = [
            weight * min(max((num_tokens - (self._limit - buffer)) / buffer, 0.0), 1.0)
            for weight, buffer in self._lengths
            if buffer is not None
        ]
        return math.fsum(parts)


def check_error_rate(groups: Sequence[RolloutGroup], *, domain_names: Sequence[str], max_error_rate: float) -> None:
    """Raise TooManyErrors when the verifiers failed on more than `max_error_rate` of ALL groups of a step.

    One of several may fail at any rate but 0: a response that makes its verifier hang must not end a small run.
    """
    failed = [group for group in groups if group.error is not None]
    one_of_several = max_error_rate > 0 and len(failed) == 1 < len(groups)
    if one_of_several or len(failed) <= max_error_rate * len(groups):
        return
    first = failed[0]
    counts = {name: sum(domain_names[g.prompt.domain] == name for g in failed) for name in domain_names}
    where = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
    raise TooManyErrors(
        f"verifiers failed on {len(failed)} of {len(groups)} groups ({where}), more than rewards.max_error_rate = "
        f"{max_error_rate:g}; first: domain {domain_names[first.prompt.domain]!r}, source {first.prompt.source!r}, "
        f"item {first.prompt.index}: {first.error}. Correct the verifier, raise rewards.timeout, or allow more errors"
    )


def _item(group: RolloutGroup) -> Hashable:
    return (group.prompt.domain, group.prompt.source, group.prompt.index)


def _verdict(
    verdicts: Mapping[_TaskKey, Verdict], group: RolloutGroup, response: str, place: int, check: Check
) -> Verdict:
    """Return the verdict on a response; 0 where it states nothing, which no verifier was asked about."""
    seen = check.seen(response)
    return verdicts[_task_key(group, seen, place, check)] if seen else Verdict(score=0.0)


def _task_key(group: RolloutGroup, seen: str, place: int, check: Check) -> _TaskKey:
    return (_item(group), seen, f"{place} {check.name}")


def _task(group: RolloutGroup, seen: str, place: int, check: Check) -> Task:
    return Task(
        item=_item(group),
        lane=(group.prompt.domain, place, check.name),
        function=check.function,
        options=check.options,
        entry=group.prompt.entry,
        response=seen,
    )


def _response(completion: Completion) -> str:
    """Return the text of a completion that verifiers see; empty where there is nothing to verify."""
    return completion.text.strip() if completion.stop_reason is StopReason.STOP else ""


def _marks(score: float | None, check: Check) -> float:
    assert score is not None, "a verdict without an error has a score"
    return check.marks(score)


def _judgement(scores: Sequence[float], checks: Sequence[Check]) -> float:
    """Return the weighted mean of the scores that judge; of all scores where none does."""
    judging = [(score, check) for score, check in zip(scores, checks, strict=True) if check.judges]
    if not judging:
        return _mean(scores, checks)
    return _mean([score for score, _ in judging], [check for _, check in judging])


def _mean(scores: Sequence[float], checks: Sequence[Check]) -> float:
    weights = [check.weight for check in checks]
    return math.fsum(w * s for w, s in zip(weights, scores, strict=True)) / math.fsum(weights)
