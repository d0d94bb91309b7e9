"""Describe one metric of a run, and several that are measured on the same things."""

from collections.abc import Callable
from dataclasses import dataclass

from megatron_mcpo.reporting.selection import Selection

type Compute = Callable[[Selection], float | None]
"""Returns NaN for a mean over nothing, and None for a metric that the step does not have."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One row of the table.

    keys: with <domain> for one value per domain, with <a>/<b> for one per two domains
    meaning: what the value is
    target: the chance level, or the value that a healthy run has; "" where there is neither
    compute: from the rollouts of a domain for a key with <domain>, else from those of the whole step
    """

    keys: tuple[str, ...]
    meaning: str
    target: str = ""
    compute: Compute | None = None


@dataclass(frozen=True, kw_only=True)
class Section:
    """Metrics that are measured on the same things. about: what these are."""

    title: str
    about: str
    metrics: tuple[Metric, ...]
