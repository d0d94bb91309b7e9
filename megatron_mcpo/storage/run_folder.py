"""Create, resume and truncate run folders. Imports no torch.

DIR/NAME/
  config.toml       resolved configuration      metrics.jsonl      one object per step
  eval.jsonl        one object per evaluation   notes.jsonl        other messages, with the step they followed
  report.html       all of it on one page       tensorboard/       the same metrics as event files
  rollouts/         step_000012.jsonl           representations/   step_000012.npz
  items.npz         digests of the items        trackers/          ids of their runs, wandb's files; only with trackers
  checkpoints/                                  plots/
  FINISHED          written by `finish`         PREEMPTED          the run was preempted: start it again
DIR/latest -> NAME
"""

import errno
import itertools
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_mcpo.config.config import Config, ConfigError, dump, load
from megatron_mcpo.storage.files import read_jsonl, step_files, whole_lines, write_atomically
from megatron_mcpo.storage.run_lock import RunLock
from megatron_mcpo.storage.run_settings import changes, differences, fixed_problems, identity

CONFIG, METRICS, EVALUATIONS, NOTES = "config.toml", "metrics.jsonl", "eval.jsonl", "notes.jsonl"
PREEMPTED = "PREEMPTED"
FOLDERS = ("tensorboard", "rollouts", "representations", "checkpoints", "plots")

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """The folder of this run, locked by this process for as long as it lives (or until `close`)."""

    path: Path
    resumed: bool
    """True where the folder held a run that goes on."""
    notes: tuple[str, ...]
    """Why each folder of the same name was skipped, or which settings of the run change. For the console."""
    lock: RunLock
    config: Config

    @staticmethod
    def open(config: Config) -> "RunFolder":
        """Create or resume the folder of a run; called by one rank.

        Where run.resume names a run, that run goes on with these settings. Otherwise it is the first of NAME, NAME-2,
        NAME-3, ... that does not exist, or (run.resume = "auto") that holds an unfinished run whose configuration
        differs in NEUTRAL_KEYS and LIMITS (run_settings.py), [parallel] and engine.servers only. Nothing that exists is
        overwritten.
        Raises ConfigError when run.dir can't be written, run.name can't be used, another process holds the folder, or
        the run that is named can't go on with these settings.
        """
        parent, name = Path(config.run.dir), config.run.name
        if name.startswith(".") or name == "latest":
            raise ConfigError(
                [f"run.name = {name!r}: must not be 'latest' or begin with a dot (both are used here). Choose another"]
            )
        try:
            parent.mkdir(exist_ok=True)
            named = named_run(config)
            folder = _go_on(named, config) if named else _create_or_reuse(parent, config)
            if folder.path.parent == parent:
                _point_latest(parent, folder.path.name)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise ConfigError(
                [
                    f"run.dir = {config.run.dir!r}: must be a folder that can be written ({reason}). "
                    "Choose another with --run.dir PATH"
                ]
            ) from error
        return folder

    def adopt_settings(self) -> None:
        """Make the present configuration that of the run, once its checkpoint was loaded with it."""
        text = dump(self.config).encode()
        if (self.path / CONFIG).read_bytes() != text:
            write_atomically(self.path / CONFIG, text)
        _remove(self.path / "FINISHED")

    def truncate_after(self, step: int) -> int:
        """Drop what was logged after `step`, the step of the checkpoint that the run resumes from.

        Return how many training steps that were logged are dropped.

        A killed run has logged steps after its last checkpoint; they are repeated, and logged again. Lines of
        metrics.jsonl, eval.jsonl and notes.jsonl and files of rollouts/ and representations/ are removed, and so are
        incomplete lines. -1 drops everything: without a checkpoint even the evaluation of step 0 is repeated.
        """
        dropped = {name: _truncate_lines(self.path / name, step) for name in (METRICS, EVALUATIONS, NOTES)}
        for name in ("rollouts", "representations"):
            for leftover in (self.path / name).glob(".*.tmp"):
                leftover.unlink()
            for number, path in step_files(self.path / name):
                if number > step:
                    path.unlink()
        return dropped[METRICS]

    def evaluated(self, step: int) -> bool:
        """Tell whether eval.jsonl has a line of this step (a run killed between checkpoint and evaluation has none)."""
        return any(row["step"] == step for row in read_jsonl(self.path / EVALUATIONS))

    def finish(self) -> None:
        """Mark the run as complete: it is never resumed, and the next launch gets a new folder."""
        write_atomically(self.path / "FINISHED", b"")

    def mark_preempted(self) -> None:
        """Mark the run as preempted; the next start removes the mark."""
        write_atomically(self.path / PREEMPTED, b"")

    def close(self) -> None:
        """Release the lock before the process ends."""
        self.lock.close()


