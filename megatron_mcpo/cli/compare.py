"""Compare runs: `mcpo compare runs/A runs/B ... [--out DIR] [--json]`.

Print the reward of the last steps, the held-out accuracy and its change from the first run, for every domain, their
mean and the worst, and draw the curves of both. Runs that differ only in run.seed, name and layout are one method,
shown as mean and band; methods are named by the settings in which they differ.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_mcpo.cli import options
from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.reporting.change import Change
from megatron_mcpo.reporting.compare import Band, Comparison, Method, compare


def main(arguments: Sequence[str]) -> int:
    """Compare with command-line arguments; return the exit code."""
    parser = options.parser("compare", __doc__, example="runs/grpo runs/mcpo")
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="folders of runs; the others are compared with the first"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("comparison"), help="folder for the plots (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print an object instead of a table")
    known = parser.parse_args(arguments)
    try:
        comparison = compare(known.runs)
        plots = _write_plots(comparison, known.out)
    except ConfigError as error:
        return options.refuse(error)
    if known.json:
        print(json.dumps(report(comparison) | {"plots": list(map(str, plots))}, allow_nan=False))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False, emoji=False)
    console.print(table(comparison))
    for line in [*lines(comparison), *map(str, plots)]:
        console.print(line, soft_wrap=True)
    return 0


def _write_plots(comparison: Comparison, folder: Path) -> list[Path]:
    try:
        return comparison.write_plots(folder)
    except OSError as error:
        raise ConfigError([f"--out = {str(folder)!r}: must be writable ({error.strerror}). Give another."]) from error


def report(comparison: Comparison) -> dict[str, Any]:
    """Return the contents of the table as plain values; null where a value is not known."""
    return {
        "window": comparison.window,
        "notes": comparison.notes(),
        "methods": [_method(comparison, method) for method in comparison.methods],
    }


def _method(comparison: Comparison, method: Method) -> dict[str, Any]:
    transfer = comparison.transfer(method)
    domains = {
        name: {
            "reward": _plain(method.reward(name, comparison.window)),
            "accuracy": _plain(method.accuracy(name)),
            "change": transfer.change.get(name),
            "change_interval": _interval(comparison.change(method, name)),
        }
        for name in comparison.domains
    }
    return {
        "name": method.name,
        "runs": [str(run.folder) for run in method.runs],
        "seeds": method.seeds,
        "differences": comparison.differences(method),
        "domains": domains,
        "reward": _plain(method.reward("mean", comparison.window)),
        "mean": _plain(method.accuracy("mean")),
        "worst": _plain(method.accuracy("worst")),
        "backward_transfer": _known(transfer.mean),
        "backward_transfer_interval": _interval(comparison.change(method, "mean")),
        "forgetting": _known(transfer.forgetting),
        "fell": list(transfer.fell),
    }


def table(comparison: Comparison) -> Table:
    """Return the table: a section per domain, then their mean and the worst, with one row per method."""
    window = comparison.window
    steps = "last step" if window == 1 else f"last {window} steps"
    made = Table(title="training reward, and last accuracy on held-out items")
    for column in ("domain", "method", "runs"):
        made.add_column(column)
    for column in (f"reward, {steps}", "lowest .. highest", "held-out", "bounds", "change", "95 % interval"):
        made.add_column(column, justify="right")
    for name in [*comparison.domains, "mean", "worst"]:
        for number, method in enumerate(comparison.methods):
            reward, accuracy = method.reward(name, window), method.accuracy(name)
            cells = ["", ""] if name == "worst" else _cells(reward, of_one=len(method.runs) == 1)
            cells += _cells(accuracy, of_one=False)
            cells += ["", ""] if number == 0 or name == "worst" else _change_cells(comparison.change(method, name))
            made.add_row("" if number else name, method.name, str(len(method.runs)), *cells)
        made.add_section()
    return made


def lines(comparison: Comparison) -> list[str]:
    """Return the lines below the table: how bounds and intervals were made, what each method is, warnings."""
    first = comparison.methods[0]
    said = ["bounds: the 95 % interval over items for one run, the lowest and the highest run for several"]
    for method in comparison.methods:
        runs = [f"{run.folder} (seed {run.config.run.seed})" for run in method.runs]
        said.append(f"{method.name}: {', '.join(runs)}")
        if method is not first:
            said += [f"  {line}" for line in _against_first(comparison, method)]
    return [*said, *(f"WARNING: {note}" for note in comparison.notes())]


def _against_first(comparison: Comparison, method: Method) -> list[str]:
    transfer, first = comparison.transfer(method), comparison.methods[0].name
    changes = {name: comparison.change(method, name) for name in transfer.change}
    fell = [name + (" (0 is in its interval)" if changes[name].contains_zero else "") for name in transfer.fell]
    lines = [
        f"against {first}: {', '.join(comparison.differences(method))}",
        f"backward transfer {_cell(transfer.mean, '+.3f')}, forgetting {_cell(transfer.forgetting)}, "
        f"fell: {', '.join(fell) or 'no domain'}",
    ]
    bases = {found.basis for found in changes.values()}
    if "seeds" in bases:
        lines.append("intervals of changes: over seeds (Welch)")
    if "items" in bases:
        lines.append("intervals of changes: over held-out items; they do not include how much seeds differ")
    return lines


def _change_cells(found: Change) -> list[str]:
    if found.basis == "unknown":
        return [_cell(found.value, "+.3f"), ""]
    remark = ", has 0" if found.contains_zero else ""
    return [_cell(found.value, "+.3f"), f"{found.low:+.3f} .. {found.high:+.3f}{remark}"]


def _interval(found: Change) -> dict[str, Any]:
    return {"low": _known(found.low), "high": _known(found.high), "over": found.basis}


def _cells(band: Band, *, of_one: bool) -> list[str]:
    """Return the cells of mean and bounds; a training reward of one run has no bounds."""
    bounded = not of_one and not math.isnan(band.low)
    return [_cell(band.mean), f"{_cell(band.low)} .. {_cell(band.high)}" if bounded else ""]


def _cell(value: float, form: str = ".3f") -> str:
    return "-" if math.isnan(value) else format(value, form)


def _plain(band: Band) -> dict[str, float | None]:
    return {"mean": _known(band.mean), "low": _known(band.low), "high": _known(band.high)}


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
