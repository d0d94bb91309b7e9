"""Run real ranks for checks and tests: every rank is a fork of this process, which has imported torch already."""

import faulthandler
import gc
import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_mcpo.distributed import parallel

GRACE_SECONDS = 12.0
STACK_SECONDS = 10.0
"""How long a rank that hung may take to write its stack on a busy machine."""


def run_ranks(num_ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 540) -> list[Any]:
    """Run `function(*args)` on `num_ranks` ranks with torchrun's environment; return their results in order of rank.

    Results are pickled, the function and its arguments are not (ranks are forks). This process must never have had a
    process group: Megatron-Core keeps some, and a fork that drops one waits forever for threads that it doesn't have.
    Groups that the function leaves are destroyed. When a rank fails, the others get a few seconds more; at the deadline
    all are killed.
    Raises RuntimeError with the traceback of every rank that failed and the stack of every rank that hung.
    """
    assert not dist.is_initialized(), "a process with a process group can't fork ranks; destroy it first"
    with tempfile.TemporaryDirectory(prefix="ranks-") as name, socket.create_server(("127.0.0.1", 0)) as server:
        folder = Path(name)
        pids = [_fork(rank, num_ranks, server, folder, function, args) for rank in range(num_ranks)]
        _wait(pids, timeout, folder)
        reports = [_report(folder, rank) for rank in range(num_ranks)]
    if any(failed for failed, _ in reports):
        problems = [f"rank {rank}: {value}" for rank, (failed, value) in enumerate(reports) if failed]
        raise RuntimeError("\n".join([f"{len(problems)} of {num_ranks} ranks failed", *problems]))
    return [value for _, value in reports]


def _fork(
    rank: int, num_ranks: int, server: socket.socket, folder: Path, function: Callable[..., Any], args: tuple
) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    port = server.getsockname()[1]
    try:
        # The parent's garbage may own threads; a fork that collects it waits for them forever.
        gc.freeze()
        # A fork creates torch's thread pool again at first use, and two of gloo's threads at once break it.
        torch.set_num_threads(torch.get_num_threads())
        # The ranks meet at a store that listens already: a free port might be taken before rank 0 binds it.
        if rank == 0:
            store = dist.TCPStore(
                "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=os.dup(server.fileno())
            )
            assert store.port == port
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(num_ranks),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            TORCHELASTIC_USE_AGENT_STORE="True",
            TORCHELASTIC_RESTART_COUNT="0",
        )
        stack = (folder / f"{rank}.stack").open("w")
        faulthandler.register(signal.SIGUSR2, file=stack, all_threads=True)
        _save(folder / f"{rank}.result", function(*args))
        parallel.destroy()
        code = 0
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
    finally:
        os._exit(code)


def _save(path: Path, value: Any) -> None:
    path.write_bytes(pickle.dumps(value))


def _wait(pids: list[int], timeout: float, folder: Path) -> None:
    """Wait until every rank has ended or was killed at the deadline, which a failed rank moves closer."""
    deadline, running = time.monotonic() + timeout, set(pids)
    while running and time.monotonic() < deadline:
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            running -= {ended}
            if ended and status:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        time.sleep(0.01)
    stacks = [folder / f"{pids.index(pid)}.stack" for pid in running]
    for pid in running:
        os.kill(pid, signal.SIGUSR2)
    deadline = time.monotonic() + STACK_SECONDS
    while not all(stack.exists() and stack.stat().st_size for stack in stacks) and time.monotonic() < deadline:
        time.sleep(0.05)
    if running:
        time.sleep(0.3)  # for the last lines of the stacks
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _report(folder: Path, rank: int) -> tuple[bool, Any]:
    """Return whether a rank failed, and its result or what is known of the failure."""
    error, stack, result = (folder / f"{rank}.{kind}" for kind in ("error", "stack", "result"))
    if error.exists():
        return True, error.read_text()
    if stack.exists() and stack.stat().st_size:
        return True, "hung and was killed at\n" + stack.read_text()
    if not result.exists():
        return True, "died without a traceback"
    return False, pickle.loads(result.read_bytes())  # noqa: S301 - written by our own fork
