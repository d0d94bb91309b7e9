"""Write a folder beside its final place, in parts that survive an interruption, and rename it when it is complete.

Several processes may write parts of it, on machines that share a file system: one begins it, the others join.
"""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, TextIO

from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.storage.checkpoint_files import sync
from megatron_mcpo.storage.files import try_lock, write_atomically

_JOB = "job.json"
_PARTS = "parts"

log = logging.getLogger(__name__)


class StagingFolder:
    """The folder `.NAME.partial` beside what is to become NAME.

    Made by `begin` or `join`. Where the file system has locks, no process can begin one that another still holds.
    """

    def __init__(self, final: Path, job: TextIO):
        self.final = final
        self.path = _place(final)
        self._job = job

    @classmethod
    def begin(cls, final: Path, job: dict[str, Any]) -> Self:
        """Create the staging folder, or continue the one that an interrupted call left behind.

        Args:
            final: The folder to be written.
            job: JSON-able: what is made from what. What an interrupted call for another job left is deleted.

        Raises:
            ConfigError: The folder exists, can't be written, or is being written by other processes.
        """
        if final.exists() or final.is_symlink():
            raise ConfigError([f"{final}: must not exist; give another folder, or delete it"])
        for path in (_place(final), _place(final) / _PARTS, _place(final) / _JOB):
            if path.is_symlink():  # what lies behind it would be deleted or overwritten
                raise ConfigError([f"{path}: must not be a link; delete it, or give another folder than {final}"])
        try:
            (_place(final) / _PARTS).mkdir(parents=True, exist_ok=True)
            staging = cls(final, (_place(final) / _JOB).open("a+", encoding="utf-8"))
        except OSError as error:
            raise ConfigError([f"{final}: can't be written ({error.strerror}); give another folder"]) from error
        staging._lock(fcntl.LOCK_EX)
        staging._job.seek(0)
        text = json.dumps(job)
        if staging._job.read() != text:
            staging._job.truncate(0)  # first: a folder that is partly deleted must not look like one of this job
            for path in staging.path.iterdir():
                if path.name != _JOB:
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            (staging.path / _PARTS).mkdir()
            staging._job.write(text)
            staging._job.flush()
            os.fsync(staging._job.fileno())
        staging._lock(fcntl.LOCK_SH)
        return staging

    @classmethod
    def join(cls, final: Path) -> Self:
        """Join the staging folder that another process has begun. Raises OSError if it can't be seen from here."""
        staging = cls(final, (_place(final) / _JOB).open(encoding="utf-8"))
        staging._lock(fcntl.LOCK_SH)
        return staging

    def finish(self, part: str, files: Sequence[str], record: Any) -> None:
        """Record that a part is complete. Its files are on disk when this returns, and stay if the process dies."""
        for name in files:
            sync(self.path / name, forget=True)
        sizes = {name: (self.path / name).stat().st_size for name in files}
        content = json.dumps({"files": sizes, "record": record})
        write_atomically(self.path / _PARTS / f"{part}.json", content.encode())

    def done(self) -> dict[str, Any]:
        """Return the records that `finish` was given, by part, of all parts whose files are on disk."""
        found = {}
        for path in (self.path / _PARTS).glob("*.json"):
            part = json.loads(path.read_bytes())
            if all(self._size(name) == size for name, size in part["files"].items()):
                found[path.name.removesuffix(".json")] = part["record"]
        return found

    def names(self) -> list[str]:
        """Return the names of the files that the finished folder will hold."""
        found = {path.name for path in self.path.iterdir()} - {_JOB, _PARTS}
        return sorted(name for name in found if not name.endswith(".tmp"))  # a killed process may leave these behind

    def publish(self) -> None:
        """Move the folder to its final place."""
        for name in self.names():
            sync(self.path / name, forget=True)
        shutil.rmtree(self.path / _PARTS)
        (self.path / _JOB).unlink()
        sync(self.path)
        self.path.rename(self.final)
        sync(self.final.parent)
        self.close()

    def discard(self) -> None:
        """Delete the folder, because its content is wrong."""
        shutil.rmtree(self.path)
        self.close()

    def close(self) -> None:
        """Release the lock, so that another process can begin."""
        self._job.close()

    def bytes(self) -> int:
        """Return the bytes of all files that are there already."""
        return sum(self._size(name) or 0 for name in self.names())

    def _size(self, name: str) -> int | None:
        path = self.path / name
        return path.stat().st_size if path.is_file() else None

    def _lock(self, kind: int) -> None:
        try:
            without = try_lock(self._job.fileno(), kind)
        except BlockingIOError:
            self.close()
            fix = "wait until it is done, or stop it"
            raise ConfigError([f"{self.final}: another process is writing it; {fix}"]) from None
        if without and kind == fcntl.LOCK_EX:  # warn once, in the process that begins
            log.warning(
                "%s: this file system has no locks (%s); let one command write it at a time", self.final, without
            )


def _place(final: Path) -> Path:
    return final.with_name(f".{final.name}.partial")
