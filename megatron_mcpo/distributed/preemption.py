"""Making room when asked: a run that gets SIGTERM or SIGUSR1 ends its step, saves, and goes on when started again.

The signals are blocked in every rank, and looked at once a step. A handler alone would serve the rank, but not the
processes it starts: torchrun and Slurm signal those too, and a verifier or a checkpoint's writer would die at its work.
A process that a rank starts is therefore to be ended by closing its pipe or by SIGKILL, never by SIGTERM alone.
Imports no torch.
"""

import signal

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

GRACE_SECONDS = 1800
"""How long torchrun lets the ranks end their step and save; a rank that waits as long for another fails by itself."""

_handled: set[int] = set()


def hold_signals() -> None:
    """From here on the signals wait, in this process, its threads and the processes it starts."""
    # Handled too: to start its resource tracker, Python's multiprocessing unblocks SIGTERM.
    for number in SIGNALS:
        signal.signal(number, lambda number, _: _handled.add(number))
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def asked_to_stop() -> bool:
    """Whether one of the signals has come: once true, always true."""
    return not (signal.sigpending() | _handled).isdisjoint(SIGNALS)
