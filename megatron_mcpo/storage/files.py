"""Read and write files so that a reader never sees half of one, also after a crash. Imports no torch."""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def step_file(folder: Path, kind: str, step: int, suffix: str) -> Path:
    """The file of one step, for example rollouts/step_000012.jsonl."""
    return folder / kind / f"step_{step:06d}{suffix}"


def step_files(folder: Path) -> list[tuple[int, Path]]:
    """(step, file) of every step_NNNNNN.* in a folder, ascending; empty where there is no such folder."""
    found = [(path.stem.removeprefix("step_"), path) for path in folder.glob("step_*")]
    return sorted((int(number), path) for number, path in found if number.isdecimal())


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of lines with a step; lines that are not whole are left out; empty without the file."""
    return list(iterate_jsonl(path))


def iterate_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """What `read_jsonl` returns, one after the other."""
    try:
        with path.open("rb") as lines:
            yield from (row for _, row in whole_lines(lines))
    except FileNotFoundError:
        return


def whole_lines(lines: Iterable[bytes]) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Lines that are objects with a step, without the newline, and what they say."""
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield line.rstrip(b"\n"), row


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file by one that is complete on disk: a reader sees the old or the new, whenever we are killed."""
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
    """Lock an open file, or turn its lock into another kind (of fcntl's), without waiting.

    Returns why it is not locked where the file system has no locks: to go on is then better than to refuse all work.
    Raises BlockingIOError when another process holds it.
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
