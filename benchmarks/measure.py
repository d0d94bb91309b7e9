"""Seconds and memory of a piece of work."""

import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def memory(field: str) -> int:
    """Bytes that this process holds (VmRSS), or has held at the highest (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def forget_peak() -> None:
    """From here on VmHWM is the peak of what follows."""
    Path("/proc/self/clear_refs").write_text("5")
