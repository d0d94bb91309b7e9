"""What a check on a GPU finds: figures, and bands that some of them must lie in."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Band:
    """A figure and where it must lie. A lower end above 0 catches what is not switched on at all."""

    name: str
    value: float
    low: float
    high: float

    @property
    def holds(self) -> bool:
        """False for NaN."""
        return self.low <= self.value <= self.high


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """figures: what was measured, for the table and the file; rates: numbers of planner.hardware.Gpu.

    skipped: why nothing was
    """

    bands: tuple[Band, ...] = ()
    figures: Mapping[str, float | str] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    skipped: str = ""

    @property
    def failures(self) -> list[str]:
        """A sentence for every band that doesn't hold."""
        return [
            f"{band.name} = {band.value:.4g}, must lie in {band.low:.4g} .. {band.high:.4g}"
            for band in self.bands
            if not band.holds
        ]

    def to_json(self) -> str:
        """One line; infinities and NaN as text, which JSON has no numbers for."""
        values: dict[str, Any] = {
            "figures": {name: _plain(value) for name, value in self.figures.items()},
            "bands": {band.name: [_plain(band.value), band.low, band.high] for band in self.bands},
            "rates": dict(self.rates),
            "failures": self.failures,
            "skipped": self.skipped,
        }
        return json.dumps(values)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A check, run in a process of its own: one that crashes or hangs doesn't take the others along.

    needs: modules without which it is skipped; seconds: after which it is killed
    """

    name: str
    run: Callable[[], Outcome]
    seconds: int
    needs: tuple[str, ...] = ()


def _plain(value: float | str) -> float | str:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
