"""Estimate how an accuracy changed between two methods, with a 95 % interval. Imports no torch.

With at least two runs of both methods the interval is over seeds: Welch's t-interval (Biometrika 34, 1947), since two
to five seeds are too few for a bootstrap (in simulations its 95 % interval covered 67 % with two seeds and 81 % with
three, Welch's 97 %). Otherwise it is over items: the bootstrap intervals over items that every evaluation logs are
combined by the method of variance estimates recovery (Zou & Donner, Statistics in Medicine 27, 2008). That treats the
items of both methods as independent draws; they are the same items, so the interval is rather too wide. It does not
include how much seeds differ. Legend: R runs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import stdtrit

from megatron_mcpo.reporting.accuracy import LEVEL

type Basis = Literal["seeds", "items", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """An accuracy of every run of a method, and the bounds of its interval over items: [R] each, NaN if not known."""

    values_R: np.ndarray
    low_R: np.ndarray
    high_R: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change of accuracy and its bounds; NaN if not known.

    basis: what the interval is over
    """

    value: float
    low: float
    high: float
    basis: Basis

    @property
    def contains_zero(self) -> bool:
        """Return whether the interval contains 0, so that the data also agree with no change."""
        return self.low <= 0 <= self.high


def average(samples: Sequence[Sample]) -> Sample:
    """Return the mean over domains of every run; domains have different items, so their errors are independent."""
    values = np.mean([sample.values_R for sample in samples], axis=0)
    below = [sample.values_R - sample.low_R for sample in samples]
    above = [sample.high_R - sample.values_R for sample in samples]
    return Sample(
        values_R=values,
        low_R=values - np.linalg.norm(below, axis=0) / len(samples),
        high_R=values + np.linalg.norm(above, axis=0) / len(samples),
    )


def change(before: Sample, after: Sample) -> Change:
    """Return after - before, means over the runs that know the accuracy, with its interval."""
    before, after = _known(before), _known(after)
    if not len(before.values_R) or not len(after.values_R):
        return Change(value=math.nan, low=math.nan, high=math.nan, basis="unknown")
    value = float(after.values_R.mean() - before.values_R.mean())
    if min(len(before.values_R), len(after.values_R)) > 1:
        margin = _welch_margin(before.values_R, after.values_R)
        if margin > 0:
            return Change(value=value, low=value - margin, high=value + margin, basis="seeds")
    low = value - math.hypot(_mean_gap(after.values_R, after.low_R), _mean_gap(before.high_R, before.values_R))
    high = value + math.hypot(_mean_gap(after.high_R, after.values_R), _mean_gap(before.values_R, before.low_R))
    return Change(value=value, low=low, high=high, basis="unknown" if math.isnan(low + high) else "items")


def _known(sample: Sample) -> Sample:
    known = ~np.isnan(sample.values_R)
    return Sample(values_R=sample.values_R[known], low_R=sample.low_R[known], high_R=sample.high_R[known])


def _welch_margin(before_R: np.ndarray, after_R: np.ndarray) -> float:
    """Return half the width of Welch's t-interval; 0 if no run differs from the others of its method."""
    sizes = np.array([len(before_R), len(after_R)])
    variances = np.array([before_R.var(ddof=1), after_R.var(ddof=1)]) / sizes
    total = variances.sum()
    if total == 0:
        return 0.0
    freedom = total**2 / (variances**2 / (sizes - 1)).sum()
    return float(stdtrit(freedom, (1 + LEVEL) / 2) * math.sqrt(total))


def _mean_gap(upper_R: np.ndarray, lower_R: np.ndarray) -> float:
    """Return the mean distance of two bounds. All runs answer the same items, so averaging does not narrow it."""
    return float((upper_R - lower_R).mean())
