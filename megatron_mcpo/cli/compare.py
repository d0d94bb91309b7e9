"""Compare runs: `mcpo compare runs/A runs/B ... [--out DIR] [--json]`.

Prints, for every domain, their mean and the worst, the reward of the last steps, held-out accuracy, and its change to
the first run; and draws the curves of both. Runs of the same settings but for run.seed, names and layouts are one
method, shown as mean and band.
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
from megatron_mcpo.reporting.compare import Band, Comparison, Method, compare


def main(arguments: Sequence[str]) -> int:
    parser = options.parser("compare", __doc__, example="runs/grpo runs/mcpo")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs; the first is what others are held against")
    parser.add_argument("--out", type=Path, default=Path("comparison"), help="folder for the plots")
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
        raise ConfigError([f"--out = {str(folder)!r}: can't be written ({error.strerror}); give another"]) from error


def report(comparison: Comparison) -> dict[str, Any]:
    """What the table says, as plain values; null where a figure is not known."""
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
        "forgetting": _known(transfer.forgetting),
        "fell": list(transfer.fell),
    }


def table(comparison: Comparison) -> Table:
    """A section a domain, then their mean and the worst; a row a method."""
    window = comparison.window
    steps = "last step" if window == 1 else f"last {window} steps"
    made = Table(title="training reward, and last accuracy on held-out items")
    for column in ("domain", "method", "runs"):
        made.add_column(column)
    for column in (f"reward, {steps}", "lowest .. highest", "held-out", "bounds", "change"):
        made.add_column(column, justify="right")
    for name in [*comparison.domains, "mean", "worst"]:
        for number, method in enumerate(comparison.methods):
            reward, accuracy = method.reward(name, window), method.accuracy(name)
            transfer = comparison.transfer(method)
            change = transfer.mean if name == "mean" else transfer.change.get(name, math.nan)
            cells = ["", ""] if name == "worst" else _cells(reward, of_one=len(method.runs) == 1)
            cells += _cells(accuracy, of_one=False)
            changed = "" if number == 0 or name == "worst" else _cell(change, "+.3f")
            made.add_row("" if number else name, method.name, str(len(method.runs)), *cells, changed)
        made.add_section()
    return made


def lines(comparison: Comparison) -> list[str]:
    """What stands below the table: whose bounds these are, what the methods are, what to beware of."""
    said = ["bounds: 95 % interval over items for one run, lowest and highest run for several"]
    for method in comparison.methods:
        what = f"{method.name}: seeds {', '.join(map(str, method.seeds))}"
        if method is not comparison.methods[0]:
            transfer = comparison.transfer(method)
            what += (
                f"; against {comparison.methods[0].name}: {', '.join(comparison.differences(method))}; "
                f"backward transfer {_cell(transfer.mean, '+.3f')}, forgetting {_cell(transfer.forgetting)}, "
                f"fell: {', '.join(transfer.fell) or 'no domain'}"
            )
        said.append(what)
    return [*said, *(f"WARNING: {note}" for note in comparison.notes())]


def _cells(band: Band, *, of_one: bool) -> list[str]:
    """Mean and bounds; a training reward of one run has none."""
    bounded = not of_one and not math.isnan(band.low)
    return [_cell(band.mean), f"{_cell(band.low)} .. {_cell(band.high)}" if bounded else ""]


def _cell(value: float, form: str = ".3f") -> str:
    return "-" if math.isnan(value) else format(value, form)


def _plain(band: Band) -> dict[str, float | None]:
    return {"mean": _known(band.mean), "low": _known(band.low), "high": _known(band.high)}


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