def forecast(config: Config) -> list[str]:
    """Return what a start with this configuration would do, of which `resume_problems` found nothing wrong."""
    named = named_run(config)
    if named:
        return [_resumption(named), *changes(load(named / CONFIG), config)]
    notes: list[str] = []
    for path in _candidates(Path(config.run.dir), config.run.name):
        if not path.exists() or not any(_entries(path)):
            return [*notes, f"would begin {path}"]
        obstacle = _why_not_resumed(path, config)
        if obstacle is None:
            return [*notes, _resumption(path), *changes(load(path / CONFIG), config)]
        notes.append(f"{path} {obstacle}")
    raise AssertionError("itertools.count ended")


def _resumption(path: Path) -> str:
    steps = [step for step, _ in step_files(path / "checkpoints")]
    return f"would resume {path} " + (
        f"after step {steps[-1]}" if steps else "from its start: it has no checkpoint yet"
    )


def take_preempted_mark(config: Config) -> bool:
    """Tell whether the run that this configuration would resume was preempted, and remove its mark.

    So a start that fails before it opens the folder is not requested a second time.
    """
    path = _resumable(config)
    return path is not None and _remove(path / PREEMPTED)


def restore_preempted_mark(config: Config) -> None:
    """Undo `take_preempted_mark` where the run could not be started again."""
    path = _resumable(config)
    if path is not None:
        write_atomically(path / PREEMPTED, b"")


def _resumable(config: Config) -> Path | None:
    """Return the folder that this configuration would resume; None where it would begin a new one."""
    named = named_run(config)
    if named:
        return named if not named_run_problems(named, config) else None
    for path in _candidates(Path(config.run.dir), config.run.name):
        if not path.exists():
            return None
        if _why_not_resumed(path, config) is None:
            return path
    raise AssertionError("itertools.count ended")


def run_that_goes_on(config: Config) -> Path | None:
    """Return the folder of the run that this configuration would resume from a checkpoint; None for a new beginning."""
    path = _resumable(config)
    return path if path is not None and step_files(path / "checkpoints") else None


def named_run(config: Config) -> Path | None:
    """Return the folder of the run that run.resume names, by name in run.dir or by path; None for auto and never."""
    name = config.run.resume
    if name in ("auto", "never"):
        return None
    inside = Path(config.run.dir) / name
    path = inside if (inside / CONFIG).is_file() else Path(name)
    return path.resolve() if path.is_symlink() else path


def resume_problems(config: Config) -> list[str]:
    """Return why the run that run.resume names can't go on with this configuration; empty where it names none."""
    path = named_run(config)
    return [] if path is None else named_run_problems(path, config)


def named_run_problems(path: Path, config: Config) -> list[str]:
    """Return why the run in a folder, which run.resume names, can't go on with this configuration."""
    where = f"run.resume = {config.run.resume!r}"
    if not (path / CONFIG).is_file():
        return [f"{where}: must be auto, never, latest, or a run's name or folder (no {path / CONFIG}). Correct it."]
    try:
        theirs = load(path / CONFIG)
    except ConfigError as error:
        return [f"{where}: {problem}" for problem in error.problems]
    problems = fixed_problems(theirs, config)
    if config.model.init_from not in (None, theirs.model.init_from):
        problems.append(
            f"model.init_from = {config.model.init_from!r}: must not be set for a run that goes on ({path} has weights "
            "of its own). Leave it out, or begin a new run without --resume"
        )
    if (path / "FINISHED").exists() and config.run.steps <= theirs.run.steps:
        problems.append(
            f"run.steps = {config.run.steps}: must be above {theirs.run.steps} ({path} is finished after as many). "
            "Raise it to extend the run, or begin a new run from the checkpoint with --init-from"
        )
    return problems


