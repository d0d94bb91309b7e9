"""Write a run's metrics (files, TensorBoard, trackers), rollouts and representations.

Logging never ends a training run. If the disk or a tracker fails, a warning says so the first time, `failures` counts
every time, and lines of the .jsonl files wait in memory until the disk takes them again.
"""

import importlib.util
import io
import json
import logging
import math
import os
import threading
import tomllib
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_mcpo.config.config import Config, ConfigError
from megatron_mcpo.storage.files import read_jsonl, step_file, write_atomically
from megatron_mcpo.storage.run_folder import CONFIG, EVALUATIONS, METRICS, NOTES

PROJECT = "megatron_mcpo"
TRACKER_FOLDER = "trackers"
"""What trackers keep in the run folder."""

log = logging.getLogger(__name__)


class MetricsLog:
    """The log of one run's metrics in every place that was asked for; used by one rank.

    `failures` counts writes that did not succeed at once.
    """

    def __init__(self, folder: Path, trackers: Sequence[str]):
        """Open the sinks. A resumed run calls RunFolder.truncate_after first: what metrics.jsonl holds then is kept.

        Raises ConfigError if a tracker cannot be started.
        """
        self.failures = 0
        self._steps = _JsonLines(folder / METRICS)
        self._evaluations = _JsonLines(folder / EVALUATIONS)
        self._notes = _JsonLines(folder / NOTES)
        self._sinks: dict[str, Sink] = {}
        self._warned: set[str] = set()
        steps = [row["step"] for row in read_jsonl(folder / METRICS)]
        self._guard("TensorBoard", lambda: self._add_tensorboard(folder, first_step=max(steps, default=0) + 1))
        for name in trackers:
            self._sinks[name] = _start_tracker(name, folder)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics of one training step; values that are not finite become null."""
        self._write(METRICS, self._steps, step, values, order=sorted(values))
        self._to_sinks(step, values)

    def log_eval(self, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics of one held-out evaluation, which metric_table.EVALUATION describes."""
        self._write(EVALUATIONS, self._evaluations, step, values, order=list(values))
        self._to_sinks(step, {f"eval/{name}": value for name, value in values.items()})

    def log_note(self, step: int, text: str) -> None:
        """Write a message that was printed after `step`."""
        self._guard(NOTES, lambda: self._notes.append({"step": step, "text": text}))

    def close(self) -> None:
        """End the trackers' runs."""
        for name, sink in self._sinks.items():
            self._guard(name, sink.close)
        self._sinks.clear()

    def _add_tensorboard(self, folder: Path, first_step: int) -> None:
        self._sinks["TensorBoard"] = _TensorBoard(folder, first_step)

    def _write(
        self, name: str, lines: "_JsonLines", step: int, values: Mapping[str, float], order: Sequence[str]
    ) -> None:
        record = {"step": step, **{key: _finite_or_none(values[key]) for key in order}}
        self._guard(name, lambda: lines.append(record))

    def _to_sinks(self, step: int, values: Mapping[str, float]) -> None:
        finite = {key: float(value) for key, value in sorted(values.items()) if math.isfinite(value)}
        for name, sink in self._sinks.items():
            self._guard(name, lambda sink=sink: sink.log(step, finite))

    def _guard(self, name: str, action: Any) -> None:
        try:
            action()
        except Exception as error:  # a tracker's client may raise anything
            self.failures += 1
            if name not in self._warned:
                self._warned.add(name)
                log.warning(
                    "%s: could not be written (%s); training continues, further failures are counted", name, error
                )


class Sink(Protocol):
    """A further destination of metrics; closed once."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the finite metrics of a step; a step may come twice (training and evaluation)."""

    def close(self) -> None:
        """End the destination's run."""


def check_trackers(config: Config) -> list[str]:
    """Return a problem for each tracker of run.trackers whose package is missing; import none of them."""
    return [problem for name in config.run.trackers if (problem := _missing(name))]


def write_rollouts(folder: Path, step: int, rows: Iterable[Mapping[str, Any]]) -> bool:
    """Write rollouts/step_NNNNNN.jsonl, one object per row; pure ASCII, whatever the model wrote.

    Returns False, after a warning, if the disk does not take it.
    """
    lines = [json.dumps({"step": step, **row}, allow_nan=False, default=_plain) + "\n" for row in map(_no_nan, rows)]
    return _write_step(step_file(folder, "rollouts", step, ".jsonl"), "".join(lines).encode())


def write_representations(
    folder: Path, step: int, *, z: np.ndarray, domain: np.ndarray, prompt: np.ndarray, correct: np.ndarray
) -> bool:
    """Write representations/step_NNNNNN.npz.

    z: [M, D] float16 or float32; domain: [M] index into the configuration's domains; prompt: [M] number of the prompt
    in this step; correct: [M] bool
    Returns False, after a warning, if the disk does not take it.
    """
    assert z.ndim == 2 and domain.shape == prompt.shape == correct.shape == z.shape[:1], (z.shape, domain.shape)
    content = io.BytesIO()
    np.savez(content, z=z, domain=domain.astype(np.int32), prompt=prompt.astype(np.int32), correct=correct.astype(bool))
    return _write_step(step_file(folder, "representations", step, ".npz"), content.getvalue())


def _write_step(path: Path, content: bytes) -> bool:
    try:
        write_atomically(path, content)
    except OSError as error:
        log.warning("%s: could not be written (%s); training continues", path, error.strerror)
        return False
    return True


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _no_nan(value: Any) -> Any:
    """Return the same value with None for every float that JSON does not have."""
    if isinstance(value, float):
        return _finite_or_none(value)
    if isinstance(value, Mapping):
        return {key: _no_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_no_nan(item) for item in value]
    return value


def _plain(value: Any) -> Any:
    """Convert a number of numpy or torch to Python's."""
    if hasattr(value, "item"):
        return _no_nan(value.item())
    raise TypeError(f"{type(value).__name__} cannot be written to a JSON file")


class _JsonLines:
    """A file of whole lines; a line that the disk takes only in part is cut off and tried again with the next one."""

    def __init__(self, path: Path):
        self._path = path
        self._waiting = b""

    def append(self, record: Mapping[str, Any]) -> None:
        """Append a record as a line. Raises OSError if it has to wait."""
        self._waiting += json.dumps(record, allow_nan=False, default=_plain).encode() + b"\n"
        with self._path.open("ab", buffering=0) as file:
            whole = file.seek(0, os.SEEK_END)
            try:
                written = 0
                while written < len(self._waiting):
                    written += file.write(self._waiting[written:])
            except OSError:
                file.truncate(whole)
                raise
        self._waiting = b""


class _TensorBoard:
    """Event files. After a failed write the writer is unusable, so later steps are not sent to it."""

    def __init__(self, folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = _without_writer
        # Events of steps that the interrupted run logged after its checkpoint are hidden: they come again.
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step if first_step > 1 else 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is None:
            raise OSError("an earlier write failed")
        try:
            for key, value in values.items():
                self._writer.add_scalar(key, value, step)
            self._writer.flush()
        except Exception:
            self._writer = None
            raise

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _without_writer(failure: threading.ExceptHookArgs) -> None:
    """Print what ended a thread, but not for TensorBoard's writer: `log` raises its error in the main thread."""
    if type(failure.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(failure)


class _Wandb:
    def __init__(self, folder: Path, settings: dict[str, Any]):
        import wandb

        run_id = _kept_id(folder, "wandb", uuid.uuid4().hex)
        self._run = wandb.init(
            project=PROJECT,
            name=folder.name,
            id=run_id,
            resume="allow",
            dir=str(folder / TRACKER_FOLDER),
            config=settings,
        )
        # wandb's own counter only goes up, and drops the steps that a resumed run logs again; ours is a metric.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    def __init__(self, folder: Path, settings: dict[str, Any]):
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(PROJECT)
        path = folder / TRACKER_FOLDER / "mlflow_run_id"
        known = path.read_text() if path.exists() else None
        run = mlflow.start_run(run_id=known, run_name=None if known else folder.name)
        _kept_id(folder, "mlflow", run.info.run_id)
        if not known:
            mlflow.log_params(_dotted(settings))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        # Its file store makes folders of the slashes, and then has no room for both "kl" and "kl/<domain>".
        self._mlflow.log_metrics({key.replace("/", "."): value for key, value in values.items()}, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class _Trackio:
    def __init__(self, folder: Path, settings: dict[str, Any]):
        import trackio

        self._run = trackio.init(
            project=PROJECT, name=_kept_id(folder, "trackio", f"{folder.name}-{uuid.uuid4().hex[:6]}"),
            resume="allow", config=settings, embed=False,
        )  # fmt: skip

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


_TRACKERS: dict[str, Any] = {"wandb": _Wandb, "mlflow": _Mlflow, "trackio": _Trackio}


def _start_tracker(name: str, folder: Path) -> Sink:
    if problem := _missing(name):
        raise ConfigError([problem])
    config = folder / CONFIG
    settings = tomllib.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    try:
        (folder / TRACKER_FOLDER).mkdir(exist_ok=True)
        sink: Sink = _TRACKERS[name](folder, settings)
    except Exception as error:  # not logged in, no network, a server of another version
        text = " ".join(str(error).split())[:300]
        raise ConfigError([f"run.trackers: {name} must start ({text}). Set it up, or take it off the list."]) from error
    return sink


def _missing(name: str) -> str | None:
    """Return the problem of a tracker that is not installed, None if it is."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    # A folder that merely has the name (wandb/ and mlruns/ lie about where they were used) has no origin.
    if spec is not None and spec.origin is not None:
        return None
    return f"run.trackers: {name} must be installed. Run `pip install {name}`, or take it off the list."


def _kept_id(folder: Path, tracker: str, new: str) -> str:
    """Return the name by which a tracker knows this run: the first one it was given, also after a resume."""
    path = folder / TRACKER_FOLDER / f"{tracker}_run_id"
    if not path.exists():
        write_atomically(path, new.encode())
    return path.read_text()


def _dotted(settings: Mapping[str, Any]) -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for section, table in settings.items():
        values = table.items() if isinstance(table, dict) else [("", table)]
        pairs |= {f"{section}.{key}".rstrip("."): value for key, value in values}
    return pairs
