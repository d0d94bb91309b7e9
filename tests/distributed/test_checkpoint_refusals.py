"""Checkpoints that are damaged, hostile, of another run, or left behind by a killed one; what is kept and what goes.

Not covered here: what a loaded checkpoint goes on with (test_checkpoint), file systems that lose what was synced, GPUs.
"""

import errno
import io
import json
import os
import pickle
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_mcpo.config.config import Config, ConfigError
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.mcore.checkpoint import Checkpoints
from megatron_mcpo.storage import checkpoint_files
from megatron_mcpo.storage.checkpoint_files import MANIFEST
from megatron_mcpo.weights import safe_unpickler
from tests.support import tiny_models
from tests.support.checkpoints import build, checkpoints_of, distance, flip_a_bit, learn, settings, weights
from tests.support.ranks import run_ranks

TWO = Layout(data=2)
SHARD = "__0_0.distcp"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("model")
    tiny_models.save_model(folder, "tied")
    return settings(folder, "fp32")


@pytest.fixture(scope="module")
def written(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run with the checkpoints of two steps, written by two ranks."""
    folder = tmp_path_factory.mktemp("written")
    run_ranks(2, save_steps, config, folder, range(1, 3))
    return folder


def save_steps(config: Config, folder: Path, steps: range) -> None:
    """Make an update and a checkpoint per step."""
    policy = build(config, TWO)
    for step in steps:
        learn(policy, step)
        checkpoints_of(policy, folder).save(step, {"step": step})


def load_each(config: Config, folders: list[Path]) -> list[str]:
    """Return what one policy says of checkpoints that it must not load: the error, or the step of what it loaded."""
    policy = build(config, TWO)
    said = []
    for folder in folders:
        try:
            found = checkpoints_of(policy, folder).load()
            said.append(f"loaded {found.step if found else None}")
        except ConfigError as error:
            said.append(str(error))
    return said


def copy_of_newest(written: Path, folder: Path) -> Path:
    return shutil.copytree(written / "step_000002", folder / "step_000002")


def rewrite_manifest(checkpoint: Path) -> None:
    """As somebody does who has changed the files and wants them loaded."""
    measured = checkpoint_files.measure(checkpoint, checkpoint_files.names(checkpoint))
    table = {name: asdict(each) for name, each in measured.items()}
    (checkpoint / MANIFEST).write_text(json.dumps({"files": table}))


def replace_by_link(path: Path) -> None:
    elsewhere = path.rename(path.parent.parent / path.name)
    path.symlink_to(elsewhere)


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bit": (lambda path: flip_a_bit(path / SHARD), f"{SHARD} is not as it was written"),
    "flipped bit in the contents": (lambda path: flip_a_bit(path / ".metadata"), ".metadata is not as it was written"),
    "truncated": (lambda path: os.truncate(path / SHARD, 1000), f"{SHARD} has 1000 bytes, {MANIFEST} says "),
    "missing shard": (lambda path: (path / SHARD).unlink(), f"{SHARD} is missing"),
    "missing state": (lambda path: (path / "state.json").unlink(), "state.json is missing"),
    "another's file": (lambda path: (path / "common.pt").touch(), f"common.pt is not in {MANIFEST}"),
    "link": (lambda path: replace_by_link(path / SHARD), f"{SHARD} can't be read (is not a regular file)"),
    "pipe": (lambda path: replace_by_pipe(path / MANIFEST), f"{MANIFEST} can't be read as a manifest"),
    "missing manifest": (lambda path: (path / MANIFEST).unlink(), f"{MANIFEST} is missing"),
    "half a manifest": (lambda path: os.truncate(path / MANIFEST, 100), f"{MANIFEST} can't be read as a manifest"),
    "manifest of other types": (
        lambda path: (path / MANIFEST).write_text(f'{{"files": {{"{SHARD}": {{"bytes": 1, "sha256": 2}}}}}}'),
        f"{MANIFEST} can't be read as a manifest",
    ),
    "wrong manifest": (
        lambda path: (path / MANIFEST).write_text('{"files": 3}'),
        f"{MANIFEST} can't be read as a manifest",
    ),
    "empty": (lambda path: [file.unlink() for file in path.iterdir()], f"{MANIFEST} is missing"),
}


def said_by_two(config: Config, folders: list[Path]) -> list[str]:
    """Return what two ranks say, which must be the same."""
    first, second = run_ranks(2, load_each, config, folders)
    assert first == second
    return first


def test_damage_is_named_and_nothing_starts_from_scratch(config: Config, written: Path, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in DAMAGE]
    for folder, (damage, _) in zip(folders, DAMAGE.values(), strict=True):
        damage(copy_of_newest(written, folder))
    for folder, said, (_, expected) in zip(folders, said_by_two(config, folders), DAMAGE.values(), strict=True):
        first, last = said.splitlines()
        assert first.startswith(f"{folder}/step_000002 is damaged: ") and expected in first
        assert last.startswith(
            "no undamaged checkpoint is left to resume from; put one back, or start a new run with --run.resume"
        )


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch '{self.marker}'",))


def marker_of(checkpoint: Path) -> Path:
    return checkpoint.parent / "code has run"


def write_evil_contents(path: Path) -> None:
    (path / ".metadata").write_bytes(pickle.dumps(Evil(marker_of(path))))


def write_evil_object(path: Path, key: str) -> None:
    """Write an object that runs code where the table of contents points to one of Megatron's objects."""
    contents = safe_unpickler.read_metadata(path)
    stored = io.BytesIO()
    torch.save([Evil(marker_of(path))], stored)
    (path / "evil").write_bytes(stored.getvalue())
    place = next(index for index in contents.storage_data if index.fqn == key)
    contents.storage_data[place].relative_path = "evil"
    contents.storage_data[place].offset, contents.storage_data[place].length = 0, len(stored.getvalue())
    (path / ".metadata").write_bytes(pickle.dumps(contents))


def edit_model(path: Path, **values: Any) -> None:
    model = json.loads((path / "state.json").read_text())["model"]
    edit_json(path / "state.json", model={**model, **values})


OF_ANOTHER: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "newer format": (lambda path: edit_json(path / "state.json", format=4), ["format = 4", "must be 3", "resume with"]),
    "older format": (lambda path: edit_json(path / "state.json", format=2), ["format = 2", "must be 3", "resume with"]),
    "no format": (lambda path: (path / "state.json").write_text("{}"), ["format = None"]),
    "no list": (lambda path: (path / "state.json").write_text("[]"), ["format = None"]),
    "no number": (lambda path: edit_json(path / "state.json", version="3"), ["version = '3'"]),
    "other model": (
        lambda path: edit_model(path, hidden_size=64, family="qwen2"),
        ["model.hidden_size = 64, that of model.path has 72", "model.family = 'qwen2'", "set model.path"],
    ),
    "other vocabulary": (
        lambda path: edit_json(path / "state.json", vocabulary="words"),
        ["vocabulary = 'words', the tokenizer of model.path has 'tokens'", "set model.path"],
    ),
    "missing shard": (lambda path: (path / SHARD).unlink(), [f"shard {SHARD} is missing"]),
    "truncated shard": (lambda path: os.truncate(path / SHARD, 1000), ["can't be loaded"]),
    "no contents": (lambda path: os.truncate(path / ".metadata", 100), [".metadata is no table of contents"]),
    "evil contents": (write_evil_contents, [".metadata names posix.system", "it was not opened"]),
    "evil state": (lambda path: write_evil_object(path, "common_state/shard_0_1"), ["can't be loaded", "Weights only"]),
    "evil object": (lambda path: write_evil_object(path, "rng/shard_0_2"), ["can't be loaded", "Weights only"]),
}


