"""Publish, verify and prune the files of checkpoints. Imports no torch.

A checkpoint is a folder step_NNNNNN. It has that name only once all of it is on disk; before, and while it is deleted,
it is called .step_NNNNNN.tmp, which is never read as one. Its manifest.json holds size and SHA-256 of every other file:

  {"files": {"state.json": {"bytes": 812, "sha256": "9f86..."}, ...}}
"""

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from io import BufferedReader
from pathlib import Path

from megatron_mcpo.config.config import Config
from megatron_mcpo.storage.files import step_files, write_atomically

MANIFEST, STATE = "manifest.json", "state.json"
_READERS = 2
"""Files that a process hashes at once: a core hashes more slowly than a disk reads."""


@dataclass(frozen=True)
class Fingerprint:
    """Size and digest of a file."""

    bytes: int
    sha256: str


def init_from_problems(config: Config) -> list[str]:
    """Return a line where model.init_from is no checkpoint; its contents are checked when it is loaded."""
    path = config.model.init_from
    if path is None or (Path(path) / STATE).is_file():
        return []
    return [
        f"model.init_from = {path!r}: must be a checkpoint of this trainer (there is no {Path(path) / STATE}). Name a "
        "folder RUN/checkpoints/step_NNNNNN, or set model.path to a model in Hugging Face's format."
    ]


def staging_of(path: Path) -> Path:
    """Return the path of a checkpoint that is not complete."""
    return path.with_name(f".{path.name}.tmp")


def remove_staging_folders(folder: Path) -> None:
    """Delete checkpoints that killed runs have left incomplete or partly deleted."""
    for leftover in folder.glob(".step_*.tmp"):
        shutil.rmtree(leftover)


def names(folder: Path) -> list[str]:
    """Return all entries of a checkpoint except its manifest, largest first: every n-th is a fair share of bytes."""
    found = [path for path in folder.iterdir() if path.name != MANIFEST]
    return [path.name for path in sorted(found, key=lambda path: (-path.lstat().st_size, path.name))]


def measure(folder: Path, files: Collection[str]) -> dict[str, Fingerprint]:
    """Read the files; return size and digest of each. Raises OSError, also for what is not a regular file."""
    found = {}
    for name in files:
        with _open_regular(folder / name) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            found[name] = Fingerprint(bytes=file.tell(), sha256=digest)
    return found


def publish(staging: Path, final: Path, measured: Mapping[str, Fingerprint]) -> None:
    """Add the manifest, flush everything to disk, and only then give the checkpoint its name."""
    write_manifest(staging, measured)
    for path in [*staging.iterdir(), staging]:
        sync(path)
    replaced = _unname(final) if final.exists() else None
    staging.rename(final)
    sync(final.parent)
    if replaced:
        shutil.rmtree(replaced)


def write_manifest(folder: Path, measured: Mapping[str, Fingerprint]) -> None:
    """Write size and digest of every file to the manifest."""
    table = {name: asdict(measured[name]) for name in sorted(measured)}
    write_atomically(folder / MANIFEST, json.dumps({"files": table}, indent=1).encode())


def problems(folder: Path, *, part: int, num_parts: int) -> list[str]:
    """Return what is wrong with the files of a checkpoint; empty where all are as they were written.

    Every caller checks the manifest and the list of files; the contents are divided: part n of `num_parts` reads every
    n-th file. The files are not interpreted.
    """
    try:
        expected = _read_manifest(folder / MANIFEST)
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (OSError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        return [f"{MANIFEST} can't be read as a manifest ({type(error).__name__})"]
    present = names(folder)
    missing = sorted(expected.keys() - set(present))
    found = [f"{name} is missing" for name in missing]
    found += [f"{name} is not in {MANIFEST}" for name in sorted(set(present) - expected.keys())]
    own = [name for name in present if name in expected][part::num_parts]
    with ThreadPoolExecutor(_READERS) as pool:
        for problems_of_one in pool.map(lambda name: _content_problems(folder, name, expected[name]), own):
            found += problems_of_one
    return found


def prune(folder: Path, *, newest: int, keep: int, keep_every: int) -> list[str]:
    """Delete all checkpoints except the last `keep` and those of every `keep_every`-th step (0: none of them).

    Links, as to a checkpoint that was moved to another disk, and what is no folder are left alone. Returns a warning
    for each checkpoint that could not be deleted; the next save tries again.

    newest: step of the one just written, which is never deleted. Later ones are damaged ones that the run
    skipped when it resumed; they are deleted too.
    """
    own = [(step, path) for step, path in step_files(folder) if path.is_dir() and not path.is_symlink()]
    steps = [step for step, _ in own if step <= newest]
    kept = {newest, *steps[-keep:]} | {step for step in steps if keep_every and step % keep_every == 0}
    warnings = []
    for step, path in own:
        if step in kept:
            continue
        gone = path
        try:
            gone = _unname(path)
            shutil.rmtree(gone)
        except OSError as error:
            warnings.append(f"WARNING: {gone}: can't be deleted ({error.strerror or error}); it takes room until it is")
    return warnings


def _unname(path: Path) -> Path:
    """Rename a checkpoint, so that a partly deleted one never has its name; return the new path."""
    gone = staging_of(path).with_suffix(".old.tmp")
    shutil.rmtree(gone, ignore_errors=True)
    return path.rename(gone)


def _read_manifest(path: Path) -> dict[str, Fingerprint]:
    """Read a manifest.

    Raises OSError, KeyError, ValueError, TypeError, AttributeError or RecursionError for what is not one.
    """
    with _open_regular(path) as file:
        files = json.load(file)["files"]
    found = {name: Fingerprint(**entry) for name, entry in files.items()}
    if not all(type(each.bytes) is int and type(each.sha256) is str for each in found.values()):
        raise TypeError
    return found


def _open_regular(path: Path) -> BufferedReader:
    """Open a file. Raises OSError for links, which lead elsewhere, and for pipes and the like, which may never end."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return path.open("rb")


def _content_problems(folder: Path, name: str, expected: Fingerprint) -> list[str]:
    try:
        found = measure(folder, [name])[name]
    except OSError as error:
        return [f"{name} can't be read ({error.strerror})"]
    if found.bytes != expected.bytes:
        return [f"{name} has {found.bytes} bytes, {MANIFEST} says {expected.bytes}"]
    if found.sha256 != expected.sha256:
        return [
            f"{name} is not as it was written (SHA-256 {found.sha256[:12]}, {MANIFEST} says {expected.sha256[:12]})"
        ]
    return []


def sync(path: Path, *, forget: bool = False) -> None:
    """Flush a file or folder to disk. forget: drop a file's pages from memory too, so that reads come from the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if forget and path.is_file():
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
