"""Judge from what the ranks say of themselves whether all of them live and work. No I/O, no clock, no torch.

Three rules. A rank that says nothing for a while is named. A job without any progress for too long is ended, as is one
in which a rank has been silent for that long. A job that was asked to stop is ended as soon as a rank is silent: it
can't save without it.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby

from megatron_mcpo.progress import START

ENDED = "ended"
"""The phase of a rank that has done its work."""

_MOST = 3
"""Multiple of the limit that is allowed while the ranks start, and at most, however long the pauses of a step are."""

_MOST_STACKS = 4


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank says of itself.

    number: grows with every beat; count, phase, step: see progress.Progress
    host: its name, for people; machine: what tells machines and containers apart, whose names may be equal
    pid, born: the process and when it was started, since numbers of processes are used again
    stopping: whether it was asked to stop
    """

    number: int
    count: int
    phase: str
    step: int
    host: str
    machine: str
    pid: int
    born: int
    stopping: bool

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def decode(text: bytes) -> "Beat | None":
        """Return the beat; None for a rank that has not said anything yet."""
        return Beat(**json.loads(text)) if text.startswith(b"{") else None

    @property
    def where(self) -> str:
        """Return the phase and its step as text."""
        return self.phase if self.phase in (START, ENDED) else f"{self.phase} of step {self.step}"


@dataclass(frozen=True, kw_only=True)
class End:
    """The end of a job.

    lines: why; stacks: the ranks that write theirs
    kill: for some live ranks, the silent processes (pid, born) of their machines
    """

    lines: list[str]
    stacks: list[int]
    kill: dict[int, list[tuple[int, int]]]

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def decode(text: str) -> "End":
        values = json.loads(text)
        kill = {int(rank): [(pid, born) for pid, born in found] for rank, found in values["kill"].items()}
        return End(lines=values["lines"], stacks=values["stacks"], kill=kill)


@dataclass(kw_only=True)
class Judge:
    """A watcher of all ranks, who is shown their last beats every few seconds.

    limit: seconds without progress after which a job is ended; longer, up to 3 times, where the steps pause for long
    silence: seconds without a beat after which a rank is called silent
    rank, since: who watches, and since when the ranks below, whose turn it was, have said nothing
    """

    limit: float
    silence: float
    rank: int
    since: float
    _beats: list[Beat | None] = field(default_factory=list)
    _heard: list[float] = field(default_factory=list)
    _moved: float = 0.0
    _longest_pause: float = 0.0
    _named: dict[int, float] = field(default_factory=dict)

    def look(self, now: float, beats: Sequence[Beat | None]) -> tuple[list[str], End | None]:
        """Return what is to be said, and the end of the job if it has come.

        now: seconds on a clock that stands still while this process does
        beats: the last one of every rank; None for a rank that has not come yet
        """
        if not self._beats:
            self._beats, self._moved = list(beats), now
            self._heard = [self.since if rank < self.rank else now for rank in range(len(beats))]
        lines = self._hear(now, beats)
        silent = [
            rank
            for rank, (heard, beat) in enumerate(zip(self._heard, beats, strict=True))
            if now - heard >= self.silence and not (beat and beat.phase == ENDED)
        ]
        for rank in silent:
            if rank not in self._named:
                self._named[rank] = self._heard[rank]
                lines.append(f"{self._about(rank, now)}; the job waits for it")
        reason = self._reason(now, silent)
        return lines, self._end(now, reason, silent) if reason else None

    def _hear(self, now: float, beats: Sequence[Beat | None]) -> list[str]:
        """Take in new beats; return a line for every rank that was silent and is back."""
        lines = []
        moved = False
        for rank, (old, new) in enumerate(zip(self._beats, beats, strict=True)):
            if new is None or (old is not None and old.number == new.number):
                continue
            self._heard[rank] = now
            moved = moved or old is None or (old.count, old.where) != (new.count, new.where)
            if rank in self._named:
                lines.append(f"rank {rank} is back after {now - self._named.pop(rank):.0f} s")
        if moved:
            if not self._starting:
                self._longest_pause = max(self._longest_pause, now - self._moved)
            self._moved = now
        self._beats = list(beats)
        return lines

    @property
    def _starting(self) -> bool:
        """Return whether a rank has not reached the first step: then nothing is known of how long steps pause."""
        return any(beat is None or beat.phase == START for beat in self._beats)

    def _reason(self, now: float, silent: Sequence[int]) -> str | None:
        """Return why the job must end; None if it goes on."""
        if silent and any(beat and beat.stopping for beat in self._beats):
            return "the job was asked to stop, and can't save without every rank"
        for rank in silent:
            allowed = self.limit if self._beats[rank] else _MOST * self.limit
            if now - self._heard[rank] >= allowed:
                return f"a rank has been silent for {now - self._heard[rank]:.0f} s{self._key}"
        if any(beat and beat.phase == ENDED for beat in self._beats):
            return None  # what is left has no progress to show, for example the last upload of a tracker
        allowed = _MOST * self.limit if self._starting else min(_MOST, self._pauses) * self.limit
        if now - self._moved >= allowed:
            return f"no rank has made any progress for {now - self._moved:.0f} s{self._key}"
        return None

    @property
    def _pauses(self) -> float:
        """Return 3 times the longest pause, in multiples of the limit, and at least 1."""
        return max(1.0, 3 * self._longest_pause / self.limit)

    @property
    def _key(self) -> str:
        return f" (run.collective_timeout = {self.limit:g})"

    def _end(self, now: float, reason: str, silent: Sequence[int]) -> End:
        live = [(rank, beat) for rank, beat in enumerate(self._beats) if beat and rank not in silent]
        places = {rank: beat.where for rank, beat in live if beat.phase != ENDED}
        usual = Counter(places.values()).most_common(1)[0][0] if places else ""
        different = [rank for rank, place in places.items() if place != usual]
        by_place = sorted(places, key=lambda rank: places[rank])
        neighbours = {beat.machine: rank for rank, beat in reversed(live)}
        kill: dict[int, list[tuple[int, int]]] = {}
        for beat in (self._beats[rank] for rank in silent):
            if beat and beat.machine in neighbours:
                kill.setdefault(neighbours[beat.machine], []).append((beat.pid, beat.born))
        lines = [
            f"{reason}: the job ends here",
            *(f"  {self._about(rank, now)}" for rank in silent),
            *(f"  {ranks_text(ranks)}: in {place}" for place, ranks in groupby(by_place, key=lambda r: places[r])),
            "  the same command resumes a run from its last checkpoint",
        ]
        return End(lines=lines, stacks=(different or sorted(places))[:_MOST_STACKS], kill=kill)

    def _about(self, rank: int, now: float) -> str:
        beat, seconds = self._beats[rank], now - self._heard[rank]
        if beat is None:
            return f"rank {rank} has not come in {seconds:.0f} s"
        return (
            f"rank {rank} ({beat.host}, pid {beat.pid}) has been silent for {seconds:.0f} s, last seen in {beat.where}"
        )


def ranks_text(ranks: Iterable[int]) -> str:
    """Return "rank 3" or "ranks 0-2, 5"."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], rank]
        else:
            spans.append([rank])
    text = ", ".join(str(span[0]) if span[0] == span[-1] else f"{span[0]}-{span[-1]}" for span in spans)
    return f"rank{'s' if len(spans) > 1 or len(set(spans[0])) > 1 else ''} {text}"
