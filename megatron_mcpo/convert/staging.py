"""A folder that takes long to make: written beside its place, in parts that are made once, renamed when complete.

Several processes may make parts of it, on machines that share a file system: one begins it, the others join.
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

_PLAN = "plan.json"
_PARTS = "parts"

log = logging.getLogger(__name__)


class StagingFolder:
    """The folder `.NAME.partial` beside what is to become NAME.

    Nobody can begin a staging that any process still holds, where the file system has locks. See `begin` and `join`,
    which make one.
    """

    def __init__(self, final: Path, plan: TextIO):
        self.final = final
        self.path = _place(final)
        self._plan = plan

    @classmethod
    def begin(cls, final: Path, plan: dict[str, Any]) -> Self:
        """Continue with what is there. plan: JSON-able, what is made from what; a folder with another plan is removed.

        Raises ConfigError where NAME exists, can't be made, or is being made by other processes.
        """
        if final.exists() or final.is_symlink():
            raise ConfigError([f"{final}: exists; give a folder that doesn't, or delete it"])
        try:
            (_place(final) / _PARTS).mkdir(parents=True, exist_ok=True)
            staging = cls(final, (_place(final) / _PLAN).open("a+", encoding="utf-8"))
        except OSError as error:
            raise ConfigError([f"{final}: can't be written ({error.strerror}); give another folder"]) from error
        staging._lock(fcntl.LOCK_EX)
        staging._plan.seek(0)
        text = json.dumps(plan)
        if staging._plan.read() != text:
            staging._plan.truncate(0)  # first: what is half thrown away must not look like this plan's
            for path in staging.path.iterdir():
                if path.name != _PLAN:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            (staging.path / _PARTS).mkdir()
            staging._plan.write(text)
            staging._plan.flush()
            os.fsync(staging._plan.fileno())
        staging._lock(fcntl.LOCK_SH)
        return staging

    @classmethod
    def join(cls, final: Path) -> Self:
        """The staging that another process has begun and still holds. Raises OSError where this one can't see it."""
        staging = cls(final, (_place(final) / _PLAN).open(encoding="utf-8"))
        staging._lock(fcntl.LOCK_SH)
        return staging

    def finish(self, part: str, files: Sequence[str], record: Any) -> None:
        """Note that a part is complete: its files are on disk when this returns, and stay if the process dies."""
        for name in files:
            sync(self.path / name, forget=True)
        sizes = {name: (self.path / name).stat().st_size for name in files}
        content = json.dumps({"files": sizes, "record": record})
        write_atomically(self.path / _PARTS / f"{part}.json", content.encode())

    def done(self) -> dict[str, Any]:
        """What `finish` was given for every part that is on disk."""
        found = {}
        for path in (self.path / _PARTS).glob("*.json"):
            part = json.loads(path.read_bytes())
            if all(self._size(name) == size for name, size in part["files"].items()):
                found[path.name.removesuffix(".json")] = part["record"]
        return found

    def names(self) -> list[str]:
        """The files that will be in the folder."""
        found = {path.name for path in self.path.iterdir()} - {_PLAN, _PARTS}
        return sorted(name for name in found if not name.endswith(".tmp"))  # a killed process may leave such

    def publish(self) -> None:
        """Give the folder its name."""
        for name in self.names():
            sync(self.path / name, forget=True)
        shutil.rmtree(self.path / _PARTS)
        (self.path / _PLAN).unlink()
        sync(self.path)
        self.path.rename(self.final)
        sync(self.final.parent)
        self.close()

    def discard(self) -> None:
        """Throw everything away: what is in it is wrong."""
        shutil.rmtree(self.path)
        self.close()

    def close(self) -> None:
        """Let others begin it."""
        self._plan.close()

    def bytes(self) -> int:
        """What is there already."""
        return sum(self._size(name) or 0 for name in self.names())

    def _size(self, name: str) -> int | None:
        path = self.path / name
        return path.stat().st_size if path.is_file() else None

    def _lock(self, kind: int) -> None:
        try:
            without = try_lock(self._plan.fileno(), kind)
        except BlockingIOError:
            self.close()
            raise ConfigError([f"{self.final}: another process is writing it; wait for it, or end it"]) from None
        if without and kind == fcntl.LOCK_EX:  # asked for once, by the one process that begins it
            log.warning("%s: this file system has no locks (%s); don't write it twice at a time", self.final, without)


def _place(final: Path) -> Path:
    return final.with_name(f".{final.name}.partial")
