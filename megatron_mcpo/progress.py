"""Count the progress of this process and name its phase, for the watchdog of a run. Imports no torch.

`tick` is called wherever work moves on: at every decoding step of the engine, verified response, micro-batch, bucket of
a weight sync and loaded tensor. What is read from and written to files needs no ticks: the kernel counts it.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

START = "start"
"""The phase until the first step: imports, loading, compiling."""

_BETWEEN = "between phases"
_IO = Path("/proc/self/io")
_LEAST_BYTES = 1 << 20
"""What libraries read and write between two looks while nothing moves is less than this."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far this process is. count: grows as long as it works"""

    count: int
    phase: str
    step: int


_ticks = 0
_step = 0
_phases = [START]
_bytes = 0


def tick() -> None:
    """Count one piece of work."""
    global _ticks
    _ticks += 1


def at_step(step: int) -> None:
    """Say that a step begins."""
    global _step
    _step = step
    _phases[0] = _BETWEEN
    tick()


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Name the phase of a block; blocks may be nested. One that fails keeps it, for the words about its end."""
    _phases.append(name)
    tick()
    yield
    _phases.pop()
    tick()


def look() -> Progress:
    """Return the progress so far; counts what was read from and written to files since the last look."""
    global _bytes
    moved = _io_bytes()
    if moved - _bytes >= _LEAST_BYTES:
        tick()
    _bytes = moved
    return Progress(count=_ticks, phase=_phases[-1], step=_step)


def _io_bytes() -> int:
    """Return the bytes of all reads and writes of this process; 0 where the kernel does not count them."""
    with suppress(OSError, ValueError):
        counts = dict(line.split(": ") for line in _IO.read_text().splitlines())
        return sum(int(counts.get(name, 0)) for name in ("rchar", "wchar", "read_bytes"))
    return 0
