"""Summarize a finished run for the terminal: the table of its domains, and what to look at and type next."""

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_mcpo.reporting.numbers import number
from megatron_mcpo.storage.files import step_files
from megatron_mcpo.storage.run_folder import CONFIG

SUMMARY_WINDOW = 5


def summary_window(num_steps: int) -> int:
    """Return how many steps count as the beginning and as the end of a run: five, or a third of a shorter run."""
    return min(SUMMARY_WINDOW, max(1, num_steps // 3))


def summary_rows(
    steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]], domains: Sequence[str]
) -> tuple[int, list[list[str]]]:
    """Return the number of steps that "first" and "last" are means of, and the rows of the table.

    The table has one row per domain, then their mean; held-out accuracy is that of the first and the last evaluation.
    """
    window = summary_window(len(steps))
    rows = []
    for name in [*domains, "mean"]:
        first, last = (_mean(part, f"reward/{name}") for part in (steps[:window], steps[-window:]))
        before, after = (_mean([evaluations[i]], name) if evaluations else None for i in (0, -1))
        rows.append([name, *(_cell(v) for v in (first, last)), _change(first, last), _factor(first, last)])
        rows[-1] += [*(_cell(v) for v in (before, after)), _change(before, after)] if evaluations else []
    return window, rows


def summary_table(
    steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]], domains: Sequence[str]
) -> Table:
    """Return the table of the whole run. steps: at least one."""
    window, rows = summary_rows(steps, evaluations, domains)
    plural = "step" if window == 1 else "steps"
    table = Table(title=f"{steps[-1]['step']} steps: training reward, and accuracy on held-out items")
    table.add_column("domain")
    headings = [f"reward\nfirst {window} {plural}", f"reward\nlast {window} {plural}", "change", "factor"]
    headings += ["held-out\nbefore", "held-out\nafter", "change"] if evaluations else []
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows[:-1]:
        table.add_row(*row)
    table.add_section()
    table.add_row(*rows[-1], style="bold")
    return table


def mechanism_line(steps: Sequence[Mapping[str, Any]]) -> str | None:
    """Return what the cross-domain term did, at the beginning and at the end of a run; None without such a term."""
    window = summary_window(len(steps))
    parts = []
    for label, key, chance in (
        ("ranking of correct above incorrect rollouts across domains", "contrast/auc_cross_domain", "0.5"),
        ("gain in nats", "contrast/gain_cross_domain", "0"),
    ):
        first, last = (_mean(part, key) for part in (steps[:window], steps[-window:]))
        if first is not None and last is not None:
            parts.append(f"{label} {first:.2f} -> {last:.2f} (chance {chance})")
    return f"mechanism   {', '.join(parts)}" if parts else None


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    found = [row[key] for row in rows if row.get(key) is not None]
    return math.fsum(found) / len(found) if found else None


def _cell(value: float | None) -> str:
    return number(value, ".3f")


def _change(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return "-"
    return f"{after - before:+.3f}"


def _factor(before: float | None, after: float | None) -> str:
    return f"{after / before:.2f}" if before and after is not None else "-"


def last_lines(folder: Path) -> list[str]:
    """Return where the report and the last checkpoint of a run are, and the command to type next."""
    report, checkpoints = folder / "report.html", step_files(folder / "checkpoints")
    lines = [f"report      {report}"] if report.exists() else []
    if checkpoints:
        checkpoint = str(checkpoints[-1][1])
        command = ["mcpo", "evaluate", str(folder / CONFIG), "--checkpoint", checkpoint]
        lines += [f"checkpoint  {checkpoint}", f"next        {shlex.join(command)}"]
    return lines
