"""Count the rows of a source that can't be used, by reason."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_mcpo.data.rows import RowError


@dataclass(kw_only=True)
class RowStatistics:
    """The counts of one source's rows, filled as they are read."""

    domain: str
    source: str
    place: Callable[[int], str]
    """Return how a person finds the row at a position."""
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
        """Return the first bad row of each reason, and what is wrong with it."""
        return {reason: text for reason, (_, text) in sorted(self._first.items())}

    @property
    def where(self) -> str:
        """Return the name of the source in messages."""
        return f"domain {self.domain!r}, source {self.source!r}"

    @property
    def bad(self) -> int:
        """Return the number of bad rows."""
        return self.reasons.total()

    def problem(self, max_bad_rows: float) -> str | None:
        """Return a line where more than this share of the rows is bad, or there are no rows; None elsewhere."""
        if self.rows == 0:
            return f"{self.where}: must have rows for this domain; correct the file, or its column `domain`"
        if self.bad / self.rows <= max_bad_rows:
            return None
        allowed = math.floor(max_bad_rows * self.rows + 1e-9)
        return (
            f"{self.where}: {self.bad} of {self.rows} rows are bad, data.max_bad_rows = {max_bad_rows:g} allows "
            f"{allowed}: {self._listed()}. Correct the rows, or raise data.max_bad_rows"
        )

    def note(self) -> str | None:
        """Return a line on the bad rows; None where there are none."""
        if self.bad == 0:
            return None
        return f"{self.where}: {self.bad} of {self.rows} rows are skipped: {self._listed()}"

    def as_json(self) -> dict[str, Any]:
        """Return the object of `mcpo data check --json`."""
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