def test_what_is_not_this_runs_is_refused_and_runs_no_code(config: Config, written: Path, tmp_path: Path) -> None:
    """The manifest is right in all of them: whoever can change the files can write it anew."""
    folders = [tmp_path / name for name in OF_ANOTHER]
    for folder, (change, _) in zip(folders, OF_ANOTHER.values(), strict=True):
        checkpoint = copy_of_newest(written, folder)
        change(checkpoint)
        rewrite_manifest(checkpoint)
    for folder, said, (_, words) in zip(folders, said_by_two(config, folders), OF_ANOTHER.values(), strict=True):
        assert [word for word in [str(folder / "step_000002"), *words] if word not in said] == [], said
        assert "--run.resume never" in said
        assert not marker_of(folder / "step_000002").exists()


def test_the_hostile_checkpoint_is_hostile(written: Path, tmp_path: Path) -> None:
    """An ordinary unpickler runs its code; otherwise the test above would show nothing."""
    path = copy_of_newest(written, tmp_path)
    write_evil_contents(path)
    pickle.loads((path / ".metadata").read_bytes())  # noqa: S301 - written above
    assert marker_of(path).exists()


def test_a_damaged_checkpoint_is_skipped_and_replaced(config: Config, written: Path, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    flip_a_bit(tmp_path / "step_000002" / SHARD)

    def go_on() -> dict[str, Tensor]:
        policy = build(config, TWO)
        found = checkpoints_of(policy, tmp_path).load()
        assert found is not None
        assert (found.step, found.state, policy.version) == (1, {"step": 1}, 1)
        (skipped,) = found.skipped
        assert "step_000002 is damaged" in skipped and SHARD in skipped
        learn(policy, 2)
        checkpoints_of(policy, tmp_path).save(2, {"step": 2})
        return weights(policy)

    def load() -> dict[str, Tensor]:
        policy = build(config, TWO)
        assert checkpoints_of(policy, written).load() is not None
        return weights(policy)

    with_detour, without = run_ranks(2, go_on), run_ranks(2, load)
    assert distance(with_detour[0], without[0])[0] == 0.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000001", "step_000002"]


@pytest.mark.parametrize(
    ("moment", "left", "goes_on_after"),
    [
        ("publish", [".step_000003.tmp", "step_000001", "step_000002"], 2),
        ("prune", ["step_000001", "step_000002", "step_000003"], 3),
    ],
)
def test_a_kill_while_saving_leaves_a_checkpoint_to_go_on_from(
    config: Config,
    written: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    left: list[str],
    goes_on_after: int,
) -> None:
    """kill -9 after the shards are written and before the checkpoint has its name; and after that."""
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    with monkeypatch.context() as context, pytest.raises(RuntimeError, match="rank 0: died without a traceback"):
        context.setattr(checkpoint_files, moment, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        run_ranks(2, save_steps, config, tmp_path, range(3, 4))
    assert sorted(path.name for path in tmp_path.iterdir()) == left

    def go_on() -> int:
        policy = build(config, TWO)
        found = checkpoints_of(policy, tmp_path).load()
        assert found is not None and found.skipped == ()
        checkpoints_of(policy, tmp_path).save(4, {})
        return found.step

    assert run_ranks(2, go_on) == [goes_on_after] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step_{goes_on_after:06d}", "step_000004"]


def test_a_file_that_can_not_be_written_is_an_error_and_leaves_the_others(
    config: Config, written: Path, tmp_path: Path
) -> None:
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)

    def save_into_little() -> None:
        policy = build(config, TWO)
        learn(policy, 0)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(RuntimeError, match=r"step_000003: can't be written \(rank 0: OSError: .*File too large"):
            checkpoints_of(policy, tmp_path).save(3, {})
        assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000001", "step_000002"]
        found = checkpoints_of(policy, tmp_path).load()
        assert found is not None and found.step == 2

    run_ranks(2, save_into_little)


def test_a_policy_that_has_not_learned_yet_is_saved_and_loaded(config: Config, tmp_path: Path) -> None:
    """As after a first step whose gradient was not finite."""

    def first_update(before: Callable[[Checkpoints], object]) -> dict[str, Tensor]:
        policy = build(config, TWO)
        before(checkpoints_of(policy, tmp_path))
        learn(policy, 0)
        return weights(policy)

    plain, saved, loaded = (
        run_ranks(2, first_update, before)[0]
        for before in (lambda _: None, lambda checkpoints: checkpoints.save(1, {}), Checkpoints.load)
    )
    assert distance(saved, plain)[0] == distance(loaded, plain)[0] == 0.0


def test_loading_nothing_is_no_error(config: Config, tmp_path: Path) -> None:
    assert run_ranks(2, lambda: checkpoints_of(build(config, TWO), tmp_path).load()) == [None, None]


def test_the_newest_and_every_nth_are_kept(tmp_path: Path) -> None:
    for step in range(2, 13, 2):
        (tmp_path / f"step_{step:06d}").mkdir()
        (tmp_path / f"step_{step:06d}" / "file").touch()
    (tmp_path / "notes").mkdir()
    checkpoint_files.prune(tmp_path, newest=10, keep=2, keep_every=4)
    kept = ["notes", "step_000004", "step_000008", "step_000010"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
    checkpoint_files.prune(tmp_path, newest=10, keep=1, keep_every=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step_000010"]


def test_what_can_not_or_must_not_be_deleted_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that was moved to another disk and linked back, a stray file, a folder that stays."""
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "checkpoints"
    for path in (elsewhere, *(folder / f"step_{step:06d}" for step in (2, 3, 4))):
        path.mkdir(parents=True)
        (path / "file").touch()
    (folder / "step_000001").symlink_to(elsewhere)
    (folder / "step_000099").touch()
    real = shutil.rmtree

    def rmtree(path: Path, **given: Any) -> None:
        if "step_000003" in str(path) and not given:
            raise PermissionError(errno.EACCES, "Permission denied")
        real(path, **given)

    with monkeypatch.context() as context:
        context.setattr(shutil, "rmtree", rmtree)
        (warning,) = checkpoint_files.prune(folder, newest=4, keep=1, keep_every=0)
    assert warning.startswith(f"WARNING: {folder / '.step_000003.old.tmp'}: can't be deleted (Permission denied)")
    assert (elsewhere / "file").exists()
    names = [".step_000003.old.tmp", "step_000001", "step_000004", "step_000099"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert checkpoint_files.prune(folder, newest=4, keep=1, keep_every=0) == []


@pytest.mark.parametrize("num_parts", [1, 2, 3, 8])
def test_every_file_is_read_by_exactly_one(written: Path, tmp_path: Path, num_parts: int) -> None:
    path = copy_of_newest(written, tmp_path)
    files = checkpoint_files.names(path)
    assert MANIFEST not in files and len(files) >= 5
    for name in files:
        flip_a_bit(path / name)
    found = [checkpoint_files.problems(path, part=part, num_parts=num_parts) for part in range(num_parts)]
    assert sorted(problem.split()[0] for part in found for problem in part) == sorted(files)
    assert max(map(len, found)) - min(map(len, found)) <= 1
