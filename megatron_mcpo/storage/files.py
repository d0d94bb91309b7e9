"""Read and write files so that a reader never sees half of one, even after a crash. Imports no torch.

`try_lock` is flock itself: filelock, which run_lock.py uses, has no shared lock and can't turn an exclusive lock into a
shared one without letting go of it.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def step_file(folder: Path, kind: str, step: int, suffix: str) -> Path:
    """Return the path of one step's file, for example rollouts/step_000012.jsonl."""
    return folder / kind / f"step_{step:06d}{suffix}"


def step_files(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, file) of every step_NNNNNN.* in a folder, ascending; empty where the folder is missing."""
    found = [(path.stem.removeprefix("step_"), path) for path in folder.glob("step_*")]
    return sorted((int(number), path) for number, path in found if number.isdecimal())


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of lines with a step; skip incomplete lines; empty where the file is missing."""
    return list(iterate_jsonl(path))


def iterate_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield what `read_jsonl` returns, one by one."""
    try:
        with path.open("rb") as lines:
            yield from (row for _, row in whole_lines(lines))
    except FileNotFoundError:
        return


def whole_lines(lines: Iterable[bytes]) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield the lines that are objects with a step, without the newline, and those objects."""
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield line.rstrip(b"\n"), row


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file by one that is complete on disk: a reader sees the old or the new one, whenever we are killed."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def try_lock(file: int, kind: int) -> str | None:
    """Lock an open file, or convert its lock to another kind (LOCK_EX, LOCK_SH), without waiting.

    Return why it is not locked where the file system has no locks, since working without one is better than not at
    all; None where it is locked. Raises BlockingIOError when another process holds it.
    """
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except PermissionError as error:  # how some network file systems say so
        raise BlockingIOError(error.errno, error.strerror) from error
    except OSError as error:
        return error.strerror or type(error).__name__
    return None
