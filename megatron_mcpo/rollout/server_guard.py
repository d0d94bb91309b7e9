"""End what a dead server leaves behind: `python -m megatron_mcpo.rollout.server_guard PID`, as a child of the server.

vLLM's engine and workers (0.30.0) outlive an API server that is killed, hold their memory and GPUs, and keep computing.
"""

import os
import signal
import sys
import time
from collections.abc import Sequence

import psutil

_LOOK_SECONDS = 2.0
_GRACE_SECONDS = 10.0
"""A server that was asked to end has ended them itself by then."""


def main(arguments: Sequence[str]) -> None:
    """Wait until the server has ended, then kill those of its processes that have not."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # which the server's group gets: it ends by itself
        signal.signal(number, signal.SIG_IGN)
    server = psutil.Process(int(arguments[0]))
    family: list[psutil.Process] = []
    while os.getppid() == server.pid:
        try:
            family = [process for process in server.children(recursive=True) if process.pid != os.getpid()]
        except psutil.NoSuchProcess:
            break
        time.sleep(_LOOK_SECONDS)
    _, alive = psutil.wait_procs(family, timeout=_GRACE_SECONDS)
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


if __name__ == "__main__":
    main(sys.argv[1:])
