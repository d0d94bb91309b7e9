"""Check on one GPU what a CPU can't show: numbers against bands, speed and memory, weight syncs to vLLM.

`tools/gpu_check.sh [--rows NAME ...] [--list] [--seconds N] [--resume FILE] [--out FOLDER]` (one GPU; docs/gpu.md)
Every row is a process of its own. After each one the figures are written to FOLDER/gpu-DEVICE.json, and the measured
rates to FOLDER/rates-DEVICE.json, which `mcpo plan --gpu` takes; a table is printed at the end. Exit code 1: a figure
lies outside its band, or a row crashed. A row whose modules are missing or too old, or for which no time is left, is
skipped with the reason.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from packaging.version import Version

from benchmarks.gpu.outcome import Outcome, Row
from benchmarks.measure import ROOT
from megatron_mcpo.distributed.device import uses_gpu, why_no_gpu
from megatron_mcpo.storage.files import write_atomically

SECONDS = 20 * 60
"""The time limit of all rows together, unless --seconds says otherwise."""
_DONE = ("passed", "failed")
"""States of a row that --resume does not run again."""
_KEPT_LOG = 4000
"""How many characters of a failed row's standard error are kept in the file."""
ENGINE = ("vllm",)
PROGRAM = (
    "vllm", "reasoning_gym", "rich", "matplotlib", "tensorboard", "math_verify", "pydantic_monty", "pyarrow", "pydantic"
)  # fmt: skip


def environment() -> Outcome:
    """Report the device and the versions of everything that computes on it."""
    figures: dict[str, float | str] = {"python": sys.version.split()[0], "torch": torch.__version__}
    if uses_gpu():
        properties = torch.cuda.get_device_properties(0)
        figures |= {
            "device": properties.name,
            "memory_gib": properties.total_memory / 2**30,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    for package in ("transformer-engine", "transformer-engine-torch", "megatron-core", "vllm", "transformers"):
        try:
            figures[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            figures[package] = "not installed"
    for extension in ("amp_C", "fused_weight_gradient_mlp_cuda"):
        figures[f"apex's {extension}"] = "there" if importlib.util.find_spec(extension) else "not there"
    return Outcome(figures=figures)


def _of(module: str, name: str) -> Outcome:
    """Run a check. Its module is imported late, because it imports Megatron-Core, which takes seconds."""
    check: Callable[[], Outcome] = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), name)
    return check()


def _row(module: str, name: str, seconds: int, *needs: str, oldest: tuple[tuple[str, str], ...] = ()) -> Row:
    return Row(name=name, run=partial(_of, module, name), seconds=seconds, needs=needs, oldest=oldest)


FP8 = ("transformer_engine",)
ROWS = {
    row.name: row
    for row in (
        Row(name="environment", run=environment, seconds=60),
        _row("speed", "ceilings", 60),
        _row("numbers", "logprobs", 120),
        _row("layouts", "gradients", 180),
        _row("layouts", "layouts", 240),
        _row("layouts", "experts", 180),
        _row("numbers", "recompute", 120),
        _row("numbers", "fp8_products", 90, *FP8),
        _row("numbers", "fp8", 180, *FP8),
        _row("speed", "logprob", 90),
        _row("speed", "contrastive_terms", 120),
        _row("speed", "export", 120),
        _row("engine", "checkpoint", 120),
        _row("engine", "conversion", 120),
        _row("engine", "engine", 240, *ENGINE),
        _row("engine", "engine_fp8", 240, *ENGINE),
        # A server says which weights it has since 0.28 only; in process 0.26 is enough.
        _row("engine", "servers", 300, *ENGINE, oldest=(("vllm", "0.28"),)),
        _row("speed", "step_1_7b", 180),
        _row("speed", "step_8b", 180),
        _row("speed", "fp8_speed", 240, *FP8),
        _row("engine", "program", 300, *PROGRAM),
    )
}


