"""What a person sees of a run: a line a step, a line a domain, a progress bar with ETA, and a table at the end.

On a terminal the bar stays at the bottom and lines scroll above it. Elsewhere (a log file) the same lines come plain:
no colours, no bar, nothing that moves the cursor.
"""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from megatron_mcpo.config.config import Config
from megatron_mcpo.storage.files import read_jsonl
from megatron_mcpo.storage.run_folder import CONFIG, EVALUATIONS, METRICS, NOTES

ETA_WINDOW = 5
SUMMARY_WINDOW = 5

# Where everything lies, in the order of the summary: path in the run folder, what it is.
PLACES = (
    ("report.html", "figures, maps and rollouts on one page, for a browser"),
    ("plots", "plots (PNG)"),
    (METRICS, "figures of every step"),
    (EVALUATIONS, "held-out evaluations"),
    (NOTES, "notes and warnings of the run"),
    ("rollouts", "every prompt, completion, reward and advantage"),
    ("representations", "representations by step"),
    ("checkpoints", "checkpoints"),
    (CONFIG, "resolved configuration"),
    ("tensorboard", "event files for TensorBoard"),
    ("trackers", "ids of the trackers' runs, files of wandb"),
)


class Console:
    """The terminal or log of one run. Used by one rank; a context manager, so that the bar ends with the run."""

    def __init__(self, config: Config, total_steps: int, first_step: int, stream: TextIO | None = None):
        """first_step: the first one that this process runs, 1 for a new run; stream: standard output when left out."""
        stream = stream or sys.stdout
        self._domains = config.domain_names
        self._total = total_steps
        self._seconds: list[float] = []
        self._last_step_at = time.monotonic()
        self._live = stream.isatty()
        self._rich = RichConsole(
            file=stream,
            force_terminal=self._live,
            color_system="auto" if self._live else None,
            width=None if self._live else 200,
            markup=False,
            highlight=False,
            emoji=False,
        )
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[eta]}"),
            console=self._rich,
            expand=True,
        )
        self._task = self._bar.add_task("training", total=total_steps, completed=first_step - 1, eta="")

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Print one training step. Keys as in metrics.jsonl; a figure that is not there is left out."""
        if self._live and not self._bar.live.is_started:
            self._bar.start()
        now = time.monotonic()
        self._seconds.append(now - self._last_step_at)
        self._last_step_at = now
        eta = f"ETA {duration(eta_seconds(self._total - step, self._seconds))}"
        self._bar.update(self._task, completed=step, eta=eta)
        self._line(Text(step_line(step, self._total, values) + ("" if self._live else f"  {eta}"), style="bold"))
        for line in domain_lines(self._domains, values):
            self._line(Text(line))

    def note(self, text: str) -> None:
        """Print something that is not a figure; control characters are shown, not obeyed."""
        for line in text.split("\n"):
            self._line(Text(printable(line)))

    def evaluation(self, step: int, accuracies: Mapping[str, float]) -> None:
        """Print one held-out evaluation: accuracy by domain name."""
        values = list(accuracies.values())
        parts = [f"{name} {_number(value, '.3f')}" for name, value in accuracies.items()]
        mean = math.fsum(values) / len(values) if values else math.nan
        when = "before step 1" if step == 0 else f"after step {step}"
        self._line(Text(f"held-out accuracy {when}: mean {_number(mean, '.3f')}  " + "  ".join(parts), style="cyan"))

    def summary(self, folder: Path) -> None:
        """Print the table of the whole run, from its files, and where everything lies. Ends the bar."""
        self.close()
        steps = read_jsonl(folder / METRICS)
        if steps:
            self._rich.print(_summary_table(steps, read_jsonl(folder / EVALUATIONS), self._domains))
        else:
            self.note("no training step was logged")
        for line in places(folder):
            self._line(Text(line))

    def close(self) -> None:
        """End the bar and leave the terminal as it was."""
        if self._bar.live.is_started:
            self._bar.stop()

    def _line(self, text: Text) -> None:
        self._rich.print(text, soft_wrap=True)


def eta_seconds(steps_to_go: int, seconds: Sequence[float]) -> float:
    """Seconds to the end, at the mean pace of the last steps; evaluations and checkpoints between them count."""
    recent = seconds[-ETA_WINDOW:]
    return steps_to_go * math.fsum(recent) / len(recent)


def step_line(step: int, total: int, values: Mapping[str, float]) -> str:
    """The line of a step, without the ETA."""
    parts = [
        f"step {step:>{len(str(total))}}/{total}",
        _figure(values, "reward", "reward/mean", ".3f"),
        _signal_part(values),
        _loss_part(values),
        _figure(values, "grad norm", "grad_norm", ".3g"),
        _skipped_part(values),
        _figure(values, "lr", "lr", ".2g"),
        _figure(values, "entropy", "entropy", ".2f"),
        _figure(values, "kl", "kl", ".2g"),
        _engine_part(values),
        _figure(values, "tokens", "tokens/trained", ",.0f"),
        _figure(values, "truncated", "truncated", ".0%"),
        _figure(values, "groups left out", "groups/errors", ".3g") if values.get("groups/errors") else "",
        _time_part(values),
        _figure(values, "memory", "memory/peak_gib", ".2f", unit=" GiB"),
    ]
    return "  ".join(part for part in parts if part)


# Columns of a domain's line: label, key without the domain, format, unit.
DOMAIN_COLUMNS = (
    ("reward", "reward", ".3f"),
    ("nonzero_advantage", "signal", ".0%"),
    ("length", "response_tokens", ".1f"),
    ("entropy", "entropy", ".2f"),
    ("kl", "kl", ".1e"),
    ("engine diff", "engine/logprob_diff", ".1e"),
    ("anchors", "contrast/anchors", ".4g"),
    ("positives", "contrast/positives", ".4g"),
)


def domain_lines(domains: Sequence[str], values: Mapping[str, float]) -> list[str]:
    """A line a domain, in columns; a column that no domain has is left out, a domain without rollouts shows dashes."""
    columns = []
    for label, key, form in DOMAIN_COLUMNS:
        cells = [_number(values[f"{key}/{d}"], form) if f"{key}/{d}" in values else "-" for d in domains]
        if any(cell != "-" for cell in cells):
            width = max(map(len, cells))
            columns.append([f"{label} {cell:>{width}}" for cell in cells])
    name_width = max(map(len, domains))
    lines = []
    for row, domain in enumerate(domains):
        errors = values.get(f"errors/{domain}", 0)
        tail = [f"groups left out {errors:.3g}"] if errors else []
        lines.append("  ".join([f"  {domain:<{name_width}}", *(column[row] for column in columns), *tail]))
    return lines


def summary_window(num_steps: int) -> int:
    """How many steps the beginning and the end of a run are: five, or a third of a shorter one."""
    return min(SUMMARY_WINDOW, max(1, num_steps // 3))


def summary_rows(
    steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]], domains: Sequence[str]
) -> tuple[int, list[list[str]]]:
    """How many steps "first" and "last" are means of, and the cells of the table: a row a domain, then their mean.

    Held-out accuracy is that of the first and of the last evaluation.
    """
    window = summary_window(len(steps))
    rows = []
    for name in [*domains, "mean"]:
        first, last = (_mean(part, f"reward/{name}") for part in (steps[:window], steps[-window:]))
        before, after = (_mean([evaluations[i]], name) if evaluations else None for i in (0, -1))
        rows.append([name, *(_cell(v) for v in (first, last)), _change(first, last), _factor(first, last)])
        rows[-1] += [*(_cell(v) for v in (before, after)), _change(before, after)] if evaluations else []
    return window, rows


def places(folder: Path) -> list[str]:
    """Where everything lies: a line for each part of the run folder that holds something."""
    found = [(folder / name, what) for name, what in PLACES if _holds_something(folder / name)]
    plots = [(path, "") for path in sorted((folder / "plots").glob("*.png"))]
    found = [*plots, *((path, what) for path, what in found if path.name != "plots")]
    width = max((len(str(path)) for path, _ in found), default=0)
    lines = [f"  {path!s:<{width}}  {what}".rstrip() for path, what in found]
    return [f"everything lies in {folder}", *lines, f"  tensorboard --logdir {folder / 'tensorboard'}"]


def duration(seconds: float) -> str:
    """Seconds as 1:02:03, or 2:03 below an hour."""
    if not math.isfinite(seconds):
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def printable(text: str) -> str:
    """The text with everything that could steer a terminal written out as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _number(value: float | None, form: str) -> str:
    if value is None or not math.isfinite(value):
        return "-" if value is None else str(float(value))
    return format(value, form)


