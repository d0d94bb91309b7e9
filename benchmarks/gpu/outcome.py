"""Describe what a check on a GPU finds: figures, bands that some must lie in, targets that some should reach."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Band:
    """A figure and where it must lie. A lower end above 0 detects what is not switched on at all."""

    name: str
    value: float
    low: float
    high: float

    @property
    def holds(self) -> bool:
        """Whether the figure lies in the band; False for NaN."""
        return self.low <= self.value <= self.high


@dataclass(frozen=True, kw_only=True)
class Target:
    """A figure and what good code reaches. A target that is missed is said, and does not fail the row.

    at_least: whether the figure should be `goal` or more; else `goal` or less
    """

    name: str
    value: float
    goal: float
    at_least: bool

    @property
    def verdict(self) -> str:
        """Return the goal and whether it is reached, for the table and the file."""
        met = self.value >= self.goal if self.at_least else self.value <= self.goal
        return f"target {'>=' if self.at_least else '<='} {self.goal:g}: {'reached' if met else 'missed'}"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a check.

    figures: what was measured, for the table and the file; rates: numbers of planner.hardware.Gpu
    skipped: why nothing was measured
    """

    bands: tuple[Band, ...] = ()
    targets: tuple[Target, ...] = ()
    figures: Mapping[str, float | str] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    skipped: str = ""

    @property
    def failures(self) -> list[str]:
        """A sentence for every band that does not hold."""
        return [
            f"{band.name} = {band.value:.4g}, must lie in {band.low:.4g} .. {band.high:.4g}"
            for band in self.bands
            if not band.holds
        ]

    def to_json(self) -> str:
        """Return one line of JSON, with infinities and NaN as text, since JSON has no numbers for them."""
        values: dict[str, Any] = {
            "figures": {name: _plain(value) for name, value in self.figures.items()},
            "bands": {band.name: [_plain(band.value), band.low, band.high] for band in self.bands},
            "targets": {target.name: [_plain(target.value), target.verdict] for target in self.targets},
            "rates": dict(self.rates),
            "failures": self.failures,
            "skipped": self.skipped,
        }
        return json.dumps(values)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A check that is run in a process of its own, so that a crash or a hang does not affect the others.

    needs: modules without which it is skipped; oldest: packages and the versions below which it is
    seconds: after which it is killed
    """

    name: str
    run: Callable[[], Outcome]
    seconds: int
    needs: tuple[str, ...] = ()
    oldest: tuple[tuple[str, str], ...] = ()


def _plain(value: float | str) -> float | str:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
