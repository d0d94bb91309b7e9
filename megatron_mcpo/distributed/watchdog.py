"""Watch a job from a thread of every rank, and end it when it hangs.

Every rank writes a beat (see liveness.py) to the job's store every few seconds and reads one key, the judge's. Rank 0
judges; if its key stands still, the next rank does. A connection of its own keeps a blocked rank from blocking it.
"""

import faulthandler
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from socket import gethostname
from typing import Any, NoReturn

import torch.distributed as dist

from megatron_mcpo import progress
from megatron_mcpo.distributed.liveness import ENDED, Beat, End, Judge
from megatron_mcpo.distributed.preemption import asked_to_stop

FAILED = 1

_BEAT_SECONDS = 5.0
_SILENCE_SECONDS = 30.0

_STORE_SECONDS = 20.0
_KILL_SECONDS = 2.0
_JUDGE = "judge"
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@contextmanager
def watching(limit: float) -> Iterator[None]:
    """Watch the job while a block runs; the ranks meet at the store that torchrun's environment names.

    limit: seconds after which a job without progress ends; a small one makes beats and judgements more frequent, too
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    watchdog = _Watchdog(_store(rank, patience=limit), rank, world_size, limit)
    watchdog.start()
    try:
        yield
    finally:
        watchdog.stop()
    watchdog.say_done()  # a rank that failed is silent from now on: if it can't end, the others won't wait for long


def _store(rank: int, *, patience: float) -> dist.Store:
    """Return this rank's connection to the job's store. patience: seconds to wait for the store to be there"""
    if "RANK" not in os.environ:
        return dist.HashStore()
    tcp = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        # As torch.distributed does: torchrun's agent keeps the store, else rank 0, which shares it with itself.
        is_master=rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        wait_for_workers=False,
        multi_tenant=True,
        timeout=timedelta(seconds=max(patience, _STORE_SECONDS)),
    )
    tcp.set_timeout(timedelta(seconds=_STORE_SECONDS))
    return dist.PrefixStore(f"watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", tcp)


class _Watchdog(threading.Thread):
    """The thread of one rank."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, limit: float):
        super().__init__(name="watchdog", daemon=True)
        self._store = store
        self._rank = rank
        self._keys = [f"beat/{each}" for each in range(world_size)]
        self._limit = limit
        self._interval = min(_BEAT_SECONDS, limit / 8)
        self._silence = min(_SILENCE_SECONDS, limit / 2)
        self._identity: dict[str, Any] = {
            "host": gethostname(),
            "machine": _BOOT.read_text().strip() + os.readlink("/proc/self/ns/pid"),
            "pid": os.getpid(),
            "born": _born(os.getpid()),
        }
        self._ending = threading.Event()
        self._judge: Judge | None = None
        self._number = 0
        self._clock = 0.0
        self._said = b""
        self._said_at = 0.0

    def run(self) -> None:
        before, answered = time.monotonic(), 0.0
        while not self._ending.is_set():
            # A clock that stands still while this process does: others can't be blamed for that time.
            self._clock += min(time.monotonic() - before, self._silence / 2)
            before = time.monotonic()
            with suppress(RuntimeError):  # all errors of a store are
                self._turn(progress.look())
                answered = self._clock
            self._ending.wait(self._interval)
            if self._clock - answered >= self._limit:
                _say([f"the store of the job has not answered for {self._clock - answered:.0f} s: this rank ends"])
                self._end(End(lines=[], stacks=[], kill={}))

    def stop(self) -> None:
        """End the thread."""
        self._ending.set()
        self.join()

    def say_done(self) -> None:
        """Say that this rank has done its work."""
        with suppress(RuntimeError):  # without the store the others have ended
            self._beat(progress.Progress(count=0, phase=ENDED, step=0))

    def _turn(self, now: progress.Progress) -> None:
        """Write the beat, read what the judge says, and judge where it is this rank's turn."""
        self._beat(now)
        self._store.compare_set(_JUDGE, "", "{}")
        said = self._store.get(_JUDGE)
        if said != self._said:
            self._said, self._said_at = said, self._clock
        words = json.loads(said)
        if words.get("end"):
            self._end(End.decode(words["end"]))
        is_silent = self._clock - self._said_at >= self._silence + 2 * self._interval * self._rank
        if self._rank == 0 or words.get("rank") == self._rank or is_silent:
            self._judge_all()
        else:
            self._judge = None

    def _judge_all(self) -> None:
        if self._judge is None:
            self._judge = Judge(limit=self._limit, silence=self._silence, rank=self._rank, since=self._said_at)
            for key in self._keys:
                self._store.compare_set(key, "", "-")
        beats = [Beat.decode(text) for text in self._store.multi_get(self._keys)]
        lines, end = self._judge.look(self._clock, beats)
        _say(lines)
        words = {"rank": self._rank, "number": self._number, "end": end.encode() if end else None}
        self._store.set(_JUDGE, json.dumps(words))
        if end is not None:
            _say(end.lines)
            time.sleep(2 * self._interval)  # the store may be this process's: let the others read it
            self._end(end)

    def _beat(self, now: progress.Progress) -> None:
        self._number += 1
        beat = Beat(number=self._number, **asdict(now), **self._identity, stopping=asked_to_stop())
        self._store.set(self._keys[self._rank], beat.encode())

    def _end(self, end: End) -> NoReturn:
        """End this process, and for the judge the silent ones of its host."""
        if self._rank in end.stacks:
            _say([f"rank {self._rank}: what its threads do, the last call first", *_stacks()])
        if pids := [pid for pid, born in end.kill.get(self._rank, ()) if _born(pid) == born]:
            # Later than this process, so that torchrun sees a rank that failed, not one that was killed.
            command = f"sleep {_KILL_SECONDS:g}; kill -KILL {' '.join(map(str, pids))}"
            subprocess.Popen(["/bin/sh", "-c", command], start_new_session=True, stderr=subprocess.DEVNULL)
        sys.stdout.flush()
        os._exit(FAILED)


def _born(pid: int) -> int | None:
    """Return when a process was started, in the kernel's ticks since boot; None where there is no such process."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except FileNotFoundError:
        return None


def _say(lines: Sequence[str]) -> None:
    """Print lines at once, so that those of other ranks don't come in between."""
    if lines:
        with suppress(OSError):
            os.write(sys.stderr.fileno(), "".join(f"WATCHDOG: {line}\n" for line in lines).encode())


def _stacks() -> list[str]:
    """Return the stacks of the other threads of this process."""
    with open(os.memfd_create("stacks"), "w+b") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        stacks = file.read().decode(errors="replace").split("\n\n")
    return [line for stack in stacks if not stack.startswith("Current thread") for line in stack.splitlines()]
