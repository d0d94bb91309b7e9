"""Notice that a run is preempted: after SIGTERM or SIGUSR1 it ends its step and saves, to be resumed by a restart.

The signals are blocked in every rank and looked at once per step. A handler alone would serve the rank, but not the
processes that it starts: torchrun and Slurm signal those, too, and a verifier would die while it works. A process that
a rank starts must therefore be ended by closing its pipe or by SIGKILL, never by SIGTERM alone.
Imports no torch.
"""

import ctypes
import os
import signal
import sys
from multiprocessing import resource_tracker

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

GRACE_SECONDS = 1800
"""How long torchrun lets the ranks end their step and save; a rank that waits that long for another fails."""

_handled: set[int] = set()
_PR_SET_PDEATHSIG = 1


def hold_signals() -> None:
    """Block the signals from now on in this process, its threads and the processes that it starts."""
    # Also handle them, and block them twice: Python's multiprocessing unblocks SIGTERM when it starts its resource
    # tracker, which it does once. A handler alone would not run while the main thread waits for another rank.
    for number in SIGNALS:
        signal.signal(number, lambda number, _: _handled.add(number))
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent ends, however that ends: nobody would wait for it any more.

    The parent is the thread that started this process; torchrun's main thread starts the ranks.
    """
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended just before
        sys.exit(128 + signal.SIGKILL)


def asked_to_stop() -> bool:
    """Return whether one of the signals has arrived; once true, always true."""
    return not (signal.sigpending() | _handled).isdisjoint(SIGNALS)