def _figure(values: Mapping[str, float], label: str, key: str, form: str, unit: str = "") -> str:
    return f"{label} {_number(values[key], form)}{unit}" if key in values else ""


def _signal_part(values: Mapping[str, float]) -> str:
    """Share of all groups with signal; where only the domains' are known, their mean."""
    if "nonzero_advantage" in values:
        return _figure(values, "nonzero_advantage", "signal", ".0%")
    shares = [value for key, value in values.items() if key.startswith("nonzero_advantage/") and math.isfinite(value)]
    return f"signal {math.fsum(shares) / len(shares):.0%}" if shares else ""


def _loss_part(values: Mapping[str, float]) -> str:
    parts = []
    for term in ("policy", "kl", "cross_domain", "in_domain"):
        if f"loss/{term}" not in values:
            continue
        counts = [
            f"{values[key]:.4g} {label}"
            for label, key in (
                ("anchors", f"contrast/anchors_{term}"),
                ("positives each", f"contrast/positives_{term}"),
            )
            if key in values
        ]
        tail = f" ({', '.join(counts)})" if counts else ""
        parts.append(f"{term} {_number(values[f'loss/{term}'], '.4g')}{tail}")
    return "loss " + " ".join(parts) if parts else ""


def _skipped_part(values: Mapping[str, float]) -> str:
    """Says it where nothing, or of several optimizer steps not everything, was learned; otherwise empty."""
    applied = values.get("update/applied", 1.0)
    if applied == 1.0:
        return ""
    share = "UPDATE" if applied == 0.0 else f"{1 - applied:.0%} OF THE UPDATES"
    return f"{share} NOT APPLIED (gradient not finite)"


def _engine_part(values: Mapping[str, float]) -> str:
    if "engine/logprob_diff_mean" not in values:
        return ""
    most = f" max {_number(values['engine/logprob_diff_max'], '.2g')}" if "engine/logprob_diff_max" in values else ""
    return f"engine diff {_number(values['engine/logprob_diff_mean'], '.2g')}{most}"


def _time_part(values: Mapping[str, float]) -> str:
    keys = (("rollout", "time/rollout"), ("score", "time/score"), ("update", "time/update"), ("sync", "sync/seconds"))
    phases = " ".join(f"{label} {_number(values[key], '.1f')}" for label, key in keys if key in values)
    total = _number(values["time/step"], ".1f") + " s" if "time/step" in values else ""
    return f"{total} ({phases})".strip() if phases else total


def _summary_table(
    steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]], domains: Sequence[str]
) -> Table:
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


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    found = [row[key] for row in rows if row.get(key) is not None]
    return math.fsum(found) / len(found) if found else None


def _cell(value: float | None) -> str:
    return _number(value, ".3f")


def _change(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return "-"
    return f"{after - before:+.3f}"


def _factor(before: float | None, after: float | None) -> str:
    return f"{after / before:.2f}" if before and after is not None else "-"


def _holds_something(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()
