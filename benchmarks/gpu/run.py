"""Check on one GPU what a CPU can't show: numbers against bands, speed and memory, weight syncs to vLLM, training.

`tools/gpu_check.sh [--rows NAME ...] [--list] [--seconds N] [--resume FILE] [--out FOLDER] [--rehearse]` (one GPU)
Every row is a process of its own. After each one the figures are written to FOLDER/gpu-DEVICE.json, and the measured
rates to FOLDER/rates-DEVICE.json, which `mcpo plan --gpu` takes; a table is printed at the end. Exit code 1: a figure
lies outside its band, or a row crashed; a target that is missed is only said. A row whose modules are missing or too
old, or for which no time is left, is skipped with the reason. --rehearse runs the rows on a CPU with small models: it
shows that they run, and nothing about a GPU.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from benchmarks.gpu.outcome import Row
from benchmarks.gpu.process import run_limited
from benchmarks.gpu.rows import ROWS
from benchmarks.measure import ROOT
from megatron_mcpo.distributed.device import uses_gpu, why_no_gpu
from megatron_mcpo.storage.files import write_atomically

SECONDS = 60 * 60
"""The time limit of all rows together, unless --seconds says otherwise."""
_DONE = ("passed", "failed")
"""States of a row that --resume does not run again."""
_KEPT_LOG = 4000
"""How many characters of a failed row's standard error are kept in the file."""
_REHEARSAL = "rehearsal on a CPU"
"""The name of the device in the files of a rehearsal."""


def check(row: Row, command: Sequence[str], *, seconds_left: float = SECONDS) -> dict[str, Any]:
    """Run a row's command, which prints an outcome as a line; return state, reason, figures and log."""
    missing = [module for module in row.needs if importlib.util.find_spec(module) is None]
    if missing:
        return {"state": "skipped", "why": f"{', '.join(missing)} not installed"}
    if too_old := [old for package, oldest in row.oldest if (old := _older(package, oldest))]:
        return {"state": "skipped", "why": "; ".join(too_old)}
    if seconds_left < 1:
        return {"state": "skipped", "why": "the previous rows took all the time; run it with --rows or --resume"}
    limit = min(row.seconds, int(seconds_left))
    finished = run_limited(command, limit)
    outcome = _outcome(finished.output)
    found = dict(outcome or {})
    failures, skipped = found.pop("failures", []), found.pop("skipped", "")
    found = {"row_seconds": round(finished.seconds, 1), **found}
    log = {"log": finished.errors[-_KEPT_LOG:]}
    if finished.exit_code is None and limit < row.seconds:  # it has not had its time: --resume runs it again
        return {"state": "skipped", "why": f"takes more than the {limit} s that were left", **found, **log}
    if finished.exit_code is None:
        end = f"took more than {limit} s" + (", though it has printed what it found" if outcome else "")
        return {"state": "failed", "why": "; ".join([*failures, end]), **found, **log}
    if finished.exit_code or outcome is None:
        last = (finished.errors.strip().splitlines() or ["no outcome"])[-1]
        end = f"exit code {finished.exit_code}: {last[:300]}"
        return {"state": "failed", "why": "; ".join([*failures, end]), **found, **log}
    state = "skipped" if skipped else "failed" if failures else "passed"
    return {"state": state, "why": skipped or "; ".join(failures), **found}


