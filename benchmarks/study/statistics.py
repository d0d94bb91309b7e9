"""Compare the arms of the study from its lines of results: means over seeds, and differences with intervals.

Runs with the same seed start from the same weights of the head and see the same prompts in their first step, so arms
are compared seed by seed. The interval of a difference is the 95 % percentile bootstrap over these pairs (Efron 1979).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.study.arms import REFERENCES, Arm
from megatron_mcpo.reporting.accuracy import LEVEL, NUM_RESAMPLES, mean

FEWEST_SEEDS = 3
"""With fewer pairs of runs a difference has no interval."""

MECHANISM = {
    "auc": "auc_cross_domain",
    "gain_cross_domain": "gain_cross_domain",
    "gain_in_domain": "gain_in_domain",
}
"""Figures that are the mean of a column over the last fifth of a run's steps."""

COSINES = {"cos_cross_domain": "cross_domain", "cos_in_domain": "in_domain", "cos_domains": "domains"}
"""Figures that are the mean of a cosine of gradients over all steps that measured it."""

PROBES = ("probe_transfer", "probe_centered")
"""Figures of the last evaluation."""

OVERALL = ("mean", "worst", "area", "transfer")
"""Figures of runs on all domains, without those of each domain."""

SINGLE = "single_"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The mean difference of a figure from the reference over the seeds that both have.

    low, high: bounds of the 95 % percentile interval of the bootstrap; NaN with fewer than FEWEST_SEEDS seeds
    t_low, t_high: bounds of the 95 % interval of a paired t test, which is wider; with few seeds it covers what it
        should, while the bootstrap's covers less (of simulated normal pairs 90 % with 10 seeds, 85 % with 5)
    """

    value: float
    low: float
    high: float
    t_low: float
    t_high: float
    num_seeds: int

    @property
    def is_clear(self) -> bool:
        """Return whether both intervals exclude 0."""
        return (self.low > 0 and self.t_low > 0) or (self.high < 0 and self.t_high < 0)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The results of an arm's runs.

    seeds: of the runs that ended well; failed: seeds of those that failed, one per line of results
    figures: value by figure and seed; the figures are OVERALL, the domains, MECHANISM, COSINES, and PROBES
    differences: from the group's reference, by figure; empty for the reference itself
    """

    arm: Arm
    seeds: tuple[int, ...]
    failed: tuple[int, ...]
    figures: dict[str, dict[int, float]]
    differences: dict[str, Difference]

    def average(self, figure: str) -> float:
        """Return the mean of a figure over the seeds; NaN where no run has it."""
        return mean(list(self.figures.get(figure, {}).values()))


def summaries(lines: Sequence[Mapping[str, Any]], arms: Mapping[str, Arm]) -> list[Summary]:
    """Return a summary of every arm that has a line of results, in the order of the arms.

    Only the seeds of the arm's group count. Where a run was repeated, its last line that is no failure counts.
    """
    counted = [line for line in lines if line["arm"] in arms and arms[line["arm"]].has_seed(line["seed"])]
    good: dict[str, dict[int, Mapping[str, Any]]] = {}
    failed: dict[str, list[int]] = {}
    for line in counted:
        if "error" in line:
            failed.setdefault(line["arm"], []).append(line["seed"])
        else:
            good.setdefault(line["arm"], {})[line["seed"]] = line
    domains = domains_of(lines)
    alone = {
        (name, seed): line["final"][name] for name in domains for seed, line in good.get(SINGLE + name, {}).items()
    }
    figures = {
        name: _by_figure({seed: figures_of(line, domains, alone) for seed, line in good.get(name, {}).items()})
        for name in good
    }
    return [
        Summary(
            arm=arm,
            seeds=tuple(sorted(good.get(name, {}))),
            failed=tuple(failed.get(name, ())),
            figures=figures.get(name, {}),
            differences=_differences(name, arm, figures),
        )
        for name, arm in arms.items()
        if name in good or name in failed
    ]


def domains_of(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the domains of the run that has the most."""
    return max((line["settings"]["domains"] for line in lines), key=len, default=[])


def figures_of(
    line: Mapping[str, Any], domains: Sequence[str], alone: Mapping[tuple[str, int], float]
) -> dict[str, float]:
    """Return the figures of a run, without those that it does not have.

    area: the mean of the mean accuracy over all evaluations after the first step
    transfer: backward transfer, the mean over domains of the accuracy less that of the run on this domain alone with
        the same seed (Lopez-Paz & Ranzato 2017, arXiv 1706.08840, equation 3); without such runs it is left out

    Args:
        line: of a run that ended well
        domains: of a run on all domains; a run on fewer has their accuracies only
        alone: final accuracy of the runs on one domain, by domain and seed
    """
    own = line["settings"]["domains"]
    found = {name: line["final"][name] for name in own}
    if len(own) == len(domains):
        found |= {name: line["final"][name] for name in ("mean", "worst")}
        found["area"] = mean([row[1] for row in line["curve"] if row[0]])
        gaps = [line["final"][name] - alone.get((name, line["seed"]), math.nan) for name in domains]
        found["transfer"] = mean(gaps)
    found |= {name: last_fifth(line[column]) for name, column in MECHANISM.items()}
    found |= {name: line["gradient_cos"].get(term) for name, term in COSINES.items()}
    found |= dict(zip(PROBES, line["probe"][-1][1:] if line["probe"] else (), strict=False))
    return {name: value for name, value in found.items() if value is not None and not math.isnan(value)}


def last_fifth(values: Sequence[float | None]) -> float:
    """Return the mean over the last fifth of the steps, at least one, of the values that are known; NaN without any."""
    return mean([value for value in values[-max(1, len(values) // 5) :] if value is not None])


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference:
    """Compare a figure of two arms, given by seed, over the seeds that both have."""
    pairs_S = np.array([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])
    low = high = t_low = t_high = math.nan
    if len(pairs_S) >= FEWEST_SEEDS:
        found = stats.bootstrap(
            (pairs_S,), np.mean, confidence_level=LEVEL, n_resamples=NUM_RESAMPLES, method="percentile", rng=0
        )
        low, high = map(float, found.confidence_interval)
        t_low, t_high = map(float, stats.ttest_1samp(pairs_S, 0.0).confidence_interval(LEVEL))
    return Difference(
        value=mean(pairs_S.tolist()), low=low, high=high, t_low=t_low, t_high=t_high, num_seeds=len(pairs_S)
    )


def _by_figure(by_seed: Mapping[int, Mapping[str, float]]) -> dict[str, dict[int, float]]:
    names = dict.fromkeys(name for figures in by_seed.values() for name in figures)
    return {name: {seed: f[name] for seed, f in by_seed.items() if name in f} for name in names}


def _differences(
    name: str, arm: Arm, figures: Mapping[str, Mapping[str, Mapping[int, float]]]
) -> dict[str, Difference]:
    reference = figures.get(REFERENCES[arm.kind], {})
    if name == REFERENCES[arm.kind] or name not in figures:
        return {}
    found = {key: difference(values, reference.get(key, {})) for key, values in figures[name].items()}
    return {key: value for key, value in found.items() if value.num_seeds}
