"""Where the files of a run lie, who may write there, and what a resumed run keeps. Imports no torch.

DIR/NAME/
  config.toml       resolved configuration      metrics.jsonl      one object a step
  eval.jsonl        one object an evaluation    notes.jsonl        what else was said, with the step it followed
  report.html       all of it on one page       tensorboard/       the same figures as event files
  rollouts/         step_000012.jsonl           representations/   step_000012.npz
  checkpoints/      plots/                      trackers/          ids of their runs, wandb's files; only with trackers
  FINISHED          written by `finish`             PREEMPTED            stopped to make room: wants to be started again
DIR/latest -> NAME
"""

import errno
import fcntl
import itertools
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mcpo.config.config import Config, ConfigError, dump, load
from megatron_mcpo.storage.files import read_jsonl, step_files, try_lock, whole_lines, write_atomically

CONFIG, METRICS, EVALUATIONS, NOTES = "config.toml", "metrics.jsonl", "eval.jsonl", "notes.jsonl"
PREEMPTED = "PREEMPTED"
FOLDERS = ("tensorboard", "rollouts", "representations", "checkpoints", "plots")

# Keys that change neither a figure nor a weight of the run, bit for bit: a run may be resumed with other values.
# Not among them: run.steps (the learning-rate schedule spans it) and the engine's sizes (they change the composition
# of decoding batches, and with it the rounding of log-probs).
NEUTRAL_KEYS = frozenset(
    {
        "run.name",
        "run.dir",
        "run.resume",
        "run.trackers",
        "run.checkpoint_every",
        "run.keep_checkpoints",
        "run.keep_every",
        "engine.engine_check_every",
        "engine.verify_sync",
        "contrastive.diagnose_every",
        "model.offload_reference",
        "optimizer.offload",
        "rewards.workers",
    }
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """The folder of this run, locked by this process for as long as it lives (or until `close`)."""

    path: Path
    resumed: bool
    """True where the folder held an unfinished run with the same settings."""
    notes: tuple[str, ...]
    """For every folder of the same name that was passed over: why. For the console."""
    lock: "Lock"

    @staticmethod
    def open(config: Config) -> "RunFolder":
        """Create or reuse the folder of a run; called by one rank.

        The first of NAME, NAME-2, NAME-3, ... that does not exist, or (run.resume = "auto") that holds an unfinished
        run whose configuration differs in NEUTRAL_KEYS, [parallel] and engine.servers only. Nothing that exists is
        overwritten.
        Raises ConfigError when run.dir can't be written, run.name can't be used, or another process holds the folder.
        """
        parent, name = Path(config.run.dir), config.run.name
        if name.startswith(".") or name == "latest":
            raise ConfigError(
                [f"run.name = {name!r}: 'latest' and names that begin with a dot are taken; choose another"]
            )
        try:
            parent.mkdir(exist_ok=True)
            folder = _create_or_reuse(parent, config)
            _point_latest(parent, folder.path.name)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise ConfigError(
                [f"run.dir = {config.run.dir!r}: can't write there ({reason}); choose another with --run.dir PATH"]
            ) from error
        return folder

    def truncate_after(self, step: int) -> None:
        """Drop what was logged after `step`, the step of the checkpoint that the run goes on from.

        A killed run has logged steps that its last checkpoint knows nothing of; they are run, and logged, again.
        Lines of metrics.jsonl, eval.jsonl and notes.jsonl and files of rollouts/ and representations/ go; a
        half-written line goes too. -1 drops everything: without a checkpoint even the evaluation of step 0 is made
        again.
        """
        for name in (METRICS, EVALUATIONS, NOTES):
            _truncate_lines(self.path / name, step)
        for name in ("rollouts", "representations"):
            for leftover in (self.path / name).glob(".*.tmp"):
                leftover.unlink()
            for number, path in step_files(self.path / name):
                if number > step:
                    path.unlink()

    def evaluated(self, step: int) -> bool:
        """Whether eval.jsonl has a line of this step (a run killed between checkpoint and evaluation has none)."""
        return any(row["step"] == step for row in read_jsonl(self.path / EVALUATIONS))

    def finish(self) -> None:
        """Mark the run as complete: it is never resumed, the next launch gets a folder of its own."""
        write_atomically(self.path / "FINISHED", b"")

    def mark_preempted(self) -> None:
        """Mark the run as one that stopped to make room. Whoever starts it again takes the mark away."""
        write_atomically(self.path / PREEMPTED, b"")

    def close(self) -> None:
        """Give the lock back before the process ends."""
        self.lock.close()


def take_preempted_mark(config: Config) -> bool:
    """Whether the run that this configuration would go on with wants to be started again; the mark is then gone.

    So a start that fails before it opens the folder is not asked for a second time.
    """
    path = _resumable(config)
    return path is not None and _remove(path / PREEMPTED)


def restore_preempted_mark(config: Config) -> None:
    """Undo `take_preempted_mark`: nobody could start the run again."""
    path = _resumable(config)
    if path is not None:
        write_atomically(path / PREEMPTED, b"")


def _resumable(config: Config) -> Path | None:
    """The folder that this configuration would go on in; None: it would begin a new one."""
    for path in _candidates(Path(config.run.dir), config.run.name):
        if not path.exists():
            return None
        if _why_not_resumed(path, config) is None:
            return path
    raise AssertionError("itertools.count ended")


def _create_or_reuse(parent: Path, config: Config) -> RunFolder:
    notes: list[str] = []
    for path in _candidates(parent, config.run.name):
        lock = None if path.exists() and any(_entries(path)) else _create(path, config)
        if lock is not None:
            notes += [f"a new run begins in {path}"] if notes else []
            return RunFolder(path=path, resumed=False, notes=tuple(notes), lock=lock)
        obstacle = _why_not_resumed(path, config)
        if obstacle is None:
            lock = Lock(path)
            _remove(path / PREEMPTED)
            return RunFolder(path=path, resumed=True, notes=tuple(notes), lock=lock)
        notes.append(f"{path} {obstacle}")
    raise AssertionError("itertools.count ended")


def _remove(path: Path) -> bool:
    """Whether the file was there."""
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
    """What lies in a folder; a file that stands in its place counts as itself."""
    return list(path.iterdir()) if path.is_dir() else [path]


def _create(path: Path, config: Config) -> "Lock | None":
    """Create a run folder, complete and locked from the moment it has its name; None when another was faster."""
    draft = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        draft.chmod(0o777 & ~_umask())
        lock = Lock(draft)
        for name in FOLDERS:
            (draft / name).mkdir()
        write_atomically(draft / CONFIG, dump(config).encode())
        os.rename(draft, path)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            return None
        raise
    return lock


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _why_not_resumed(path: Path, config: Config) -> str | None:
    """Why an existing folder is not this run's, or None when it is."""
    if config.run.resume == "never":
        return 'exists, and run.resume is "never"'
    if (path / "FINISHED").exists():
        return "is finished"
    try:
        theirs = load(path / CONFIG)
    except (ConfigError, OSError):
        return "holds no configuration that can be read"
    different = differences(settings(theirs), settings(config))
    return f"has other settings ({', '.join(different)})" if different else None


def settings(config: Config) -> dict[str, Any]:
    """Values by dotted key, without the neutral ones and the layout of trainer and engines; a list counts as one value.

    A checkpoint can be loaded under any layout. The figures are then the same up to rounding, and the console says so.
    """
    values: dict[str, Any] = {"domain": config.model_dump()["domain"]}
    for section, table in config.model_dump(exclude={"domain", "parallel"}).items():
        values |= {f"{section}.{key}": value for key, value in table.items()}
    return {key: value for key, value in values.items() if key not in NEUTRAL_KEYS | {"engine.servers"}}


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Which settings are not the same: three of them with both values, and how many more."""
    keys = [key for key in ours if theirs[key] != ours[key]]
    shown = [key if isinstance(ours[key], list) else f"{key} {theirs[key]} there, {ours[key]} here" for key in keys[:3]]
    return [*shown, f"and {len(keys) - 3} more"] if len(keys) > 3 else shown


class Lock:
    """Holds a run folder. The kernel lets go when this process ends, however it ends."""

    def __init__(self, path: Path):
        """Raises ConfigError when another process holds the folder."""
        self._descriptor: int | None = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            without = try_lock(self._descriptor, fcntl.LOCK_EX)
        except BlockingIOError:
            owner = os.read(self._descriptor, 200).decode(errors="replace") or "unknown"
            self.close()
            raise ConfigError(
                [
                    f"run.name: {path} is in use by another process ({owner}); stop it or wait for it, "
                    "or start a second run with --run.resume never or another --run.name"
                ]
            ) from None
        if without:
            log.warning("%s: this file system has no locks (%s); don't start a run twice", path, without)
        os.truncate(self._descriptor, 0)
        os.write(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        # A forked worker shares the lock: left behind by a killed trainer, it would keep the next one out.
        os.register_at_fork(after_in_child=self.close)

    def close(self) -> None:
        """Let go; nothing happens when that was done before."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _point_latest(parent: Path, name: str) -> None:
    temporary = parent / f".latest.{os.getpid()}.tmp"
    try:
        temporary.unlink(missing_ok=True)
        os.symlink(name, temporary)
        os.replace(temporary, parent / "latest")
    except OSError as error:
        temporary.unlink(missing_ok=True)
        log.warning("%s: can't be pointed at %s (%s)", parent / "latest", name, error.strerror)


def _truncate_lines(path: Path, step: int) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    kept = b"".join(line + b"\n" for line, row in whole_lines(content.splitlines()) if row["step"] <= step)
    if kept != content:
        write_atomically(path, kept)
