"""The whole program on two ranks in bf16, interrupted and started again: all figures equal an uninterrupted run's.

Not covered here: one rank, kill -9 (test_end_to_end), other layouts than one (test_checkpoint), GPUs, several hosts.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
from program import ROOT, command, lasting, metrics, train_forked, write_config
from test_checkpoint_refusals import flip_a_bit

from megatron_mcpo.run_folder import step_files


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.save_chat_model(folder)
    return folder


PIPELINE = ("--parallel.pipeline", "2", "--model.dtype", "bf16", "--run.checkpoint_every", "1")
Figures = tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, str]]


def figures(run: Path) -> Figures:
    """What two equal runs agree on: metrics, held-out accuracies, every rollout."""
    evaluations = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    rollouts = {path.name: path.read_text() for path in (run / "rollouts").iterdir()}
    return lasting(metrics(run)), evaluations, rollouts


def press_ctrl_c(config: Path, *overrides: str) -> None:
    """Start the program in a process group of its own, stop it when three steps are logged; all of it must end."""
    with (config.parent / "output.txt").open("w") as output:
        process = psutil.Popen(
            command(config, *overrides), cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    log = config.parent / "runs" / "tiny" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not log.exists() or len(log.read_text().splitlines()) < 3:
        assert time.monotonic() < deadline and process.poll() is None, (config.parent / "output.txt").read_text()
        time.sleep(0.02)
    family = process.children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    _, alive = psutil.wait_procs([process, *family], timeout=30)
    assert not alive, "processes that outlive the run"


def damage(checkpoint: Path) -> None:
    flip_a_bit(max(checkpoint.iterdir(), key=lambda path: path.stat().st_size))


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Figures:
    """Of an uninterrupted run."""
    config = write_config(model, tmp_path_factory.mktemp("whole"))
    finished = train_forked(config, *PIPELINE, ranks=2)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return figures(config.parent / "runs" / "tiny")


@pytest.fixture(scope="module")
def stopped(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `runs` of a run that was stopped after a few steps."""
    config = write_config(model, tmp_path_factory.mktemp("stopped"))
    press_ctrl_c(config, *PIPELINE)
    return config.parent / "runs"


def go_on(model: Path, folder: Path, *overrides: str) -> str:
    """Start the run in `folder` again, to its end; returns what it printed."""
    resumed = train_forked(write_config(model, folder), *overrides, ranks=2)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    return resumed.stdout


def test_stopped_and_started_again_it_ends_with_the_same_figures(
    model: Path, tmp_path: Path, stopped: Path, whole: Figures
) -> None:
    """Also where the newest checkpoint was damaged meanwhile: it goes on from the one before."""
    run = shutil.copytree(stopped, tmp_path / "runs", symlinks=True) / "tiny"
    *_, before, newest = step_files(run / "checkpoints")
    damage(newest[1])
    output = go_on(model, tmp_path, *PIPELINE)
    assert f"WARNING: {newest[1]} is damaged: " in output
    assert f"going on after step {before[0]}" in output
    assert figures(run) == whole


def test_under_another_layout_it_goes_on_with_the_same_prompts(
    model: Path, tmp_path: Path, stopped: Path, whole: Figures
) -> None:
    """And, in the first step, figures that differ as those of two layouts do in bf16."""
    run = shutil.copytree(stopped, tmp_path / "runs", symlinks=True) / "tiny"
    first = step_files(run / "checkpoints")[-1][0] + 1
    output = go_on(model, tmp_path, *PIPELINE[2:], "--parallel.data", "2")
    assert "the run was tensor 1 x pipeline 2" in output and "but figures that agree up to rounding" in output
    rows, _, rollouts = figures(run)
    expected_rows, _, expected_rollouts = whole
    for key in ("entropy", "loss/share", "grad_norm"):
        assert rows[first - 1][key] == pytest.approx(expected_rows[first - 1][key], rel=0.1), key
    assert {name: prompts(text) for name, text in rollouts.items()} == {
        name: prompts(text) for name, text in expected_rollouts.items()
    }


def prompts(rollouts: str) -> list[str]:
    return [json.loads(line)["prompt"] for line in rollouts.splitlines()]
