"""Count the rows of a source that can't be used, by reason, and those that repeat a question."""

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
    repeated: int = 0
    """Rows with the question of an earlier row; they are left out, which is no fault."""
    contradicting: int = 0
    """Those of `repeated` that have another answer than the first row."""
    _first: dict[str, tuple[int, str]] = field(default_factory=dict)

    def leave_out(self, position: int, error: RowError) -> None:
        """Count a bad row; rows may come in any order."""
        self.reasons[error.reason] += 1
        found = (position, f"{self.place(position)} {error}")
        self._first[error.reason] = min(found, self._first.get(error.reason, found))

    def repeat(self, *, same_answer: bool) -> None:
        """Count a row whose question an earlier row has."""
        self.repeated += 1
        self.contradicting += not same_answer

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

    def notes(self) -> list[str]:
        """Return a line on the bad rows and one on the repeated ones, where there are any."""
        notes = []
        if self.bad:
            notes.append(f"WARNING: {self.where}: {self.bad} of {self.rows} rows are skipped: {self._listed()}")
        if self.repeated:
            others = (
                f", {self.contradicting} with another answer, of which the first counts" if self.contradicting else ""
            )
            notes.append(
                f"{self.where}: {self.repeated} of {self.rows} rows repeat the question of an earlier row and are left "
                f"out{others}"
            )
        return notes

    def as_json(self) -> dict[str, Any]:
        """Return the object of `mcpo data check --json`."""
        return {
            "domain": self.domain,
            "source": self.source,
            "rows": self.rows,
            "repeated": self.repeated,
            "contradicting": self.contradicting,
            "bad": self.bad,
            "reasons": dict(sorted(self.reasons.items())),
            "first": self.first,
        }

    def _listed(self) -> str:
        first = self.first
        return ", ".join(f"{count} {reason} (first: {first[reason]})" for reason, count in self.reasons.items())
