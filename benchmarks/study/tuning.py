"""Choose settings from the tuning runs, in two rounds, by the rule of docs/study.md. Imports no torch.

In the first round every value runs on the first tuning seed. In the second, the reference and the best value of each
choice, where it was better than the reference by more than MARGIN, run on the other seeds. A value of the second round
is chosen where the mean of its paired differences from the reference is larger than their standard error.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.study.arms import FIRST_TUNING_SEED, MAIN, REFERENCES, Arm
from benchmarks.study.statistics import Summary, summaries

OUTCOME = "area"
"""The figure that decides, the study's primary outcome."""
MARGIN = 0.01
"""What counts as equal in the study: one percentage point. No runs are spent on a value within it."""


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best value of a choice in the first round, against the reference.

    pairs: differences of the primary outcome from the reference by seed
    """

    arm: Arm
    pairs: dict[int, float]

    @property
    def goes_on(self) -> bool:
        """Return whether the value takes part in the second round."""
        return self.pairs[FIRST_TUNING_SEED] > MARGIN

    @property
    def mean(self) -> float:
        """Return the mean difference from the reference."""
        return statistics.fmean(self.pairs.values())

    @property
    def standard_error(self) -> float:
        """Return the standard error of the mean difference; NaN with one seed."""
        if len(self.pairs) < 2:
            return math.nan
        return statistics.stdev(self.pairs.values()) / math.sqrt(len(self.pairs))

    @property
    def is_chosen(self) -> bool:
        """Return whether the value takes the place of the reference's; never after one seed."""
        return self.goes_on and self.mean > self.standard_error


def bests(lines: Sequence[Mapping[str, Any]], arms: Mapping[str, Arm]) -> list[Best]:
    """Return the best value of every choice that has run on the first tuning seed, as its reference has."""
    found = {summary.arm.name: summary for summary in summaries(lines, arms) if summary.arm.kind != MAIN}
    best: dict[str, Best] = {}
    for name, summary in found.items():
        reference = found.get(REFERENCES[summary.arm.kind])
        if reference is None or name == reference.arm.name:
            continue
        pairs = _pairs(summary, reference)
        if FIRST_TUNING_SEED not in pairs:
            continue
        rival = best.get(summary.arm.group)
        if rival is None or pairs[FIRST_TUNING_SEED] > rival.pairs[FIRST_TUNING_SEED]:
            best[summary.arm.group] = Best(arm=summary.arm, pairs=pairs)
    return list(best.values())


def second_round(lines: Sequence[Mapping[str, Any]], arms: Mapping[str, Arm]) -> set[str]:
    """Return the arms that run on the tuning seeds after the first; none of a kind before its first round is over."""
    over = {line["arm"] for line in lines if line["seed"] == FIRST_TUNING_SEED}  # those that failed, too
    waiting = {arm.kind for arm in arms.values() if arm.kind != MAIN and arm.name not in over}
    going = {best.arm.name for best in bests(lines, arms) if best.goes_on and best.arm.kind not in waiting}
    return going | {REFERENCES[arm.kind] for arm in arms.values() if arm.kind not in (MAIN, *waiting)}


def _pairs(ours: Summary, theirs: Summary) -> dict[int, float]:
    by_seed, reference = ours.figures.get(OUTCOME, {}), theirs.figures.get(OUTCOME, {})
    return {seed: by_seed[seed] - reference[seed] for seed in sorted(by_seed.keys() & reference.keys())}