def _go_on(path: Path, config: Config) -> RunFolder:
    """Return the folder of a run that was asked for by name. Raises ConfigError where it can't go on."""
    problems = named_run_problems(path, config)
    if problems:
        raise ConfigError(problems)
    lock = RunLock(path)
    _remove(path / PREEMPTED)
    return _resumed(path, config, lock, ())


def _resumed(path: Path, config: Config, lock: RunLock, notes: tuple[str, ...]) -> RunFolder:
    # Started again with this file, the run resumes itself.
    own = config.model_copy(update={"run": config.run.model_copy(update={"resume": "auto"})})
    return RunFolder(
        path=path, resumed=True, notes=(*notes, *changes(load(path / CONFIG), config)), lock=lock, config=own
    )


def _create_or_reuse(parent: Path, config: Config) -> RunFolder:
    notes: list[str] = []
    for path in _candidates(parent, config.run.name):
        lock = None if path.exists() and any(_entries(path)) else _create(path, config)
        if lock is not None:
            notes += [f"a new run begins in {path}"] if notes else []
            return RunFolder(path=path, resumed=False, notes=tuple(notes), lock=lock, config=config)
        obstacle = _why_not_resumed(path, config)
        if obstacle is None:
            lock = RunLock(path)
            _remove(path / PREEMPTED)
            return _resumed(path, config, lock, tuple(notes))
        notes.append(f"{path} {obstacle}")
    raise AssertionError("itertools.count ended")


def _remove(path: Path) -> bool:
    """Delete a file; tell whether it existed."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def _candidates(parent: Path, name: str) -> Iterator[Path]:
    yield parent / name
    for number in itertools.count(2):
        yield parent / f"{name}-{number}"


def _entries(path: Path) -> list[Path]:
    """Return the entries of a folder; a file in its place is its own entry."""
    return list(path.iterdir()) if path.is_dir() else [path]


def _create(path: Path, config: Config) -> RunLock | None:
    """Create a run folder, complete and locked from the moment it has its name; None where another was faster."""
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        staging.chmod(0o777 & ~_umask())
        lock = RunLock(staging)
        for name in FOLDERS:
            (staging / name).mkdir()
        write_atomically(staging / CONFIG, dump(config).encode())
        os.rename(staging, path)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            return None
        raise
    return lock


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _why_not_resumed(path: Path, config: Config) -> str | None:
    """Return why an existing folder can't be resumed by this configuration, None where it can."""
    if config.run.resume == "never":
        return 'exists, and run.resume is "never"'
    if (path / "FINISHED").exists():
        return "is finished"
    try:
        theirs = load(path / CONFIG)
    except (ConfigError, OSError):
        return "has no configuration that can be read"
    different = differences(identity(theirs), identity(config))
    return f"has other settings ({', '.join(different)})" if different else None


def _point_latest(parent: Path, name: str) -> None:
    temporary = parent / f".latest.{os.getpid()}.tmp"
    try:
        temporary.unlink(missing_ok=True)
        os.symlink(name, temporary)
        os.replace(temporary, parent / "latest")
    except OSError as error:
        temporary.unlink(missing_ok=True)
        log.warning("%s: can't be made to point to %s (%s)", parent / "latest", name, error.strerror)


def _truncate_lines(path: Path, step: int) -> int:
    """Drop the lines after a step, and incomplete ones; return how many whole lines were dropped."""
    if not path.exists():
        return 0
    content = path.read_bytes()
    lines = list(whole_lines(content.splitlines()))
    kept = [line for line, row in lines if row["step"] <= step]
    text = b"".join(line + b"\n" for line in kept)
    if text != content:
        write_atomically(path, text)
    return len(lines) - len(kept)
