"""Log a run on the one rank that has its folder: console, metrics files, trackers, dumps, plots, the report."""

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_mcpo.config.config import Config
from megatron_mcpo.reporting.console import Console
from megatron_mcpo.reporting.contrast_note import JUDGED_AT, contrast_note
from megatron_mcpo.reporting.html.html_report import write_report
from megatron_mcpo.reporting.loggers import MetricsLog, write_representations, write_rollouts
from megatron_mcpo.reporting.plots import write_plots
from megatron_mcpo.reporting.probe import probe_transfer
from megatron_mcpo.reporting.signal_notes import WINDOW, signal_notes
from megatron_mcpo.reporting.step_metrics import BatchReport, rollout_rows
from megatron_mcpo.storage.files import read_jsonl
from megatron_mcpo.storage.run_folder import METRICS, RunFolder


class RunLogger:
    """The log of a run on the rank that has its folder; on all other ranks (folder None) every call does nothing."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder | None,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_token_ids: Sequence[int],
        first_step: int,
        evaluated: bool,
        verbose: bool,
    ):
        """Open the files and the trackers. Raises ConfigError if a tracker cannot be started.

        Args:
            config: of the run
            folder: of the run, on the rank that logs; None on the others
            tokenizer: decodes the prompts of the rollout dump
            stop_token_ids: of the tokens that end a response
            first_step: the last step that is done already, 0 for a new run
            evaluated: whether the evaluation of that step is on file
            verbose: print every metric in every step
        """
        self._config = config
        self._folder = folder
        self._tokenizer = tokenizer
        self._stop_tokens = [str(tokenizer.convert_ids_to_tokens(number)) for number in stop_token_ids]
        self._evaluated = {first_step} if evaluated else set[int]()
        self._step = first_step
        self._recent: deque[dict[str, float]] = deque(maxlen=WINDOW)
        if folder is not None:
            self._log = MetricsLog(folder.path, config.run.trackers)
            self._console = Console(config, config.run.steps, first_step + 1, verbose=verbose)

    def note(self, text: str) -> None:
        """Print a message, and keep it with the step that it follows."""
        if self._folder is not None:
            self._console.note(text)
            self._log.log_note(self._step, text)

    def step(self, step: int, metrics: Mapping[str, float], learned: Sequence[BatchReport]) -> None:
        """Log a training step and dump its rollouts and representations."""
        if self._folder is None:
            return
        self._step = step
        self._log.log(step, metrics)
        self._console.step(step, metrics)
        self._recent.append({"step": step, **metrics})
        for warning in signal_notes(self._config, list(self._recent), self._stop_tokens):
            self.note(warning)
        if step == JUDGED_AT and (text := contrast_note(self._config, read_jsonl(self._folder.path / METRICS))):
            self.note(text)
        self._dump(self._folder.path, step, learned)

    def has_evaluation(self, step: int) -> bool:
        """Return whether the evaluation of a step is on file since before this process started."""
        return step in self._evaluated

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log a held-out evaluation, and the probe of the representations since the one before."""
        if self._folder is None:
            return
        before = step - self._config.evaluation.every
        metrics = {**metrics, **probe_transfer(self._folder.path, after=before, domain_names=self._config.domain_names)}
        self._log.log_eval(step, metrics)
        self._console.evaluation(step, {name: metrics[name] for name in self._config.domain_names})

    def finish(self) -> None:
        """Draw the plots, mark the run as complete, write the report and print the summary."""
        if self._folder is None:
            return
        contrastive = self._config.contrastive.enabled
        for note in write_plots(self._folder.path, self._config.domain_names, contrastive=contrastive).notes:
            self.note(note)
        self._folder.finish()
        try:
            write_report(self._folder.path, self._config)
        except Exception as error:  # a finished run must not fail for want of its report
            self.note(
                f"WARNING: no report.html ({type(error).__name__}: {error}); run `mcpo report {self._folder.path}`"
            )
        self._console.summary(self._folder.path)

    def stop(self, step: int) -> None:
        """Mark the run as preempted after `step`, so that it is started again."""
        if self._folder is not None:
            self._folder.mark_preempted()
            self.note(f"asked to stop: ended after step {step}; run the same command again to resume")

    def close(self) -> None:
        """Leave the terminal as it was and end the trackers' runs, also after a failure."""
        if self._folder is not None:
            self._console.close()
            self._log.close()

    def _dump(self, folder: Path, step: int, learned: Sequence[BatchReport]) -> None:
        rows = []
        for number, report in enumerate(learned):
            prompts = self._tokenizer.batch_decode([list(group.prompt.token_ids) for group in report.groups])
            rows += [{"minibatch": number, **row} for row in rollout_rows(report, self._config.domain_names, prompts)]
        write_rollouts(folder, step, rows)
        drawn = [report for report in learned if report.z_MD is not None]
        if not drawn:
            return
        groups = [group for report in drawn for group in report.groups]
        write_representations(
            folder,
            step,
            z=np.concatenate([report.z_MD.float().cpu().numpy() for report in drawn if report.z_MD is not None]),
            domain=np.array([group.prompt.domain for group in groups for _ in group.correct]),
            prompt=np.array([number for number, group in enumerate(groups) for _ in group.correct]),
            correct=np.array([correct for group in groups for correct in group.correct]),
        )
