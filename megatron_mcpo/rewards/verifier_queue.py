"""Decide in which order responses are verified, and which are skipped because their verifier hangs. No I/O.

Three rules keep responses that hang from delaying the others. A lane is the work of one verifier for one domain.
  1. An item that failed is finished: none of its other responses is tried.
  2. A lane gives way to every lane in which fewer items have timed out. So a healthy domain waits for at most one
     deadline for every lane that hangs, plus the start of a new worker, however many of its responses hang.
  3. A lane is given up, and the rest of it fails at once as timed out, when 4 responses per worker in a row time out;
     or when more items time out than 4 per worker and more than the share of its items that
     rewards.max_error_rate allows: the run is about to stop then, and need not wait.
"""

import threading
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

PATIENCE = 4
"""Timeouts of a lane, per worker, that are waited for in any case."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The result of one verification: a score from 0 to 1, or why there is none."""

    score: float | None = None
    error: str | None = None
    timed_out: bool = False


@dataclass(kw_only=True)
class _Lane:
    """The tasks of one verifier for one domain."""

    waiting: deque[int] = field(default_factory=deque)
    items: set[Hashable] = field(default_factory=set)
    hung: set[Hashable] = field(default_factory=set)
    """Items of which a response timed out."""
    in_a_row: int = 0


class VerifierQueue:
    """A queue of task numbers for several threads, with the verdicts of finished tasks."""

    def __init__(
        self, lanes: Sequence[Hashable], items: Sequence[Hashable], *, num_workers: int, max_error_rate: float
    ):
        """lanes, items: those of every task, in order"""
        self._patience = PATIENCE * num_workers
        self._max_error_rate = max_error_rate
        self._items = items
        self._lanes: dict[Hashable, _Lane] = {}
        self._lane_of = [self._lanes.setdefault(lane, _Lane()) for lane in lanes]
        for number, (lane, item) in enumerate(zip(self._lane_of, items, strict=True)):
            lane.waiting.append(number)
            lane.items.add(item)
        self._failed: dict[Hashable, Verdict] = {}
        self._verdicts: list[Verdict | None] = [None] * len(items)
        self._lock = threading.Lock()

    def take(self) -> int | None:
        """Return the number of the next task; None when none is left."""
        with self._lock:
            while lanes := [lane for lane in self._lanes.values() if lane.waiting]:
                lane = min(lanes, key=lambda lane: (len(lane.hung), lane.waiting[0]))
                number = lane.waiting.popleft()
                failure = self._failed.get(self._items[number]) or self._given_up(lane)
                if failure is None:
                    return number
                self._fail(number, failure)
            return None

    def settle(self, number: int, verdict: Verdict) -> None:
        """Keep the verdict of a task that was taken."""
        with self._lock:
            lane = self._lane_of[number]
            lane.in_a_row = lane.in_a_row + 1 if verdict.timed_out else 0
            if verdict.timed_out:
                lane.hung.add(self._items[number])
            if verdict.error is None:
                self._verdicts[number] = verdict
            else:
                self._fail(number, verdict)

    def stop(self) -> None:
        """Hand out nothing more."""
        with self._lock:
            for lane in self._lanes.values():
                lane.waiting.clear()

    def verdicts(self) -> list[Verdict]:
        """Return the verdicts of all tasks, in order; all must have been taken and settled."""
        assert all(verdict is not None for verdict in self._verdicts), "some tasks have no verdict yet"
        return [verdict for verdict in self._verdicts if verdict is not None]

    def _fail(self, number: int, verdict: Verdict) -> None:
        self._verdicts[number] = verdict
        self._failed.setdefault(self._items[number], verdict)

    def _given_up(self, lane: _Lane) -> Verdict | None:
        allowed = max(self._patience, self._max_error_rate * len(lane.items))
        if lane.in_a_row < self._patience and len(lane.hung) <= allowed:
            return None
        reason = f"not tried: in this step its domain's verifier has timed out on {len(lane.hung)} other items"
        return Verdict(error=reason, timed_out=True)
