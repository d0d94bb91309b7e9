"""Compare runs from the files of their folders; runs that differ only in their seed are one method.

Imports no torch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mcpo.config.config import Config, ConfigError, load
from megatron_mcpo.reporting.accuracy import Transfer, backward_transfer
from megatron_mcpo.reporting.change import Change, Sample, average, change
from megatron_mcpo.reporting.plots import Curve, smoothed, smoothing_window, write_curves
from megatron_mcpo.reporting.summary import summary_window
from megatron_mcpo.storage.files import read_jsonl
from megatron_mcpo.storage.run_folder import CONFIG, EVALUATIONS, METRICS
from megatron_mcpo.storage.run_settings import differences, settings

_NEEDED = (CONFIG, METRICS)
_MOST_IN_NAME = 3
"""Settings in the name of a method; methods that differ in more are called by their folders."""
_MOST_CHARACTERS = 24
"""Of one value in the name of a method."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """The contents of a run's folder: rows of metrics.jsonl (at least one) and of eval.jsonl."""

    folder: Path
    config: Config
    steps: tuple[dict[str, Any], ...]
    evaluations: tuple[dict[str, Any], ...]
    finished: bool


@dataclass(frozen=True, kw_only=True)
class Band:
    """A metric of a method: the mean over its runs, between the lowest and the highest of them.

    For an accuracy of a single run: between the bounds of its 95 % interval. NaN if not known.
    """

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Method:
    """Runs whose settings differ only in the seed."""

    name: str
    runs: tuple[Run, ...]

    @property
    def seeds(self) -> list[int]:
        """Return the seeds of the runs, in their order."""
        return [run.config.run.seed for run in self.runs]

    def reward(self, name: str, window: int) -> Band:
        """Return the reward of a domain, or of `mean`, over the last `window` steps of each run."""
        return _band([_mean(_series(run.steps[-window:], f"reward/{name}")) for run in self.runs])

    def accuracy(self, name: str) -> Band:
        """Return the held-out accuracy of a domain, or `mean` or `worst`, in each run's last evaluation."""
        rows = [run.evaluations[-1] if run.evaluations else {} for run in self.runs]
        if len(rows) == 1:
            mean, low, high = (_number(rows[0].get(key)) for key in (name, *_bounds(name)))
            return Band(mean=mean, low=low, high=high)
        return _band([_number(row.get(name)) for row in rows])

    def sample(self, name: str) -> Sample:
        """Return the last held-out accuracy of a domain in every run, with its interval over items."""
        rows = [run.evaluations[-1] if run.evaluations else {} for run in self.runs]
        values, low, high = (np.array([_number(row.get(key)) for row in rows]) for key in (name, *_bounds(name)))
        return Sample(values_R=values, low_R=low, high_R=high)

    def reward_curve(self, name: str) -> Curve:
        """Return the smoothed reward over the steps that all runs have."""
        curve = self._curve([run.steps for run in self.runs], f"reward/{name}")
        window = smoothing_window(len(curve.steps))
        values, low, high = (smoothed(series, window) for series in (curve.values, curve.low, curve.high))
        return Curve(label=self.name, steps=curve.steps, values=values.tolist(), low=low.tolist(), high=high.tolist())

    def accuracy_curve(self, name: str) -> Curve:
        """Return the accuracy over the evaluations that all runs have."""
        curve = self._curve([run.evaluations for run in self.runs], name)
        if len(self.runs) > 1:
            return curve
        low, high = (_series(self.runs[0].evaluations, key) for key in _bounds(name))
        return Curve(label=self.name, steps=curve.steps, values=curve.values, low=low, high=high)

    def _curve(self, rows_of_runs: Sequence[Sequence[Mapping[str, Any]]], key: str) -> Curve:
        by_step = [{row["step"]: _number(row.get(key)) for row in rows} for rows in rows_of_runs]
        steps = sorted(set.intersection(*(set(found) for found in by_step)))
        bands = [_band([found[step] for found in by_step]) for step in steps]
        return Curve(
            label=self.name,
            steps=steps,
            values=[band.mean for band in bands],
            low=[band.low for band in bands],
            high=[band.high for band in bands],
        )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The methods in the order of their first runs; window: number of last steps that a reward is the mean of."""

    methods: tuple[Method, ...]
    domains: tuple[str, ...]
    window: int

    def transfer(self, method: Method) -> Transfer:
        """Return how held-out accuracies differ from the first method's."""
        now, first = ({name: m.accuracy(name).mean for name in self.domains} for m in (method, self.methods[0]))
        return backward_transfer(now, {name: value for name, value in first.items() if not math.isnan(value)})

    def change(self, method: Method, name: str) -> Change:
        """Return the change of accuracy from the first method, with its interval.

        name: a domain, or "mean" for the mean over the domains that both methods know
        """
        names = list(self.transfer(method).change) if name == "mean" else [name]
        if not names:
            return Change(value=math.nan, low=math.nan, high=math.nan, basis="unknown")
        before, after = (average([m.sample(each) for each in names]) for m in (self.methods[0], method))
        return change(before, after)

    def differences(self, method: Method) -> list[str]:
        """Return the settings in which a method differs from the first one."""
        first, own = (_without_seed(m.runs[0].config) for m in (self.methods[0], method))
        return differences(first, own)

    def notes(self) -> list[str]:
        """Return warnings about what makes the runs hard to compare."""
        runs = [run for method in self.methods for run in method.runs]
        notes = [f"{run.folder} is not finished: {run.steps[-1]['step']} steps" for run in runs if not run.finished]
        notes += [f"{run.folder} has no evaluation" for run in runs if not run.evaluations]
        last = sorted({run.evaluations[-1]["step"] for run in runs if run.evaluations})
        if len(last) > 1:
            notes.append(f"the last evaluations are of different steps: {', '.join(map(str, last))}")
        measured = {(run.config.evaluation.samples, run.config.evaluation.temperature) for run in runs}
        items = sorted({run.config.evaluation.items for run in runs})
        if len(items) > 1:
            notes.append(
                f"held-out accuracies are of different questions: evaluation.items is {', '.join(map(str, items))}"
            )
        if len(measured) > 1:
            ways = ", ".join(f"{k} at temperature {temperature:g}" for k, temperature in sorted(measured))
            notes.append(f"held-out accuracies are not of the same kind: responses per item are {ways}")
        for method in self.methods:
            if len(set(method.seeds)) < len(method.runs):
                notes.append(f"{method.name}: several runs have the same seed: {', '.join(map(str, method.seeds))}")
        return notes

    def write_plots(self, folder: Path) -> list[Path]:
        """Write reward.png and accuracy.png with one panel per domain and one of their mean. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        names = [*self.domains, "mean"]
        band = "bands: lowest to highest seed"
        written = []
        for file, title, ylabel, draw in (
            ("reward.png", f"Training reward by domain ({band})", "mean reward", Method.reward_curve),
            (
                "accuracy.png",
                f"Held-out accuracy by domain ({band}; of one run: 95 % interval over items)",
                "share correct",
                Method.accuracy_curve,
            ),
        ):
            panels = {name: [draw(method, name) for method in self.methods] for name in names}
            if any(curve.steps for curves in panels.values() for curve in curves):
                written.append(folder / file)
                write_curves(written[-1], panels, title=title, ylabel=ylabel)
        return written


def compare(folders: Sequence[Path]) -> Comparison:
    """Read the runs and group them into methods.

    Raises ConfigError with all problems: folders that are not of a run, or are given twice.
    """
    runs: list[Run] = []
    problems: list[str] = []
    for folder in folders:
        try:
            runs.append(_read(folder))
        except ConfigError as error:
            problems += error.problems
    resolved = [folder.resolve() for folder in folders]
    twice = dict.fromkeys(str(f) for f, r in zip(folders, resolved, strict=True) if resolved.count(r) > 1)
    if twice:
        problems.append(f"{', '.join(twice)}: must be given once (they are the same run). Leave one out.")
    if problems:
        raise ConfigError(problems)
    groups: list[list[Run]] = []
    for run in runs:
        same = [g for g in groups if _without_seed(g[0].config) == _without_seed(run.config)]
        if same:
            same[0].append(run)
        else:
            groups.append([run])
    names = _names(groups)
    return Comparison(
        methods=tuple(Method(name=name, runs=tuple(group)) for name, group in zip(names, groups, strict=True)),
        domains=tuple(dict.fromkeys(name for run in runs for name in run.config.domain_names)),
        window=min(summary_window(len(run.steps)) for run in runs),
    )


def _read(folder: Path) -> Run:
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    if missing:
        reason = f"{' and '.join(missing)} missing" if folder.is_dir() else "no such folder"
        raise ConfigError(
            [f"{folder}: must be the folder of a run ({reason}). Give runs/NAME of a run that has logged a step."]
        )
    steps = read_jsonl(folder / METRICS)
    if not steps:
        raise ConfigError([f"{folder}: must have logged a step ({METRICS} holds none). Wait for the first."])
    try:
        config = load(folder / CONFIG)
    except ConfigError as error:
        raise ConfigError([f"{folder / CONFIG}: {problem}" for problem in error.problems]) from error
    return Run(
        folder=folder,
        config=config,
        steps=tuple(steps),
        evaluations=tuple(read_jsonl(folder / EVALUATIONS)),
        finished=(folder / "FINISHED").exists(),
    )


def _without_seed(config: Config) -> dict[str, Any]:
    """Return the settings that metrics depend on, without the seed; the layout changes only rounding."""
    return {key: value for key, value in settings(config).items() if key != "run.seed"}


def _names(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Return a name per method: the settings in which the methods differ, or the folder of its first run."""
    settings_of = [_without_seed(group[0].config) for group in groups]
    keys = [key for key in settings_of[0] if any(own[key] != settings_of[0][key] for own in settings_of)]
    is_plain = all(isinstance(own[key], str | int | float) for own in settings_of for key in keys)
    folders = [group[0].folder for group in groups]
    names = [folder.resolve().name for folder in folders]
    if is_plain and 0 < len(keys) <= _MOST_IN_NAME:
        last = [key.rpartition(".")[2] for key in keys]
        labels = [short if last.count(short) == 1 else key for key, short in zip(keys, last, strict=True)]
        pairs = list(zip(labels, keys, strict=True))
        names = [" ".join(f"{label}={_shown(own[key])}" for label, key in pairs) for own in settings_of]
    return [str(folder) if names.count(name) > 1 else name for name, folder in zip(names, folders, strict=True)]


def _shown(value: str | float) -> str:
    """Return a value for the name of a method; of a long one the end, where paths differ."""
    text = format(value, "g") if isinstance(value, float) else str(value)
    return text if len(text) <= _MOST_CHARACTERS else "..." + text[3 - _MOST_CHARACTERS :]


def _bounds(name: str) -> tuple[str, str]:
    """Return the keys of the interval of an accuracy in a line of eval.jsonl."""
    return f"accuracy_low/{name}", f"accuracy_high/{name}"


def _band(values: Sequence[float]) -> Band:
    """Return the mean and the bounds over the runs that know the metric."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return Band(mean=math.nan, low=math.nan, high=math.nan)
    return Band(mean=_mean(known), low=min(known), high=max(known))


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [_number(row.get(key)) for row in rows]


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _mean(values: Sequence[float]) -> float:
    """Return the mean of the values that are known."""
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan
