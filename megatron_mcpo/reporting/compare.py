"""Runs side by side, from the files of their folders; runs that differ in their seed alone are one method.

Imports no torch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mcpo.config.config import Config, ConfigError, load
from megatron_mcpo.reporting.accuracy import Transfer, backward_transfer
from megatron_mcpo.reporting.plots import Curve, smoothed, smoothing_window, write_curves
from megatron_mcpo.reporting.summary import summary_window
from megatron_mcpo.storage.files import read_jsonl
from megatron_mcpo.storage.run_folder import CONFIG, EVALUATIONS, METRICS
from megatron_mcpo.storage.run_settings import differences, settings

_NEEDED = (CONFIG, METRICS)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run's folder says: rows of metrics.jsonl (one at least) and of eval.jsonl."""

    folder: Path
    config: Config
    steps: tuple[dict[str, Any], ...]
    evaluations: tuple[dict[str, Any], ...]
    finished: bool


@dataclass(frozen=True, kw_only=True)
class Band:
    """A figure of a method: mean over its runs, between the lowest and the highest of them.

    Of an accuracy of one run: between the bounds of its 95 % interval. NaN: not known.
    """

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Method:
    """Runs with the same settings but for their seed."""

    name: str
    runs: tuple[Run, ...]

    @property
    def seeds(self) -> list[int]:
        return [run.config.run.seed for run in self.runs]

    def reward(self, name: str, window: int) -> Band:
        """Of a domain, or mean: over the last `window` steps of each run."""
        return _band([_mean(_series(run.steps[-window:], f"reward/{name}")) for run in self.runs])

    def accuracy(self, name: str) -> Band:
        """Held-out, of a domain, or mean or worst: of each run's last evaluation."""
        rows = [run.evaluations[-1] if run.evaluations else {} for run in self.runs]
        if len(rows) == 1:
            mean, low, high = (_number(rows[0].get(key)) for key in (name, *_bounds(name)))
            return Band(mean=mean, low=low, high=high)
        return _band([_number(row.get(name)) for row in rows])

    def reward_curve(self, name: str) -> Curve:
        """Smoothed; of the steps that all runs have."""
        curve = self._curve([run.steps for run in self.runs], f"reward/{name}")
        window = smoothing_window(len(curve.steps))
        values, low, high = (smoothed(series, window) for series in (curve.values, curve.low, curve.high))
        return Curve(label=self.name, steps=curve.steps, values=values.tolist(), low=low.tolist(), high=high.tolist())

    def accuracy_curve(self, name: str) -> Curve:
        """Of the evaluations that all runs have."""
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
    """The methods in the order of their first runs. window: last steps that a reward is the mean of."""

    methods: tuple[Method, ...]
    domains: tuple[str, ...]
    window: int

    def transfer(self, method: Method) -> Transfer:
        """Held-out accuracies against the first method's."""
        now, first = ({name: m.accuracy(name).mean for name in self.domains} for m in (method, self.methods[0]))
        return backward_transfer(now, {name: value for name, value in first.items() if not math.isnan(value)})

    def differences(self, method: Method) -> list[str]:
        """Settings that are not the first method's."""
        first, own = (_without_seed(m.runs[0].config) for m in (self.methods[0], method))
        return differences(first, own)

    def notes(self) -> list[str]:
        """What makes figures hard to compare."""
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
                f"held-out accuracies are of different questions; evaluation.items: {', '.join(map(str, items))}"
            )
        if len(measured) > 1:
            ways = ", ".join(f"{k} at temperature {temperature:g}" for k, temperature in sorted(measured))
            notes.append(f"held-out accuracies are not of the same kind; responses an item: {ways}")
        for method in self.methods:
            if len(set(method.seeds)) < len(method.runs):
                notes.append(f"{method.name}: several runs have the same seed: {', '.join(map(str, method.seeds))}")
        return notes

    def write_plots(self, folder: Path) -> list[Path]:
        """Write reward.png and accuracy.png, a panel a domain and one of their mean. Raises OSError."""
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
    """Read the runs and group them. Raises ConfigError with all problems: folders that are no runs, or come twice."""
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
        problems.append(f"{', '.join(twice)}: one run given twice; leave one of them out")
    if problems:
        raise ConfigError(problems)
    groups: list[list[Run]] = []
    for run in runs:
        same = [g for g in groups if _without_seed(g[0].config) == _without_seed(run.config)]
        if same:
            same[0].append(run)
        else:
            groups.append([run])
    return Comparison(
        methods=tuple(Method(name=_name(g, groups), runs=tuple(g)) for g in groups),
        domains=tuple(dict.fromkeys(name for run in runs for name in run.config.domain_names)),
        window=min(summary_window(len(run.steps)) for run in runs),
    )


def _read(folder: Path) -> Run:
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    if missing:
        what = "no such folder" if not folder.is_dir() else f"is no run's folder, {' and '.join(missing)} missing"
        raise ConfigError([f"{folder}: {what}; give runs/NAME of a run that has logged a step"])
    steps = read_jsonl(folder / METRICS)
    if not steps:
        raise ConfigError([f"{folder}: its metrics.jsonl holds no step; wait for one"])
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
    """Everything that the figures depend on but the seed; not the layout, which changes their rounding alone."""
    return {key: value for key, value in settings(config).items() if key != "run.seed"}


def _name(runs: Sequence[Run], groups: Sequence[Sequence[Run]]) -> str:
    """The first run's folder; with its path where another method's first run has the same name."""
    names = [group[0].folder.resolve().name for group in groups]
    own = runs[0].folder.resolve().name
    return own if names.count(own) == 1 else str(runs[0].folder)


def _bounds(name: str) -> tuple[str, str]:
    """Keys of the interval of an accuracy in a line of eval.jsonl."""
    return f"accuracy_low/{name}", f"accuracy_high/{name}"


def _band(values: Sequence[float]) -> Band:
    """Of runs that know the figure."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return Band(mean=math.nan, low=math.nan, high=math.nan)
    return Band(mean=_mean(known), low=min(known), high=max(known))


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [_number(row.get(key)) for row in rows]


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _mean(values: Sequence[float]) -> float:
    """Of those that are known."""
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan
