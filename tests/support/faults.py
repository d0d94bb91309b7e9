"""Ranks of the whole program that can be stopped and killed one by one: every rank is a process of this one's.

This process keeps the store, as torchrun's agent does, and nobody restarts or ends the ranks.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist

from tests.support.paths import ROOT
from tests.support.vllm_cases import _SERVER

type Fault = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Running ranks. log: what all of them print"""

    processes: list[Any]
    log: Path

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait_for(self, text: str, *, timeout: float) -> None:
        """Wait until a rank has printed the text."""
        deadline = time.monotonic() + timeout
        while text not in self.output:
            assert time.monotonic() < deadline, f"{text!r} is not in\n{self.output}"
            time.sleep(0.05)

    def codes(self, *, timeout: float) -> list[int | None]:
        """Wait for all ranks; return their exit codes, None for one that is still running."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0.0))
        return [process.exitcode for process in self.processes]


@contextmanager
def running(
    arguments: list[str], *, ranks: int, log: Path, prepare: Callable[[], None] | None = None
) -> Iterator[Ranks]:
    """Start `mcpo arguments` on ranks; what is left of them in the end is killed.

    prepare: called first on every rank
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes: list[Any] = [
        _SERVER.Process(target=_main, args=(rank, ranks, store.port, arguments, log, prepare)) for rank in range(ranks)
    ]
    log.touch()
    for process in processes:
        process.start()
    family = [psutil.Process(process.pid) for process in processes]
    try:
        yield Ranks(processes=processes, log=log)
    finally:
        for process in processes:
            process.kill()
            process.join()
        psutil.wait_procs(family, timeout=10)


def in_call(owner: Any, name: str, fault: Fault, *, rank: int, number: int = 1) -> None:
    """Let a fault happen on one rank when it calls a function of a module or class for the `number`-th time."""
    honest: Callable[..., Any] = getattr(owner, name)
    calls = []

    def called(*args: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == number and os.environ["RANK"] == str(rank):
            fault()
        return honest(*args, **named)

    setattr(owner, name, called)


def signal_self(number: int) -> None:
    os.kill(os.getpid(), number)


def _main(
    rank: int, ranks: int, port: int, arguments: list[str], log: Path, prepare: Callable[[], None] | None
) -> None:
    from megatron_mcpo.cli.main import main

    os.chdir(ROOT)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    code = 1
    try:
        if prepare is not None:
            prepare()
        code = main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
