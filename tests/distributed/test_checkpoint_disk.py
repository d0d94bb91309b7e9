"""Checkpoints on disks that are too small: small file systems in memory, made for each test.

Not covered here: quotas, network file systems, several hosts.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_mcpo.config.config import Config, ConfigError
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.mcore.checkpoint import Checkpoints
from megatron_mcpo.storage.checkpoint_files import staging_of
from megatron_mcpo.weights.mapping import checkpoint_bytes
from tests.support import tiny_models
from tests.support.checkpoints import build, checkpoints_of, close_gate, in_background, learn, names, settings, until
from tests.support.disks import disk
from tests.support.ranks import run_ranks

TWO = Layout(tensor=2, sequence=True)


def fill(folder: Path) -> Path:
    """Leave no byte free."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(b"\0" * 4096):
                pass
        except OSError:
            return path
    raise AssertionError


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("model")
    tiny_models.save_model(folder, "untied")
    return settings(folder, "fp32")


@pytest.fixture(scope="module")
def size(config: Config, tmp_path_factory: pytest.TempPathFactory) -> int:
    """Bytes of a checkpoint, which are those that the run expects, nearly."""
    folder = tmp_path_factory.mktemp("size")

    def save() -> tuple[int, int]:
        checkpoints = checkpoints_of(build(config, TWO), folder)
        checkpoints.in_background = True
        checkpoints.save(1, {})
        assert checkpoints._under_way is not None
        needed = checkpoints._under_way[1].num_bytes
        checkpoints.finish()
        return needed, checkpoint_bytes(checkpoints.policy.model_config, element_size=4)

    (needed, approximate), _ = run_ranks(2, save)
    found = sum(path.stat().st_size for path in (folder / "step_000001").iterdir())
    assert found <= needed <= 1.1 * found + (1 << 20)
    assert approximate == pytest.approx(found, rel=0.25), "most of the difference is what torch puts around tensors"
    return found


def error_of(work: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as caught:
        work()
    return str(caught.value)


def same(said: list[str]) -> str:
    assert len(set(said)) == 1
    return said[0]


def test_a_save_without_room_is_refused_before_it_writes(config: Config, size: int, tmp_path: Path) -> None:
    """Room for three, where four are to be kept and one more is being written."""

    def save_four(folder: Path) -> tuple[str, list[str]]:
        checkpoints = checkpoints_of(build(config, TWO), folder)
        checkpoints.keep = 4
        warnings = checkpoints.warnings()
        for step in (1, 2, 3):
            checkpoints.save(step, {})
        error = error_of(lambda: checkpoints.save(4, {}))
        found = checkpoints.load()
        assert found is not None and (found.step, found.skipped) == (3, ())
        return error, warnings

    with disk(tmp_path / "disk", 3 * size + (2 << 20)) as folder:
        results = run_ranks(2, save_four, folder)
        assert names(folder) == ["step_000001", "step_000002", "step_000003"]
    error = same([error for error, _ in results])
    assert "step_000004: can't be written: it needs " in error and "bytes, the disk has " in error
    assert "rank" not in error, "nobody has tried"
    for _, (warning,) in results:
        assert warning.startswith("WARNING: ") and "but 5 more checkpoints" in warning


def test_a_disk_with_room_is_not_warned_of(config: Config, size: int, tmp_path: Path) -> None:
    """Three are needed; those that are there already count."""

    def warnings(folder: Path) -> list[list[str]]:
        checkpoints = checkpoints_of(build(config, TWO), folder)
        before = checkpoints.warnings()
        checkpoints.save(1, {})
        return [before, checkpoints.warnings()]

    with disk(tmp_path / "disk", 3 * size + (1 << 20)) as folder:
        assert run_ranks(2, warnings, folder) == [[[], []]] * 2


@pytest.mark.parametrize("moment", ["shards", "contents"])
def test_a_disk_that_fills_up_meanwhile_leaves_the_others(
    config: Config, size: int, tmp_path: Path, moment: str
) -> None:
    """While the ranks write, or when all have written and rank 0 adds what belongs to all. Nothing hangs."""

    def save_two(folder: Path) -> str:
        policy = build(config, TWO)
        checkpoints = in_background(policy, folder)
        checkpoints.save(1, {})
        checkpoints.finish()
        gate = close_gate()
        checkpoints.save(2, {})
        learn(policy, 0)
        if moment == "contents":
            gate.set()
            until(lambda: checkpoints._under_way is not None and checkpoints._under_way[1].is_written)
        with_all(checkpoints, lambda: fill(folder))
        gate.set()
        error = error_of(checkpoints.finish)
        with_all(checkpoints, (folder / "filler").unlink)
        found = checkpoints.load()
        assert found is not None and (found.step, found.skipped) == (1, ())
        checkpoints.save(3, {})
        checkpoints.finish()
        return error

    with disk(tmp_path / "disk", 3 * size + (2 << 20)) as folder:
        error = same(run_ranks(2, save_two, folder))
        assert names(folder) == ["step_000001", "step_000003"]
        assert not staging_of(folder / "step_000002").exists()
    assert "step_000002: can't be written: it needs " in error and "OSError: [Errno 28] No space left" in error


def with_all(checkpoints: Checkpoints, work: Callable[[], object]) -> None:
    """Done by rank 0 while all wait."""
    groups = checkpoints.policy.groups
    groups.host.barrier().wait()
    if groups.rank == 0:
        work()
    groups.host.barrier().wait()