def _older(package: str, oldest: str) -> str:
    """Return a line if the installed version of a package is older than `oldest`."""
    for name in (package, f"{package}-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found = importlib.metadata.version(name)
            return f"needs {package} {oldest}, this is {found}" if Version(found) < Version(oldest) else ""
    return f"{package} not installed"


def _outcome(output: str) -> dict[str, Any] | None:
    """Return the last line that is an outcome: libraries write to standard output, too, even at exit."""
    for line in reversed(output.splitlines()):
        with contextlib.suppress(json.JSONDecodeError):
            found = json.loads(line)
            if isinstance(found, dict) and "failures" in found:
                return found
    return None


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = [f"{'row':20} {'state':8} what was found"]
    for name, result in results.items():
        found = {**result.get("figures", {}), **{band: value[0] for band, value in result.get("bands", {}).items()}}
        said = [result["why"]] if result["why"] else []
        said += [f"{key} {value[0]:.4g} ({value[1]})" for key, value in result.get("targets", {}).items()]
        said += [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in found.items()]
        lines.append(f"{name:20} {result['state']:8} {', '.join(said)}")
    counts = {state: sum(each["state"] == state for each in results.values()) for state in ("passed", "failed")}
    skipped = len(results) - sum(counts.values())
    return "\n".join([*lines, f"{counts['passed']} passed, {counts['failed']} failed, {skipped} skipped"])


def read(file: Path, device: str) -> dict[str, dict[str, Any]]:
    """Return the rows that a file of this device has done. Raises ValueError for a file of something else."""
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("device") != device:
        raise ValueError(f"--resume = {str(file)!r}: must be what a check of this {device} wrote. Name another file.")
    return {name: row for name, row in content["rows"].items() if name in ROWS and row["state"] in _DONE}


def write(results: dict[str, dict[str, Any]], device: str, folder: Path) -> list[Path]:
    """Write the figures, and the rates if they were measured on a GPU; return the paths."""
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    files = {folder / f"gpu-{name}.json": {"device": device, "rows": results}}
    rates = results.get("ceilings", {}).get("rates")
    if rates and device != _REHEARSAL:
        source = f"measured by tools/gpu_check.sh on one {device}"
        base = next((kind for kind in ("h200", "a100", "b200") if kind in name), "h100")
        files[folder / f"rates-{name}.json"] = {"base": base, "sources": [source], **rates}
    for path, content in files.items():
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    return list(files)


def list_rows(rows: Sequence[Row]) -> str:
    """Return a line per row with its limit and what it needs, and the sum of the limits."""
    lines = [f"{row.name:20} {row.seconds:4} s  {', '.join(row.needs)}".rstrip() for row in rows]
    return "\n".join([*lines, f"{len(rows)} rows, at most {sum(row.seconds for row in rows)} s"])


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    if options.list:
        print(list_rows([ROWS[name] for name in options.rows]))
        return 0
    if options.here:
        print(ROWS[options.rows[0]].run().to_json())
        return 0
    if uses_gpu() == options.rehearse:
        why = "--rehearse: must be left out on a GPU" if options.rehearse else why_no_gpu()
        print(f"gpu_check: {why}", file=sys.stderr)
        return 2
    device = _REHEARSAL if options.rehearse else torch.cuda.get_device_name()
    try:
        results = read(options.resume, device) if options.resume else {}
    except (OSError, ValueError) as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2
    deadline = time.monotonic() + options.seconds
    written: list[Path] = []
    for name in [name for name in options.rows if name not in results]:
        command = [sys.executable, "-m", "benchmarks.gpu.run", "--here", "--rows", name]
        results[name] = check(ROWS[name], command, seconds_left=deadline - time.monotonic())
        print(f"{name}: {results[name]['state']} {results[name]['why']}", flush=True)
        written = write(results, device, options.out)  # whoever lends the machine may end this at any moment
    print(table(results))
    print("written: " + ", ".join(map(str, written)))
    return int(any(result["state"] == "failed" for result in results.values()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="default: all of them")
    parser.add_argument("--list", action="store_true", help="print the rows and their limits in seconds")
    parser.add_argument("--seconds", type=int, default=SECONDS, help=f"limit of all rows together (default {SECONDS})")
    parser.add_argument("--resume", type=Path, help="gpu-DEVICE.json of an earlier check, whose rows are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON files")
    parser.add_argument("--rehearse", action="store_true", help="run the rows on a CPU, with small models")
    parser.add_argument("--here", action="store_true", help="run one row in this process and print its outcome")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
