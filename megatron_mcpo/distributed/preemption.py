"""Notice that a run is preempted: after SIGTERM or SIGUSR1 it ends its step and saves, to be resumed by a restart.

The signals are blocked in every rank and looked at once per step. A handler alone would serve the rank, but not the
processes that it starts: torchrun and Slurm signal those, too, and a verifier would die while it works. A process that
a rank starts must therefore be ended by closing its pipe or by SIGKILL, never by SIGTERM alone.
Imports no torch.
"""

import signal

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

GRACE_SECONDS = 1800
"""How long torchrun lets the ranks end their step and save; a rank that waits that long for another fails."""

_handled: set[int] = set()


def hold_signals() -> None:
    """Block the signals from now on in this process, its threads and the processes that it starts."""
    # Also handle them: Python's multiprocessing unblocks SIGTERM when it starts its resource tracker.
    for number in SIGNALS:
        signal.signal(number, lambda number, _: _handled.add(number))
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def asked_to_stop() -> bool:
    """Return whether one of the signals has arrived; once true, always true."""
    return not (signal.sigpending() | _handled).isdisjoint(SIGNALS)
