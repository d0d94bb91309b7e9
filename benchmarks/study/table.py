"""Print the study's results from its committed lines: `python -m benchmarks.study.table [--level a] [--json]`.

Every figure is a mean over seeds; behind it is the difference from the reference with its 95 % interval over pairs of
runs with the same seed. The reference is grpo, for tuning arms centre. An arm without a run is left out, and a figure
that no run of an arm has is a dash.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.study.arms import BASES, MAIN, REFERENCES, TUNING, TUNING_GRPO, TUNING_REWARD, Arm, arms
from benchmarks.study.record import RESULTS, read, results_file
from benchmarks.study.statistics import COSINES, MECHANISM, OVERALL, PROBES, Difference, Summary, domains_of, summaries
from benchmarks.study.tuning import OUTCOME, Best, bests

NO_NUMBER = "-"
_WIDTH = 260
"""Characters of a line that is not printed on a terminal: enough for the accuracies of six domains."""


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A table: a row per arm, a column per figure."""

    title: str
    header: list[str]
    rows: list[list[str]]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study.table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--level", choices=BASES, nargs="+", default=list(BASES), help="default: all")
    parser.add_argument("--json", action="store_true", help="print one object per arm and line")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    known = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else _WIDTH, markup=False, highlight=False, emoji=False)
    for level in known.level:
        lines = read(results_file(level, known.out))
        if known.json:
            for summary in summaries(lines, arms(level)) if lines else []:
                print(json.dumps({"level": level} | as_object(summary), allow_nan=False))
        else:
            _print(console, level, lines)
    return 0


def _print(console: Console, level: str, lines: Sequence[Mapping[str, Any]]) -> None:
    console.print(f"level {level}: {len(lines)} runs")
    if not lines:
        return
    known = arms(level)
    for sheet in sheets(lines, known):
        table = Table(title=sheet.title, title_justify="left")
        for number, column in enumerate(sheet.header):
            table.add_column(column, justify="right" if number else "left")
        for row in sheet.rows:
            table.add_row(*row)
        console.print(table)
    for line in failures(lines):
        console.print(line, soft_wrap=True)


def sheets(lines: Sequence[Mapping[str, Any]], known: Mapping[str, Arm]) -> list[Sheet]:
    """Return the tables of a level: methods overall, by domain and by mechanism, and the tuning runs."""
    found, domains = summaries(lines, known), domains_of(lines)
    main_arms, *tuned = ([s for s in found if s.arm.kind == kind] for kind in REFERENCES)
    tuning, tuning_grpo, tuning_reward = tuned
    everywhere = [summary for summary in main_arms if not summary.arm.domains]
    made = (
        (f"held-out accuracy, and its difference from {REFERENCES[MAIN]}", everywhere, OVERALL),
        (f"held-out accuracy by domain, and its difference from {REFERENCES[MAIN]}", main_arms, domains),
        (
            "contrastive mechanism: ranking and gain over the last fifth of the steps, mean cosine of gradients over "
            "all steps that measured it, probe at the end",
            everywhere,
            (*MECHANISM, *COSINES, *PROBES),
        ),
        (
            f"one choice of MCPO at a time, and its difference from {REFERENCES[TUNING]}",
            tuning,
            (*OVERALL[:3], *MECHANISM),
        ),
        (
            f"one choice of MCPO by rewards at a time, and its difference from {REFERENCES[TUNING_REWARD]}",
            tuning_reward,
            (*OVERALL[:3], *MECHANISM),
        ),
        (
            f"one setting of GRPO at a time, and its difference from {REFERENCES[TUNING_GRPO]}",
            tuning_grpo,
            OVERALL[:3],
        ),
    )
    found_sheets = [sheet_of(title, rows, figures) for title, rows, figures in made if rows]
    best = bests(lines, known)
    return [*found_sheets, sheet_of_choices(best)] if best else found_sheets


def sheet_of(title: str, found: Sequence[Summary], figures: Sequence[str]) -> Sheet:
    """Return a table of these figures; arms that have none of them are left out."""
    rows = [
        [summary.arm.name, str(len(summary.seeds)), *(cell(summary, figure) for figure in figures)]
        for summary in found
        if not summary.seeds or any(figure in summary.figures for figure in figures)
    ]
    return Sheet(title=title, header=["arm", "runs", *(figure.replace("_", " ") for figure in figures)], rows=rows)


def sheet_of_choices(best: Sequence[Best]) -> Sheet:
    """Return the table of what the tuning runs chose."""
    rows = [
        [
            value.arm.name,
            str(len(value.pairs)),
            f"{value.mean:+.3f}",
            NO_NUMBER if math.isnan(value.standard_error) else f"{value.standard_error:.3f}",
            "yes" if value.is_chosen else "no",
        ]
        for value in best
    ]
    title = f"best value of each choice: its difference in {OUTCOME}, the standard error, and whether it is chosen"
    return Sheet(title=title, header=["arm", "runs", "difference", "standard error", "chosen"], rows=rows)


def cell(summary: Summary, figure: str) -> str:
    """Return the mean of a figure, and its difference from the reference with the interval."""
    value = summary.average(figure)
    if math.isnan(value):
        return NO_NUMBER
    found = summary.differences.get(figure)
    return f"{value:.3f}" if found is None else f"{value:.3f}, {difference_text(found)}"


def difference_text(found: Difference) -> str:
    """Return a difference with its interval, where it has one, and a star where it is clear."""
    bounds = "" if math.isnan(found.low) else f" [{found.low:+.3f}, {found.high:+.3f}]"
    return f"{found.value:+.3f}{bounds}{'*' * found.is_clear}"


def failures(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for every run that failed, with the end of its log."""
    return [
        f"failed: {line['arm']}, seed {line['seed']}: {line['error'].strip().splitlines()[-1]}"
        for line in lines
        if "error" in line
    ]


def as_object(summary: Summary) -> dict[str, Any]:
    """Return a summary as plain values; null where a bound is not known."""
    return {
        "arm": summary.arm.name,
        "group": summary.arm.group,
        "seeds": list(summary.seeds),
        "failed": list(summary.failed),
        "figures": {name: summary.average(name) for name in summary.figures},
        "differences": {
            name: {
                **{"value": d.value, "low": _known(d.low), "high": _known(d.high), "seeds": d.num_seeds},
                **{"t_low": _known(d.t_low), "t_high": _known(d.t_high), "clear": d.is_clear},
            }
            for name, d in summary.differences.items()
        },
    }


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
