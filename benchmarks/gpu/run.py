"""Check on one GPU what a CPU can't show: numbers against bands, speed and memory, weight syncs to vLLM, training.

`tools/gpu_check.sh [--rows NAME ...] [--list] [--seconds N] [--resume FILE] [--out FOLDER] [--rehearse]` (one GPU)
Every row is a process of its own. After each one the figures are merged into FOLDER/gpu-DEVICE.json, and the measured
rates written to FOLDER/rates-DEVICE.json, which `mcpo plan --gpu` takes; a table is printed at the end. Exit code 1: a
figure lies outside its band, or a row crashed; a target that is missed is only said. 2: the arguments are wrong, or
there is no GPU. 3: no row was run. A row whose modules are missing or too old, or for which no time is left, is skipped
with the reason. --rehearse runs the rows on a CPU with small models: it shows that they run, and nothing about a GPU.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from benchmarks.gpu.outcome import Row
from benchmarks.gpu.process import run_limited
from benchmarks.gpu.results import REHEARSAL, done, make_writable, merged, read, results_path, write
from benchmarks.gpu.rows import ROWS
from benchmarks.measure import ROOT
from megatron_mcpo.distributed.device import uses_gpu, why_no_gpu

SECONDS = 60 * 60
"""The time limit of all rows together, unless --seconds says otherwise."""
_KEPT_LOG = 4000
"""How many characters of a failed row's standard error are kept in the file."""


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
        said += [f"{key} {_number(value[0])} ({value[1]})" for key, value in result.get("targets", {}).items()]
        said += [f"{key} {_number(value)}" for key, value in found.items()]
        lines.append(f"{name:20} {result['state']:8} {', '.join(said)}")
    counts = {state: sum(each["state"] == state for each in results.values()) for state in ("passed", "failed")}
    skipped = len(results) - sum(counts.values())
    return "\n".join([*lines, f"{counts['passed']} passed, {counts['failed']} failed, {skipped} skipped"])


def _number(value: float | str) -> str:
    """Return a figure with four digits. NaN and infinities are text in an outcome."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def list_rows(rows: Sequence[Row]) -> str:
    """Return a line per row with its limit and what it needs, and the sum of the limits."""
    lines = [f"{row.name:20} {row.seconds:4} s  {', '.join(row.needs)}".rstrip() for row in rows]
    return "\n".join([*lines, f"{len(rows)} rows, at most {sum(row.seconds for row in rows)} s"])


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    if options.list:
        print(list_rows([ROWS[name] for name in options.rows or ROWS]))
        return 0
    if options.here:
        print(ROWS[options.rows[0]].run().to_json())
        return 0
    if uses_gpu() == options.rehearse:
        why = "--rehearse: must be left out on a GPU" if options.rehearse else why_no_gpu()
        print(f"gpu_check: {why}", file=sys.stderr)
        return 2
    device = REHEARSAL if options.rehearse else torch.cuda.get_device_name()
    try:
        make_writable(options.out)
        earlier = read(path, device) if (path := results_path(options.out, device)).exists() else {}
        resumed = done(read(options.resume, device)) if options.resume else {}
    except (OSError, ValueError) as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2
    # A row that was named runs again, also if the file has it.
    known = {**earlier, **resumed}
    results = {} if options.rows else dict(resumed)
    deadline = time.monotonic() + options.seconds
    for name in [name for name in options.rows or ROWS if name not in results]:
        command = [sys.executable, "-m", "benchmarks.gpu.run", "--here", "--rows", name]
        results[name] = check(ROWS[name], command, seconds_left=deadline - time.monotonic())
        print(f"{name}: {results[name]['state']} {results[name]['why']}", flush=True)
        # Whoever lends the machine may end this at any moment.
        known = merged(known, {name: results[name]})
        write(known, device, options.out)
    print(table(results))
    if others := known.keys() - results.keys():
        print(f"the file also has {len(others)} rows of earlier checks: {', '.join(sorted(others))}")
    print("written: " + ", ".join(map(str, write(known, device, options.out))))
    return _exit_code(results)


def _exit_code(results: dict[str, dict[str, Any]]) -> int:
    """Return 1 if a row failed, 3 if none was run, else 0."""
    if any(result["state"] == "failed" for result in results.values()):
        return 1
    if any(result["state"] == "passed" for result in results.values()):
        return 0
    print("gpu_check: no row was run: all were skipped", file=sys.stderr)
    return 3


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="default: all of them; those named run again")
    parser.add_argument("--list", action="store_true", help="print the rows and their limits in seconds")
    parser.add_argument("--seconds", type=int, default=SECONDS, help=f"limit of all rows together (default {SECONDS})")
    parser.add_argument("--resume", type=Path, help="gpu-DEVICE.json of an earlier check, whose rows are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON files")
    parser.add_argument("--rehearse", action="store_true", help="run the rows on a CPU, with small models")
    parser.add_argument("--here", action="store_true", help="run one row in this process and print its outcome")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
