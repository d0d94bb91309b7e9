"""The whole program on two ranks, interrupted and started again: all figures equal an uninterrupted run's, bit for bit.

Not covered here: one rank (test_end_to_end), another number of ranks (test_checkpoint), GPUs, several hosts.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
from test_end_to_end import ROOT, command, lasting, metrics, train, write_config

Stop = Callable[[psutil.Popen, list[psutil.Process]], None]
EVALUATED = ("--evaluation.every", "2")


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


def interrupt(config: Path, stop: Stop, *overrides: str) -> None:
    """Start the program in a process group of its own and stop it when three steps are logged; all of it must end."""
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
    stop(process, family)
    _, alive = psutil.wait_procs([process, *family], timeout=30)
    assert not alive, "processes that outlive the run"


def press_ctrl_c(process: psutil.Popen, _family: list[psutil.Process]) -> None:
    os.killpg(process.pid, signal.SIGINT)


def kill_all(process: psutil.Popen, family: list[psutil.Process]) -> None:
    """torchrun first: it would otherwise see its ranks die and clean up."""
    for victim in (process, *family):
        victim.kill()


@pytest.mark.parametrize(
    ("stop", "overrides"),
    [
        (press_ctrl_c, ("--parallel.pipeline", "2", "--model.dtype", "bf16", *EVALUATED)),
        (kill_all, ("--parallel.data", "2", *EVALUATED)),
    ],
    ids=["ctrl-c, pipeline, bf16", "kill -9, data, fp32"],
)
def test_stopped_and_started_again_it_ends_with_the_same_figures(
    model: Path, tmp_path_factory: pytest.TempPathFactory, stop: Stop, overrides: tuple[str, ...]
) -> None:
    whole, broken = (write_config(model, tmp_path_factory.mktemp(name)) for name in ("whole", "broken"))
    finished = train(whole, *overrides)
    assert finished.returncode == 0, finished.stderr[-3000:]
    interrupt(broken, stop, *overrides)
    resumed = train(broken, *overrides)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "going on after step 2" in resumed.stdout
    expected, found = (figures(config.parent / "runs" / "tiny") for config in (whole, broken))
    assert found == expected
