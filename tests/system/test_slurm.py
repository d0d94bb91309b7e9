"""A job on a real Slurm of several nodes: preempted, then without one of its nodes, it ends with the same metrics.

The nodes are daemons on one host (see slurm_cluster). Not covered here: nodes with GPUs, networks between hosts, a time
limit that is reached (Slurm sends the same signal then as here by hand), preemption by another job.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_mcpo.storage.files import step_files
from tests.support.paths import ROOT
from tests.support.program import Finished, train_forked, write_config
from tests.support.resumed_runs import Figures, figures
from tests.support.slurm_cluster import Cluster, cluster, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

SETTINGS = ("--run.steps", "30", "--parallel.data", "2")


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with cluster() as started:
        yield started


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Figures:
    """Of a run that nothing disturbed."""
    config = write_config(model, tmp_path_factory.mktemp("whole"))
    finished = train_forked(config, *SETTINGS, ranks=2)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return figures(config.parent / "runs" / "tiny")


def submit(slurm: Cluster, config: Path, *options: str, settings: tuple[str, ...] = SETTINGS) -> Finished:
    variables = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "LOGS": str(config.parent / "logs")}
    return subprocess.run(
        [sys.executable, "-m", "megatron_mcpo", "submit", *options, "--", config, *settings],
        cwd=ROOT,
        env=slurm.environment | variables,
        capture_output=True,
        text=True,
        timeout=480,
    )


class Job:
    """A run that is submitted as a user does."""

    def __init__(self, slurm: Cluster, config: Path):
        self.slurm = slurm
        self.output = config.parent / "output.txt"
        self.run = config.parent / "runs" / "tiny"
        printed = submit(slurm, config, "--parsable", f"--output={self.output}", "--time=30")
        assert printed.returncode == 0, printed.stderr
        self.number = printed.stdout.splitlines()[-1]

    def state(self, key: str) -> str:
        return self.slurm.job(self.number)[key]

    def wait(self, condition: Callable[[], bool], seconds: float = 500) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{self.printed()}\n{self.slurm.logs()}"
            time.sleep(0.1)

    def num_steps(self) -> int:
        log = self.run / "metrics.jsonl"
        return len(log.read_text().splitlines()) if log.exists() else 0

    def printed(self) -> str:
        return self.output.read_text() if self.output.exists() else ""


@pytest.mark.timeout(1800)
def test_stopped_requeued_and_bereft_of_a_node_it_ends_with_the_same_figures(
    slurm: Cluster,
    model: Path,
    tmp_path: Path,
    whole: Figures,
) -> None:
    job = Job(slurm, write_config(model, tmp_path))
    job.wait(lambda: job.num_steps() >= 3)
    assert job.state("NumNodes") == "2"
    slurm.run("scancel", "--signal=USR1", "--batch", job.number)
    job.wait(lambda: "asked to stop: ended after step" in job.printed())
    job.wait(lambda: job.state("Restarts") == "1")
    stopped_after = int(job.printed().split("asked to stop: ended after step ")[1].split(";")[0])
    assert 3 <= stopped_after < 30, "too late to tell"

    job.wait(lambda: job.num_steps() >= stopped_after + 5)
    assert f"resuming after step {stopped_after}" in job.printed(), "no step is lost"
    lost = job.state("NodeList").strip("n[]")[-1]
    assert job.state("BatchHost") != f"n{lost}"
    slurm.break_node(f"n{lost}")
    job.wait(lambda: job.state("JobState") == "COMPLETED" and job.state("Restarts") == "2")
    assert lost not in job.state("NodeList")
    assert figures(job.run) == whole


@pytest.mark.timeout(900)
def test_a_cancelled_job_saves_and_is_not_requeued(slurm: Cluster, model: Path, tmp_path: Path) -> None:
    """Its script dies, of the same SIGTERM that the ranks get."""
    job = Job(slurm, write_config(model, tmp_path))
    job.wait(lambda: job.num_steps() >= 1)
    slurm.run("scancel", job.number)
    job.wait(lambda: (job.run / "PREEMPTED").exists(), seconds=200)
    assert len(step_files(job.run / "checkpoints")) > 0
    job.wait(lambda: job.slurm.num_idle() >= 2, seconds=200)
    assert job.state("JobState") == "CANCELLED" and job.state("Restarts") == "0"


def test_what_is_refused_is_not_queued(slurm: Cluster, model: Path, tmp_path: Path) -> None:
    refused = submit(slurm, write_config(model, tmp_path), settings=("--run.steps", "0"))
    assert refused.returncode == 2 and "run.steps" in refused.stderr
    assert slurm.run("squeue", "--noheader") == ""


@pytest.mark.parametrize(("gib", "nodes"), [(0.01, "1"), (80.0, "1")], ids=["too small", "large enough"])
def test_what_does_not_fit_is_not_queued(
    slurm: Cluster,
    model: Path,
    tmp_path: Path,
    gib: float,
    nodes: str,
) -> None:
    gpu = tmp_path / "small.json"
    gpu.write_text(json.dumps({"base": "h100", "sources": ["made up"], "memory_gib": gib, "per_node": 2}))
    config, output = write_config(model, tmp_path), tmp_path / "output.txt"
    options = ("--gpu", str(gpu), "--parsable", "--hold", f"--output={output}", f"--nodes={nodes}")
    submitted = submit(slurm, config, *options)
    queued = slurm.run("squeue", "--noheader", "--format=%i").split()
    if gib > 1:
        assert submitted.returncode == 0 and queued == [submitted.stdout.strip()], submitted.stderr
        slurm.run("scancel", queued[0])
    else:
        assert submitted.returncode == 1 and queued == []
        assert "does not fit" in submitted.stderr
