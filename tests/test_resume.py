"""The whole program on two ranks in bf16, interrupted and started again: all figures equal an uninterrupted run's.

Not covered here: one rank, kill -9 (test_end_to_end), another number of ranks (test_checkpoint), GPUs, several hosts.
"""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
from program import ROOT, command, lasting, metrics, train, train_forked, write_config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.save_chat_model(folder)
    return folder


def figures(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, str]]:
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


def test_stopped_and_started_again_it_ends_with_the_same_figures(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    overrides = ("--parallel.pipeline", "2", "--model.dtype", "bf16")
    whole, broken = (write_config(model, tmp_path_factory.mktemp(name)) for name in ("whole", "broken"))
    finished = train_forked(whole, *overrides, ranks=2)
    assert finished.returncode == 0, finished.stderr[-3000:]
    press_ctrl_c(broken, *overrides)
    resumed = train(broken, *overrides)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "going on after step 2" in resumed.stdout
    expected, found = (figures(config.parent / "runs" / "tiny") for config in (whole, broken))
    assert found == expected
