"""Ranks of the whole program that can be stopped and killed one by one: every rank is a process of this one's.

This process keeps the store, as torchrun's agent does, and nobody restarts or ends the ranks.
"""

import importlib
import os
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
    log.write_text("")
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


PHASES: dict[str, tuple[str, str, int]] = {
    "start": ("megatron_mcpo.rollout.vllm_engine:VllmEngine", "__init__", 1),
    "rollout": ("megatron_mcpo.rollout.vllm_engine:VllmEngine", "generate", 5),
    "score": ("megatron_mcpo.rewards.scorer:Scorer", "score", 4),
    "update": ("megatron_mcpo.mcore.policy:Policy", "update", 2),
    "sync": ("megatron_mcpo.rollout.vllm_engine:VllmEngine", "update", 3),
    "save": ("megatron_mcpo.mcore.saving:Saving", "write", 2),
    "evaluate": ("megatron_mcpo.trainer.trainer", "evaluate", 2),
}
"""Where a phase of step 2 begins in a run with EVERY_STEP: owner, function, number of the call."""

EVERY_STEP = (
    *("--parallel.data", "2", "--run.steps", "3", "--run.checkpoint_every", "1", "--run.keep_every", "1"),
    *("--evaluation.every", "1", "--engine.engine_check_every", "3", "--run.collective_timeout", "24"),
)
"""Settings of a run that goes through all phases in every step."""


def at_phase(phase: str, fault: Fault, *, rank: int = 1, number: int | None = None) -> None:
    """Let a fault happen on one rank when a phase begins: that of step 2, or for the `number`-th time."""
    path, name, usual = PHASES[phase]
    at_call(path, name, fault, rank=rank, number=usual if number is None else number)


def at_call(path: str, name: str, fault: Fault, *, rank: int, number: int) -> None:
    """Let a fault happen as `in_call` does. path: "module" or "module:class" of the owner"""
    module, _, attribute = path.partition(":")
    owner = importlib.import_module(module)
    in_call(getattr(owner, attribute) if attribute else owner, name, fault, rank=rank, number=number)


def in_call(owner: Any, name: str, fault: Fault, *, rank: int, number: int) -> None:
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


def fill(folder: Path) -> None:
    """Write until the disk is full."""
    with (folder / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 12))


def fill_tmp(folder: Path) -> None:
    """Make a full disk the folder of temporary files."""
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    fill(folder)


def lower_file_limit(number: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, number))


def jump_clock(seconds: float) -> None:
    """Set this process's wall clock; other clocks go on."""
    honest = time.time
    time.time = lambda: honest() + seconds


def kill_verifiers() -> None:
    """Kill the processes that verify responses for this rank."""
    for process in psutil.Process().children():
        if "megatron_mcpo.rewards.worker" in process.cmdline():
            process.kill()


def poison_gradient() -> None:
    """Let the next look at the gradients find a NaN in them."""
    from megatron_mcpo.mcore.policy import Policy

    honest = Policy._gradients_finite

    def poisoned(policy: Policy) -> bool:
        policy.gradient_buffers[0].grad_data[0] = float("nan")
        Policy._gradients_finite = honest  # type: ignore[method-assign]
        return honest(policy)

    Policy._gradients_finite = poisoned  # type: ignore[method-assign, assignment]


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
