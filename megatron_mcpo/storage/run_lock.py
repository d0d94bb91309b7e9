"""Lock a run folder, so that one process at a time writes there. Imports no torch.

filelock holds the lock: the kernel releases it when this process ends, however it ends, and forked workers do not keep
it. Ours are the owner's name in the file and the rule that a file system without locks is a warning.
"""

import errno
import logging
import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout

from megatron_mcpo.config.config import ConfigError

_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL})
"""How file systems say that they have no locks."""

log = logging.getLogger(__name__)


class RunLock:
    """The lock of a run folder, held by this process until `close` or its end."""

    def __init__(self, folder: Path):
        """Lock the folder. Raises ConfigError where another process holds it, OSError where it can't be written."""
        path = folder / ".lock"
        self._lock = FileLock(
            path, blocking=False, thread_local=False, fallback_to_soft=False, on_acquired=_write_owner
        )
        try:
            self._lock.acquire()
        except Timeout:
            owner = path.read_bytes()[:200].decode(errors="replace") or "unknown"
            raise ConfigError(
                [
                    f"run.name: {folder} is in use by another process ({owner}); stop it or wait for it, "
                    "or start a second run with --run.resume never or another --run.name"
                ]
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            log.warning("%s: this file system has no locks (%s); don't start a run twice", folder, error.strerror)

    def close(self) -> None:
        """Release the lock; do nothing where that was done before."""
        self._lock.release()


def _write_owner(descriptor: int) -> None:
    """Write who holds the lock, for the message of a process that is refused."""
    os.truncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
