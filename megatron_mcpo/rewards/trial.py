"""Score responses outside of a run, as a run would, and say what the verifier took for the answer."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from megatron_mcpo.config.domain_schema import RewardsConfig, VerifierConfig
from megatron_mcpo.config.schema import AlgorithmConfig
from megatron_mcpo.rewards.boxes import bare_forms
from megatron_mcpo.rewards.code import extract_code
from megatron_mcpo.rewards.pool import Task, WorkerPool
from megatron_mcpo.rewards.registry import Check, check_of, stated_answer
from megatron_mcpo.rewards.thoughts import final_answer
from megatron_mcpo.rewards.verifier_queue import Verdict


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A response to an item, and the kind of verifier that judges it."""

    kind: str
    entry: dict[str, Any]
    response: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a verifier says of a response; score and correct are None where `error` says why it can't be judged."""

    score: float | None
    correct: bool | None
    extracted: str | None
    error: str | None

    def as_json(self) -> dict[str, Any]:
        """Return the object that `mcpo reward try --json` prints."""
        return asdict(self)


def run_trials(trials: Sequence[Trial], rewards: RewardsConfig) -> list[Outcome]:
    """Judge the responses in worker processes, with the limits of a run.

    Raises ValueError for kind code on a machine without a sandbox, and VerifierUnavailable where no worker starts.
    """
    checks = {
        kind: check_of(VerifierConfig.model_validate({"kind": kind}), rewards) for kind in {t.kind for t in trials}
    }
    tasks = {number: _task(number, trial, checks[trial.kind]) for number, trial in enumerate(trials)}
    asked = {number: task for number, task in tasks.items() if task.response}
    verdicts = dict(zip(asked, _verdicts(list(asked.values()), rewards), strict=True))
    nothing = Verdict(score=0.0)
    return [_outcome(trial, verdicts.get(number, nothing), checks[trial.kind]) for number, trial in enumerate(trials)]


def _verdicts(tasks: list[Task], rewards: RewardsConfig) -> list[Verdict]:
    if not tasks:
        return []
    with closing(WorkerPool(sorted({task.function for task in tasks}), rewards)) as pool:
        return pool.run(tasks, max_error_rate=1.0)


def _task(number: int, trial: Trial, check: Check) -> Task:
    return Task(
        item=number,
        lane=(number, check.name),
        function=check.function,
        options=check.options,
        entry=trial.entry,
        response=check.seen(trial.response.strip()),
    )


def _outcome(trial: Trial, verdict: Verdict, check: Check) -> Outcome:
    extracted = None if verdict.timed_out else _extracted(trial)
    if verdict.score is None:
        return Outcome(score=None, correct=None, extracted=extracted, error=verdict.error)
    score = check.marks(verdict.score)
    threshold = AlgorithmConfig.model_fields["pass_threshold"].default
    return Outcome(score=score, correct=score >= threshold, extracted=extracted, error=None)


def _extracted(trial: Trial) -> str:
    """Return the text that a kind of verifier compares; "" where the response states none."""
    said = final_answer(trial.response)
    if trial.kind == "code":
        return extract_code(said)
    if trial.kind == "reasoning_gym":
        return bare_forms(said)[-1]
    if trial.kind != "math":
        return stated_answer(trial.kind, trial.response)
    from megatron_mcpo.rewards.math_answer import expressions  # it takes a second to import

    found = expressions(said)
    return str(found[-1]) if found else ""
