"""Keep one JSON line per run of the study: make it from a run's folder, append it, read all of them. Imports no torch.

A line has the keys

    level, arm, seed, steps, commit, device, threads
    settings         the keys that differ from the defaults of the schema, and the names of the domains
    final            held-out accuracy after the last step: mean, worst, and by domain
    curve            [step, mean, worst, {domain: accuracy}] of every evaluation
    reward           mean reward of every step
    auc_cross_domain, gain_cross_domain, gain_in_domain    of every step, null where there is none
    probe            [step, transfer, centered] of the evaluations that have them
    gradient_cos     mean cosine of each contrastive term's gradient and the policy term's, and of the policy term's
                     gradients of two domains, where they were measured
    seconds          total: of the start that finished the run; step: the median of a step

A run that failed has `error`, the end of its log, in place of what it would have measured.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic_core import PydanticUndefined

from megatron_mcpo.config.config import Config
from megatron_mcpo.reporting.accuracy import domain_accuracies
from megatron_mcpo.storage.files import read_jsonl
from megatron_mcpo.storage.run_folder import EVALUATIONS, METRICS

RESULTS = Path(__file__).resolve().parents[1] / "results" / "study"

_BY_STEP = {
    "reward": "reward/mean",
    "auc_cross_domain": "contrast/auc_cross_domain",
    "gain_cross_domain": "contrast/gain_cross_domain",
    "gain_in_domain": "contrast/gain_in_domain",
}
_COSINES = {
    "cross_domain": "gradient/cos_cross_domain",
    "in_domain": "gradient/cos_in_domain",
    "domains": "gradient/cos_domains",
}
_PROBES = ("contrast/probe_transfer", "contrast/probe_centered")
_DIGITS = 5
_WHICH_RUN = frozenset({"run.name", "run.dir", "run.seed", "run.steps"})


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run of the study: an arm with a seed."""

    level: str
    arm: str
    seed: int

    @property
    def name(self) -> str:
        """Return the name of the folder that the run is made in."""
        return f"{self.arm}_{self.seed}"


def results_file(level: str, results: Path = RESULTS) -> Path:
    return results / f"level_{level}.jsonl"


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of results; empty where it is missing. Raises ValueError for a damaged line."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def append(path: Path, line: Mapping[str, Any], lock_folder: Path) -> None:
    """Append a line as a whole, under a lock, so that several programs can write. Raises ValueError for NaN."""
    text = json.dumps(line, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock_folder / f"{path.name}.lock"), path.open("a", encoding="utf-8") as file:
        file.write(f"{text}\n")


def measured(folder: Path, config: Config) -> dict[str, Any]:
    """Return what a finished run measured, from its folder.

    Raises ValueError where the folder does not hold every step and an evaluation after the last.
    """
    steps, evaluations = read_jsonl(folder / METRICS), read_jsonl(folder / EVALUATIONS)
    logged = [row["step"] for row in steps]
    if logged != list(range(1, config.run.steps + 1)):
        raise ValueError(
            f"{folder / METRICS}: must have the steps 1 to {config.run.steps} (it has {len(logged)} steps)"
        )
    if not evaluations or evaluations[-1]["step"] != config.run.steps:
        raise ValueError(f"{folder / EVALUATIONS}: must end with an evaluation after step {config.run.steps}")
    last = evaluations[-1]
    cosines = {term: _mean([row.get(key) for row in steps]) for term, key in _COSINES.items()}
    return {
        "final": {name: _rounded(last[name]) for name in ("mean", "worst", *domain_accuracies(last))},
        "curve": [_evaluation(row) for row in evaluations],
        **{name: [_rounded(row.get(key)) for row in steps] for name, key in _BY_STEP.items()},
        "probe": [
            [row["step"], *(_rounded(row.get(key)) for key in _PROBES)] for row in evaluations if _PROBES[0] in row
        ],
        "gradient_cos": {term: value for term, value in cosines.items() if value is not None},
        "seconds": {"step": _rounded(statistics.median(row["time/step"] for row in steps))},
    }


def chosen_settings(config: Config) -> dict[str, Any]:
    """Return the values of a configuration that differ from the schema's defaults, and the names of its domains."""
    found: dict[str, Any] = {}
    for section, table in config:
        if section == "domain":
            continue
        for key, field in type(table).model_fields.items():
            default, value = field.get_default(), getattr(table, key)
            if (default is PydanticUndefined or value != default) and f"{section}.{key}" not in _WHICH_RUN:
                found[f"{section}.{key}"] = value
    return found | {"domains": config.domain_names}


def finished(lines: Sequence[Mapping[str, Any]], *, again: bool) -> set[tuple[str, int]]:
    """Return arm and seed of the runs that are done: also those that failed, unless they are to be run again."""
    return {(line["arm"], line["seed"]) for line in lines if not (again and "error" in line)}


def _evaluation(row: Mapping[str, Any]) -> list[Any]:
    domains = {name: _rounded(value) for name, value in domain_accuracies(row).items()}
    return [row["step"], _rounded(row["mean"]), _rounded(row["worst"]), domains]


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return _rounded(statistics.fmean(present)) if present else None


def _rounded(value: float | None) -> float | None:
    """Return a number with few enough digits for a file that is kept; None stays, and so becomes NaN."""
    return None if value is None or math.isnan(value) else float(f"{value:.{_DIGITS}g}")
