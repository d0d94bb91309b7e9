"""Run a command with a time limit that holds, whatever the command leaves behind."""

import contextlib
import ctypes
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import psutil

from benchmarks.measure import ROOT

_PR_SET_CHILD_SUBREAPER = 36
"""Of linux/prctl.h: orphans among a process's descendants become its children, also those in sessions of their own."""
_KILL_SECONDS = 5.0
"""How long to wait for killed processes: one that hangs in the driver may never end."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What a command did. exit_code: None if it was killed after its time limit; output, errors: what it wrote"""

    exit_code: int | None
    output: str
    errors: str
    seconds: float


def run_limited(command: Sequence[str], seconds: float) -> Finished:
    """Run a command in the project's root, kill it after `seconds`, and kill what it started and left at its end.

    A rank or server that outlived it would hold the GPU's memory. It writes to files: at the end of a pipe we would
    wait for every process that has inherited it.
    """
    start = time.monotonic()
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors, _killing_what_is_left():
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=errors)
        exit_code: int | None = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            exit_code = process.wait(seconds)
        taken = time.monotonic() - start
        if exit_code is None:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_KILL_SECONDS)
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return Finished(exit_code=exit_code, output=texts[0], errors=texts[1], seconds=taken)


@contextlib.contextmanager
def _killing_what_is_left() -> Iterator[None]:
    """Kill all descendants of this process at the end that it did not have at the beginning."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    others = set(psutil.Process().children(recursive=True))
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        _kill_all_but(others)
        prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _kill_all_but(others: set[psutil.Process]) -> None:
    """Kill our descendants, again and again: what one has started meanwhile becomes our child when it is killed."""
    deadline = time.monotonic() + _KILL_SECONDS
    while (left := _descendants(others)) and time.monotonic() < deadline:
        for each in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(left, timeout=0.5)


def _descendants(others: set[psutil.Process]) -> list[psutil.Process]:
    return [each for each in psutil.Process().children(recursive=True) if each not in others]
