"""How many rows of a source can't be used, and why."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_mcpo.data.rows import RowError


@dataclass(kw_only=True)
class RowStatistics:
    """Counts the rows of one source as they are read."""

    domain: str
    source: str
    place: Callable[[int], str]
    """How a person finds the row at a position."""
    rows: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    _first: dict[str, tuple[int, str]] = field(default_factory=dict)

    def leave_out(self, position: int, error: RowError) -> None:
        """Count a bad row; rows may come in any order."""
        self.reasons[error.reason] += 1
        found = (position, f"{self.place(position)} {error}")
        self._first[error.reason] = min(found, self._first.get(error.reason, found))

    @property
    def first(self) -> dict[str, str]:
        """By reason: the first row of its kind, and what is wrong with it."""
        return {reason: text for reason, (_, text) in sorted(self._first.items())}

    @property
    def where(self) -> str:
        """How messages name the source."""
        return f"domain {self.domain!r}, source {self.source!r}"

    @property
    def bad(self) -> int:
        return self.reasons.total()

    def problem(self, max_bad_rows: float) -> str | None:
        """A line, when more than this share of the rows is bad, or there are none."""
        if self.rows == 0:
            return f"{self.where}: has no rows for this domain; correct the file, or its column `domain`"
        if self.bad / self.rows <= max_bad_rows:
            return None
        allowed = math.floor(max_bad_rows * self.rows + 1e-9)
        return (
            f"{self.where}: {self.bad} of {self.rows} rows are bad, data.max_bad_rows = {max_bad_rows:g} allows "
            f"{allowed}: {self._listed()}. Mend the rows, or raise data.max_bad_rows"
        )

    def note(self) -> str | None:
        if self.bad == 0:
            return None
        return f"{self.where}: {self.bad} of {self.rows} rows are left out: {self._listed()}"

    def as_json(self) -> dict[str, Any]:
        return {
            "domain": self.domain,
            "source": self.source,
            "rows": self.rows,
            "bad": self.bad,
            "reasons": dict(sorted(self.reasons.items())),
            "first": self.first,
        }

    def _listed(self) -> str:
        first = self.first
        return ", ".join(f"{count} {reason} (first: {first[reason]})" for reason, count in self.reasons.items())
