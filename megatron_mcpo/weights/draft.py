"""A folder that takes long to make: written beside its place, in parts that are made once, renamed when complete."""

import fcntl
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_mcpo.checkpoint_files import sync
from megatron_mcpo.config import ConfigError

JOURNAL = "parts.jsonl"


class Draft:
    """The folder `.NAME.partial` beside what is to become NAME.

    plan: JSON-able, what is made from what: a draft of something else is thrown away
    done: what `finish` was given for every part that is on disk already
    Raises ConfigError where NAME exists, can't be made, or is being made by another process.
    """

    def __init__(self, final: Path, plan: dict[str, Any]):
        self.final = final
        self.path = final.with_name(f".{final.name}.partial")
        if final.exists() or final.is_symlink():
            raise ConfigError([f"{final}: exists; give a folder that doesn't, or delete it"])
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._journal = (self.path / JOURNAL).open("a+", encoding="utf-8")
        except OSError as error:
            raise ConfigError([f"{final}: can't be written ({error.strerror}); give another folder"]) from error
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError([f"{final}: another process is writing it; wait for it, or end it"]) from None
        self.done: dict[str, Any] = {}
        plan = json.loads(json.dumps(plan))
        found = self._lines()
        if found and found[0] == plan:
            self.done = {line["part"]: line["record"] for line in found[1:] if self._is_whole(line["files"])}
            return
        for path in self.path.iterdir():
            if path.name != JOURNAL:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._journal.truncate(0)
        self._append(plan)

    def finish(self, part: str, files: Sequence[str], record: Any) -> None:
        """Note that a part is complete: its files are on disk when this returns, and stay if the process dies."""
        for name in files:
            sync(self.path / name, forget=True)
        sizes = {name: (self.path / name).stat().st_size for name in files}
        self._append({"part": part, "files": sizes, "record": record})
        self.done[part] = record

    def publish(self) -> None:
        """Give the folder its name."""
        for path in [path for path in self.path.rglob("*") if path.name != JOURNAL]:
            sync(path, forget=True)
        (self.path / JOURNAL).unlink()
        sync(self.path)
        self.path.rename(self.final)
        sync(self.final.parent)
        self._journal.close()

    def discard(self) -> None:
        """Throw everything away: what is in it is wrong."""
        shutil.rmtree(self.path)
        self._journal.close()

    def bytes(self) -> int:
        """What is there already."""
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())

    def _lines(self) -> list[Any]:
        """The journal without the half lines that a process which died may leave."""
        self._journal.seek(0)
        found = []
        for line in self._journal:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def _is_whole(self, files: dict[str, int]) -> bool:
        paths = {self.path / name: size for name, size in files.items()}
        return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())

    def _append(self, line: dict[str, Any]) -> None:
        self._journal.write("\n" * self._is_torn() + json.dumps(line) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def _is_torn(self) -> bool:
        """Whether the last line has no end."""
        path = self.path / JOURNAL
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size - 1))
            return file.read(1) not in (b"", b"\n")
