"""The whole program on two ranks in bf16, interrupted and started again: all figures equal an uninterrupted run's.

It goes on exactly where every domain has used up its items for the first time.
Not covered here: one rank, kill -9 (test_end_to_end), other layouts than one (test_checkpoint), GPUs, several hosts.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from megatron_mcpo.config.config import load
from megatron_mcpo.storage.files import step_files
from tests.support.checkpoints import flip_a_bit
from tests.support.paths import ROOT
from tests.support.program import command, train_forked
from tests.support.resumed_runs import EPOCH, PIPELINE, Figures, figures, go_on, write_config


def press_ctrl_c(config: Path, *overrides: str) -> None:
    """Start the program in a process group of its own, stop it a step after the epoch; all of it must end."""
    with (config.parent / "output.txt").open("w") as output:
        process = psutil.Popen(
            command(config, *overrides), cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    checkpoint = config.parent / "runs" / "tiny" / "checkpoints" / f"step_{EPOCH + 1:06d}"
    deadline = time.monotonic() + 400
    while not checkpoint.exists():
        assert time.monotonic() < deadline and process.poll() is None, (config.parent / "output.txt").read_text()
        time.sleep(0.02)
    family = process.children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    _, alive = psutil.wait_procs([process, *family], timeout=120)
    assert not alive, "processes that outlive the run"


def forget_after(run: Path, step: int) -> Path:
    """Leave no later checkpoint; returns that of `step`."""
    for number, path in step_files(run / "checkpoints"):
        if number > step:
            shutil.rmtree(path)
    return step_files(run / "checkpoints")[step - 1][1]


def damage(checkpoint: Path) -> None:
    flip_a_bit(max(checkpoint.iterdir(), key=lambda path: path.stat().st_size))


@pytest.fixture(scope="module")
def stopped(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `runs` of a run that was stopped after a few steps."""
    config = write_config(model, tmp_path_factory.mktemp("stopped"))
    press_ctrl_c(config, *PIPELINE)
    return config.parent / "runs"


def test_stopped_and_started_again_it_ends_with_the_same_figures(
    model: Path, tmp_path: Path, stopped: Path, whole: Figures
) -> None:
    """Also where the newest checkpoint was damaged meanwhile: it goes on from the one before."""
    run = shutil.copytree(stopped, tmp_path / "runs", symlinks=True) / "tiny"
    newest = forget_after(run, EPOCH + 1)
    damage(newest)
    output = go_on(model, tmp_path, *PIPELINE)
    assert f"WARNING: {newest} is damaged: " in output
    assert f"resuming after step {EPOCH}" in output
    assert figures(run) == whole


def test_the_epoch_ends_where_the_run_goes_on(whole: Figures) -> None:
    steps = [set(prompts(text)) for _, text in sorted(whole[2].items())]
    assert [len(step) for step in steps] == [8] * 2 * EPOCH
    assert len(set().union(*steps[:EPOCH])) == 8 * EPOCH
    assert set().union(*steps[:EPOCH]) == set().union(*steps[EPOCH:]) and steps[0] != steps[EPOCH]


def test_under_another_layout_it_goes_on_with_the_same_prompts(
    model: Path, tmp_path: Path, stopped: Path, whole: Figures
) -> None:
    """And, in the first step, figures that differ as those of two layouts do in bf16 (1e-4 for the same tokens).

    Two engines with half the requests each may compute a logit otherwise in its last bits than one with all of them,
    on processors whose products depend on the size of a batch, and a token near a tie then becomes another. One rollout
    of 32 that differs is a partner of many, so each widens the bound by four times its share.
    """
    run = shutil.copytree(stopped, tmp_path / "runs", symlinks=True) / "tiny"
    forget_after(run, EPOCH)
    output = go_on(model, tmp_path, *PIPELINE[2:], "--parallel.data", "2")
    assert "the run was tensor 1 x pipeline 2" in output and "metrics agree up to rounding" in output
    rows, _, rollouts = figures(run)
    expected_rows, _, expected_rollouts = whole
    name = sorted(rollouts)[EPOCH]
    pairs = zip(completions(rollouts[name]), completions(expected_rollouts[name]), strict=True)
    others = [mine != theirs for mine, theirs in pairs]
    assert len(others) == 32 and sum(others) <= 3
    for key in ("entropy", "grad_norm"):
        assert rows[EPOCH][key] == pytest.approx(expected_rows[EPOCH][key], rel=0.1 + 4 * sum(others) / 32), key
    assert {name: prompts(text) for name, text in rollouts.items()} == {
        name: prompts(text) for name, text in expected_rollouts.items()
    }


def test_by_name_it_goes_on_with_other_settings_and_is_extended_with_more_data(
    model: Path, tmp_path: Path, stopped: Path, whole: Figures
) -> None:
    run = shutil.copytree(stopped, tmp_path / "runs", symlinks=True) / "tiny"
    forget_after(run, EPOCH)
    given = (*PIPELINE, "--resume", "latest", "--optimizer.lr", "5e-3", "--rewards.timeout", "77")
    output = go_on(model, tmp_path, *given)
    assert "optimizer.lr: 0.002 before, 0.005 from here on" in output and f"resuming after step {EPOCH}" in output
    rows, expected = figures(run)[0], whole[0]
    assert rows[:EPOCH] == expected[:EPOCH] and len(rows) == len(expected)
    assert [row["lr"] for row in rows[EPOCH:]] == pytest.approx([2.5 * row["lr"] for row in expected[EPOCH:]])
    assert rows[EPOCH]["reward/mean"] == expected[EPOCH]["reward/mean"], "the same weights have sampled"
    assert load(run / "config.toml").rewards.timeout == 77 and (run / "FINISHED").exists()

    config = write_config(model, tmp_path)
    refused = train_forked(config, *given, ranks=2)
    assert refused.returncode == 2 and f"run.steps = {2 * EPOCH}: must be above {2 * EPOCH}" in refused.stderr
    config.write_text(config.read_text().replace(f"items = {4 * EPOCH}", f"items = {4 * EPOCH + 4}"))
    extended = train_forked(config, *given, "--run.steps", str(2 * EPOCH + 1), ranks=2)
    assert extended.returncode == 0, extended.stderr[-3000:]
    assert f"0 of {4 * EPOCH} items were removed or changed, 4 were added" in extended.stdout
    assert figures(run)[0][: 2 * EPOCH] == rows and len(figures(run)[0]) == 2 * EPOCH + 1
    config.write_text(config.read_text().replace(f"items = {4 * EPOCH + 4}", f"items = {4 * EPOCH - 4}"))
    fewer = train_forked(config, *given, "--run.steps", str(2 * EPOCH + 2), ranks=2)
    counts = "8 of 16 items were removed or changed, 0 were added"
    assert fewer.returncode == 2 and counts in fewer.stderr
    foreseen = train_forked(config, *given, "--run.steps", str(2 * EPOCH + 2), "--dry-run", ranks=2)
    assert foreseen.returncode == 2 and counts in foreseen.stderr


def prompts(rollouts: str) -> list[str]:
    return [json.loads(line)["prompt"] for line in rollouts.splitlines()]


def completions(rollouts: str) -> list[str]:
    """By prompt, because layouts deal prompts to ranks in different orders."""
    rows = sorted(map(json.loads, rollouts.splitlines()), key=lambda row: row["prompt"])
    return [row["completion"] for row in rows]
