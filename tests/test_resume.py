"""The whole program on two ranks in bf16, interrupted and started again: all figures equal an uninterrupted run's.

Not covered here: one rank, kill -9 (test_end_to_end), another number of ranks (test_checkpoint), GPUs, several hosts.
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
from test_end_to_end import ROOT, command, lasting, metrics, train, write_config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.save_chat_model(folder)
    return folder


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
    largest = max(checkpoint.iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def test_stopped_and_started_again_it_ends_with_the_same_figures(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Also where the newest checkpoint is damaged meanwhile, and, but for rounding, under another layout."""
    overrides = ("--parallel.pipeline", "2", "--model.dtype", "bf16", "--run.checkpoint_every", "1")
    whole, broken, other = (write_config(model, tmp_path_factory.mktemp(name)) for name in ("whole", "broken", "other"))
    finished = train(whole, *overrides)
    assert finished.returncode == 0, finished.stderr[-3000:]
    press_ctrl_c(broken, *overrides)
    shutil.copytree(broken.parent / "runs", other.parent / "runs", symlinks=True)
    *_, before, newest = sorted((broken.parent / "runs" / "tiny" / "checkpoints").glob("step_*"))
    damage(newest)
    resumed = train(broken, *overrides)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert f"WARNING: {newest} is damaged: " in resumed.stdout
    assert f"going on after step {int(before.name[-6:])}" in resumed.stdout
    expected, found = (figures(config.parent / "runs" / "tiny") for config in (whole, broken))
    assert found == expected
    resumed = train(other, *overrides[2:], "--parallel.data", "2")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "the run was tensor 1 x pipeline 2" in resumed.stdout and "but figures that agree up to" in resumed.stdout
    assert_up_to_rounding(other.parent / "runs" / "tiny", expected, first_step=int(newest.name[-6:]) + 1)


def assert_up_to_rounding(run: Path, expected: Figures, *, first_step: int) -> None:
    """The same prompts to the end, and in the first step figures that differ as those of two layouts do."""
    rows, _, rollouts = figures(run)
    assert set(rollouts) == set(expected[2])
    for name, text in rollouts.items():
        found, wanted = (
            [json.loads(line)["prompt"] for line in each.splitlines()] for each in (text, expected[2][name])
        )
        assert found == wanted, name
    for key in ("entropy", "loss/share", "grad_norm"):
        assert rows[first_step - 1][key] == pytest.approx(expected[0][first_step - 1][key], rel=0.1), key
