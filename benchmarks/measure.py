"""Measure seconds and memory of a piece of work; print rows and keep them in a file with the machine's name."""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def memory(field: str) -> int:
    """Return the bytes that this process holds (VmRSS), or held at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def forget_peak() -> None:
    """Reset VmHWM, so that it becomes the peak of what follows."""
    Path("/proc/self/clear_refs").write_text("5")


def options(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one object per row")
    parser.add_argument(
        "--out", type=_file, help="also write the rows into this file, beside those of other benchmarks"
    )
    return parser


def write_rows(name: str, rows: Iterable[dict[str, Any]], known: argparse.Namespace) -> int:
    """Print each row as soon as it is measured; with --out put all of them into the file under `name`."""
    measured = []
    for row in rows:
        measured.append(row)
        print(json.dumps(row) if known.json else "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if known.out:
        report = json.loads(known.out.read_text()) if known.out.exists() else {}
        report |= {"machine": machine(), name: measured}
        known.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _file(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"{text!r}: must lie in a folder that exists ({str(path.parent)!r} does not); make it first"
        )
    return path


def machine() -> dict[str, Any]:
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
    }


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
