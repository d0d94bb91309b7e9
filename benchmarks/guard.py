"""Run the cheap benchmarks and compare them with benchmarks/results: `make bench`.

`.venv/bin/python -m benchmarks.guard [--only PART] [--json] [--out benchmarks/results/NAME.json]`
Only figures that other work on the machine hardly changes are compared: counts, predictions, memory, and ratios of two
times from one run, within bands wide enough for a shared machine. The exit code is 1 where a figure is worse than its
band allows. A figure that is better by more is no failure, but the recorded one is then out of date.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measure import ROOT, options, write_rows

RESULTS = ROOT / "benchmarks" / "results"
EXACT = 1.0


@dataclass(frozen=True, kw_only=True)
class Check:
    """A benchmark and those of its figures that are compared.

    name: of the module, and of its rows in the file of results
    case: the keys that tell its rows from each other
    bands: by figure, how many times as much as recorded it may be; EXACT: neither more nor less. A figure within a
        table of the row is written with a dot.
    """

    name: str
    file: str
    case: tuple[str, ...]
    bands: Mapping[str, float]
    arguments: tuple[str, ...] = ()


CHECKS = (
    Check(
        name="contrastive",
        file="contrastive_cpu.json",
        case=("n", "transfer", "impl"),
        bands={"ratio_to_naive": 1.5, "ratio_to_floor": 2.0, "peak_extra_bytes": 1.5},
    ),
    Check(
        name="push",
        file="push_cpu.json",
        case=("case", "weight_sync"),
        bands={"ratio_floor": 2.0, "bytes_moved": EXACT, "peak_extra_bytes": 1.5},
        arguments=("--cases", "135M, pipeline 2 to 2 engines"),
    ),
    Check(
        name="exchange",
        file="exchange.json",
        case=("ranks", "data", "rollouts"),
        bands={"bytes_per_rank": EXACT},
    ),
    Check(
        name="scaling",
        file="scaling.json",
        case=("grows", "replicas", "layers", "rollouts", "domains"),
        bands={"bytes.rollouts": EXACT, "bytes.contrastive": EXACT, "bytes.sync": EXACT},
    ),
    Check(name="cost", file="cost.json", case=("method",), bands={"score": 1.1, "update": 1.1, "step": 1.1}),
)


def main(arguments: Sequence[str]) -> int:
    parser = options(__doc__)
    parser.add_argument("--only", default="", metavar="PART", help="only the benchmarks with this in their names")
    known = parser.parse_args(arguments)
    found = [row for check in CHECKS if known.only in check.name for row in compared(check)]
    if known.json or known.out:
        write_rows("guard", found, known)
    else:
        _print(found)
    return 1 if any(row["verdict"] == "worse" for row in found) else 0


def compared(check: Check) -> Iterator[dict[str, Any]]:
    """Run a benchmark; yield its figures beside those that were recorded of the same case."""
    content = json.loads((RESULTS / check.file).read_text())
    recorded = {_case(check, row): row for row in content[check.name]}
    for row in _run(check):
        before = recorded.get(_case(check, row))
        for figure, band in check.bands.items():
            now, then = _figure(row, figure), _figure(before, figure)
            if now is not None:
                yield {
                    "benchmark": check.name,
                    "case": ", ".join(map(str, _case(check, row))),
                    "figure": figure,
                    "recorded": then,
                    "measured": now,
                    "verdict": verdict(then, now, band),
                }


def verdict(recorded: float | None, measured: float, band: float) -> str:
    """Return whether a figure, of which less is better, is within its band: "good", "better", "worse" or "new"."""
    if recorded is None:
        return "new"
    if band == EXACT:
        return "good" if measured == recorded else "worse"
    if measured > recorded * band:
        return "worse"
    return "better" if measured * band < recorded else "good"


def _run(check: Check) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", f"benchmarks.{check.name}", "--json", *check.arguments]
    print(f"{check.name} ...", file=sys.stderr, flush=True)
    said = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [json.loads(line) for line in said.splitlines() if line.startswith("{")]


def _case(check: Check, row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in check.case)


def _figure(row: Mapping[str, Any] | None, name: str) -> float | None:
    found: Any = row
    for key in name.split("."):
        found = (found or {}).get(key)
    return found if found is None else float(found)


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table(*("benchmark", "case", "figure", "recorded", "measured", "verdict"))
    for row in rows:
        recorded = "" if row["recorded"] is None else f"{row['recorded']:,g}"
        style = {"worse": "red", "better": "green"}.get(row["verdict"])
        table.add_row(
            *(row["benchmark"], row["case"], row["figure"], recorded, f"{row['measured']:,g}", row["verdict"]),
            style=style,
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