def check(row: Row, command: Sequence[str], *, seconds_left: float = SECONDS) -> dict[str, Any]:
    """Run a row's command, which prints an outcome as a line; return state, reason, figures and log."""
    missing = [module for module in row.needs if importlib.util.find_spec(module) is None]
    if missing:
        return {"state": "skipped", "why": f"{', '.join(missing)} not installed"}
    if too_old := [old for package, oldest in row.oldest if (old := _older(package, oldest))]:
        return {"state": "skipped", "why": "; ".join(too_old)}
    if seconds_left < 1:
        return {"state": "skipped", "why": "the previous rows took all the time; run it with --rows or --resume"}
    limit, left = row.seconds, ""
    if seconds_left < limit:
        limit, left = int(seconds_left), " (all that was left)"
    start = time.monotonic()
    process = psutil.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        output, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        _kill(process)
        return {"state": "failed", "why": f"took more than {limit} s{left}"} | _log(process.communicate()[1])
    taken = {"row_seconds": round(time.monotonic() - start, 1)}
    outcome = _outcome(output)
    if process.returncode or outcome is None:
        last = (errors.strip().splitlines() or ["no outcome"])[-1]
        why = f"exit code {process.returncode}: {last[:300]}"
        return {"state": "failed", "why": why, **taken} | _log(errors)
    failures, skipped = outcome.pop("failures"), outcome.pop("skipped")
    if skipped:
        return {"state": "skipped", "why": skipped, **taken}
    return {"state": "failed" if failures else "passed", "why": "; ".join(failures), **taken, **outcome}


def _older(package: str, oldest: str) -> str:
    """Return a line if the installed version of a package is older than `oldest`."""
    for name in (package, f"{package}-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found = importlib.metadata.version(name)
            return f"needs {package} {oldest}, this is {found}" if Version(found) < Version(oldest) else ""
    return f"{package} not installed"


def _kill(process: psutil.Process) -> None:
    """Kill a process with the ranks and servers that it started, which would hold the GPU's memory and our pipes."""
    for each in [*process.children(recursive=True), process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()


def _log(errors: str) -> dict[str, str]:
    return {"log": errors[-_KEPT_LOG:]}


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
    """Write the figures, and the rates if they were measured; return the paths."""
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    files = {folder / f"gpu-{name}.json": {"device": device, "rows": results}}
    rates = results.get("ceilings", {}).get("rates")
    if rates:
        source = f"measured by tools/gpu_check.sh on one {device}"
        base = next((kind for kind in ("h200", "a100", "b200") if kind in name), "h100")
        files[folder / f"rates-{name}.json"] = {"base": base, "sources": [source], **rates}
    for path, content in files.items():
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    return list(files)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="default: all of them")
    parser.add_argument("--list", action="store_true", help="print the rows and their limits in seconds")
    parser.add_argument("--seconds", type=int, default=SECONDS, help=f"limit of all rows together (default {SECONDS})")
    parser.add_argument("--resume", type=Path, help="gpu-DEVICE.json of an earlier check, whose rows are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON files")
    parser.add_argument("--here", action="store_true", help="run one row in this process and print its outcome")
    options = parser.parse_args(arguments)
    if options.list:
        for row in ROWS.values():
            print(f"{row.name:20} {row.seconds:4} s  {', '.join(row.needs)}")
        return 0
    if not uses_gpu():
        print(f"gpu_check: {why_no_gpu()}", file=sys.stderr)
        return 2
    if options.here:
        print(ROWS[options.rows[0]].run().to_json())
        return 0
    results: dict[str, dict[str, Any]] = {}
    deadline, device_name = time.monotonic() + options.seconds, torch.cuda.get_device_name()
    if options.resume is not None:
        try:
            results = read(options.resume, device_name)
        except (OSError, ValueError) as error:
            print(f"gpu_check: {error}", file=sys.stderr)
            return 2
    written: list[Path] = []
    for name in [name for name in options.rows if name not in results]:
        command = [sys.executable, "-m", "benchmarks.gpu.run", "--here", "--rows", name]
        results[name] = check(ROWS[name], command, seconds_left=deadline - time.monotonic())
        print(f"{name}: {results[name]['state']} {results[name]['why']}", flush=True)
        written = write(results, device_name, options.out)  # whoever lends the machine may end this at any moment
    print(table(results))
    print("written: " + ", ".join(map(str, written)))
    return int(any(result["state"] == "failed" for result in results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
