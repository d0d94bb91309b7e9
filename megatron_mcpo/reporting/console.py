"""Show a run on the terminal: one line per step, the domains every few steps, a table at the end.

On a terminal a progress bar stays at the bottom and lines scroll above it. Elsewhere (a log file) the same lines are
plain: no colours, no bar, nothing that moves the cursor.
"""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from megatron_mcpo.config.config import Config
from megatron_mcpo.reporting.numbers import duration, number, printable
from megatron_mcpo.reporting.signal_notes import nothing_learned
from megatron_mcpo.reporting.step_table import StepTable, step_warnings
from megatron_mcpo.reporting.summary import last_lines, mechanism_line, summary_table
from megatron_mcpo.reporting.verbose_lines import step_line
from megatron_mcpo.storage.files import read_jsonl
from megatron_mcpo.storage.run_folder import EVALUATIONS, METRICS

DOMAINS_EVERY = 5
_ETA_WINDOW = 5


class Console:
    """The terminal or log of one run, used by one rank; a context manager, so that the bar ends with the run."""

    def __init__(
        self,
        config: Config,
        total_steps: int,
        first_step: int,
        *,
        verbose: bool = False,
        stream: TextIO | None = None,
    ):
        """Prepare the console without printing anything.

        Args:
            config: of the run, for the names of its domains
            total_steps: the number of the last step
            first_step: the first step that this process runs, 1 for a new run
            verbose: print every metric of a step and of each domain in every step
            stream: standard output when left out
        """
        stream = stream or sys.stdout
        self._config = config
        self._domains = config.domain_names
        self._total = total_steps
        self._verbose = verbose
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
        self._table = StepTable(self._domains, total_steps, ascii_only=self._rich.options.ascii_only)
        self._legend_is_due = self._header_is_due = True
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            console=self._rich,
            expand=True,
        )
        self._task = self._bar.add_task("training", total=total_steps, completed=first_step - 1)

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Print one training step. Keys as in metrics.jsonl; any of them may be missing."""
        if self._live and not self._bar.live.is_started:
            self._bar.start()
        now = time.monotonic()
        self._seconds.append(now - self._last_step_at)
        self._last_step_at = now
        self._bar.update(self._task, completed=step)
        eta = duration(eta_seconds(self._total - step, self._seconds))
        if self._verbose:
            self._line(f"{step_line(step, self._total, values)}  ETA {eta}", style="bold")
        else:
            self._row(step, values, eta)
        for line in step_warnings(step, self._domains, values):
            self._line(line, style="yellow")
        if self._verbose or (step % DOMAINS_EVERY == 0 and step < self._total):
            for line in self._table.domains(values):
                self._line(line, style="dim")
            self._header_is_due = True

    def _row(self, step: int, values: Mapping[str, float], eta: str) -> None:
        """Print the line of a step, under the headings where the table of domains came in between."""
        if self._legend_is_due:
            for line in self._table.legend():
                self._line(line, style="dim")
        if self._header_is_due:
            self._line(self._table.header(), style="bold")
        self._legend_is_due = self._header_is_due = False
        self._line(self._table.line(step, values, eta))

    def note(self, text: str) -> None:
        """Print a message; control characters are shown as escape sequences."""
        for line in text.split("\n"):
            self._line(printable(line), style="yellow" if line.startswith("WARNING") else "")

    def evaluation(self, step: int, accuracies: Mapping[str, float]) -> None:
        """Print one held-out evaluation: accuracy by domain name."""
        values = list(accuracies.values())
        parts = [f"{name} {number(value, '.3f')}" for name, value in accuracies.items()]
        mean = math.fsum(values) / len(values) if values else math.nan
        when = "before step 1" if step == 0 else f"after step {step}"
        self._line(f"held-out accuracy {when}: mean {number(mean, '.3f')}  " + "  ".join(parts), style="cyan")

    def summary(self, folder: Path) -> None:
        """Print the table of the whole run from its files, the last lines, and end the bar."""
        self.close()
        steps = read_jsonl(folder / METRICS)
        if steps:
            if warning := nothing_learned(self._config, steps):
                self.note(warning)
            self._rich.print(summary_table(steps, read_jsonl(folder / EVALUATIONS), self._domains))
            if mechanism := mechanism_line(steps):
                self._line(mechanism)
        else:
            self.note("no training step was logged")
        for line in last_lines(folder):
            self._line(line)

    def close(self) -> None:
        """End the bar and leave the terminal as it was."""
        if self._bar.live.is_started:
            self._bar.stop()

    def _line(self, text: str, *, style: str = "") -> None:
        self._rich.print(Text(text, style=style), soft_wrap=True)


def eta_seconds(steps_to_go: int, seconds: Sequence[float]) -> float:
    """Return the seconds to the end at the mean pace of the last steps; evaluations and checkpoints count."""
    recent = seconds[-_ETA_WINDOW:]
    return steps_to_go * math.fsum(recent) / len(recent)
