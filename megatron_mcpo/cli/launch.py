"""Start the ranks of a subcommand with torchrun in this process, and do a rank's work. Imports no torch.

Started by itself such a subcommand becomes torchrun for as many ranks as the layout needs; started by torchrun (or srun
torchrun) it is one of these ranks.
"""

import contextlib
import faulthandler
import logging
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from tempfile import TemporaryDirectory

import psutil

from megatron_mcpo import progress
from megatron_mcpo.cli.main import INTERRUPTED
from megatron_mcpo.cli.options import FAILED, REFUSED, refuse, say_why
from megatron_mcpo.config.config import ConfigError, RunError
from megatron_mcpo.distributed.preemption import GRACE_SECONDS, SIGNALS, die_with_parent

_ENDING = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""End the ranks where they are: nothing is saved."""

INTERRUPTED_CODES = tuple(128 + number for number in _ENDING)
"""What `launch` returns after one of these signals."""

_CRASHES = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)

_OPEN_FILES = 65536

_GLOO = "gloo/transport/tcp/pair.cc"
"""Is in the message of every error of gloo's connections."""

_LONGEST_END = 20.0
"""Seconds from such a signal until ranks that have not ended are killed: one that waits for another can't end."""


def started_ranks() -> int | None:
    """Return how many ranks torchrun started, of which this process is one; None if it did not start this process."""
    size = os.environ.get("WORLD_SIZE")
    return int(size) if size else None


def become_rank() -> None:
    """Let this rank end with its launcher, open enough files, and write its stack if native code crashes."""
    die_with_parent()
    faulthandler.enable()
    _allow_open_files()


def on_rank(work: Callable[[], None]) -> int:
    """Do a rank's work; return the exit code."""
    try:
        work()
    except ConfigError as error:
        return refuse(error)
    except (RunError, FloatingPointError) as error:  # the same one on every rank
        say_why(str(error))
        return FAILED
    except RuntimeError as error:
        if not _lost_a_rank(error):
            raise
        now = progress.look()
        say_why(f"{now.phase} of step {now.step}: another rank has ended; its own words or the launcher's say why")
        return FAILED
    return 0


def _lost_a_rank(error: BaseException | None) -> bool:
    """Return whether an error follows from another rank's end: its stack would bury the words of that one."""
    while error is not None and _GLOO not in str(error):
        error = error.__cause__ or error.__context__
    return error is not None


def launch(subcommand: str, arguments: Sequence[str], num_ranks: int) -> int:
    """Run torchrun in this process, with `mcpo subcommand arguments` as its ranks.

    Returns the exit code of the rank that failed first, which torchrun would hide.
    """
    _allow_open_files()
    # Ranks that share the cores must not each start a thread for every core.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_ranks)))
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # The rank that fails says why; the agent's account of it, and of the ranks it then ends, would bury that.
    logging.disable(logging.ERROR)
    options = [
        "--standalone",
        f"--nproc-per-node={num_ranks}",
        # A signal that torchrun doesn't handle ends it alone, and leaves the ranks behind.
        f"--signals-to-handle={','.join(number.name for number in (*SIGNALS, *_ENDING))}",
        f"--shutdown-timeout={GRACE_SECONDS}",
    ]
    try:
        with TemporaryDirectory(prefix="torchrun-") as folder, _killing_what_can_not_end():
            options += ["--log-dir", folder]  # that it makes anyway, and would leave behind
            torchrun.run(torchrun.parse_args([*options, "-m", "megatron_mcpo", subcommand, *arguments]))
    except ChildFailedError as error:
        rank, status = first_failure({rank: (each.timestamp, each.exitcode) for rank, each in error.failures.items()})
        code = status if status > 0 else 128 - status
        if code not in (REFUSED, INTERRUPTED):
            print(f"rank {rank} of {num_ranks} {_how(status)}", file=sys.stderr)
        return code
    except SignalException as error:
        return 128 + error.sigval
    return 0


def _allow_open_files() -> None:
    """Raise the soft limit of open files: every rank has connections to all others, and files of several libraries."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if 0 <= soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _kill_descendants() -> None:
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            process.kill()


def first_failure(failures: Mapping[int, tuple[int, int]]) -> tuple[int, int]:
    """Return rank and exit status of the failure that caused the others, from (second, exit status) of each rank.

    When a rank crashes, those that wait for it fail within the same second: the crash is the cause.
    """
    first = min(second for second, _ in failures.values())
    at_once = {rank: status for rank, (second, status) in failures.items() if second <= first + 1}
    return min(at_once.items(), key=lambda pair: (-pair[1] not in _CRASHES, pair[0]))


def _how(status: int) -> str:
    """Return how a rank ended, by its exit status; a signal's is negative."""
    if status >= 0:
        return f"failed with exit code {status}: see above"
    reason = ": usually by the kernel, because memory ran out" if status == -signal.SIGKILL else ": see above"
    return f"was ended by {signal.Signals(-status).name}{reason}"


@contextlib.contextmanager
def _killing_what_can_not_end() -> Iterator[None]:
    """Kill the descendants of this process that are left some seconds after a signal that ends the ranks.

    Signals are seen by a thread, because the main thread waits for the ranks.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def watch() -> None:
        while received := os.read(reading, 1):
            if received[0] in _ENDING:
                time.sleep(_LONGEST_END)
                _kill_descendants()

    threading.Thread(target=watch, daemon=True).start()
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)
