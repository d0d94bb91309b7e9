"""Faults in every phase of a run: what it survives, how it ends otherwise, and that nothing is lost.

One run of two pipeline stages goes through one fault after the other, is started again each time, and has the figures
of an undisturbed run in the end. All phases with all faults: `python -m benchmarks.faults`, whose table is in
docs/reliability.md. Tested elsewhere:

- SIGKILL: in a save, test_checkpoint_refusals and test_checkpoint_background; of the whole job, test_end_to_end
- SIGTERM in every phase: test_preemption; by Slurm: test_slurm
- disk full: test_full_disk, test_checkpoint_disk; read-only folder: test_run_folder
- a flipped bit in a checkpoint: test_checkpoint_refusals; in synced weights: test_end_to_end (swapped tensors)
- gradients that are not finite: test_policy, test_end_to_end
- death of an engine that is a server: test_vllm_server; of a verifier: test_rewards, test_scorer
- when which rank is called silent: test_liveness

Not covered: several hosts, GPUs, processes that the kernel can't kill.
"""

import ctypes
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest

from megatron_mcpo.storage.files import step_files
from tests.support.disks import disk
from tests.support.faults import Ranks, at_phase, fill_tmp, jump_clock, kill_verifiers, running, signal_self
from tests.support.paths import ROOT
from tests.support.program import command
from tests.support.resumed_runs import PIPELINE, Figures, figures, write_config

LIMIT = 16
"""run.collective_timeout: ranks beat every 2 s and are called silent after 8 s."""


class Run:
    """A run in a folder, which goes on with every start."""

    def __init__(self, model: Path, folder: Path):
        self.config = write_config(model, folder)
        self.folder = folder / "runs" / "tiny"
        self.log = folder / "log.txt"

    @property
    def saved(self) -> list[int]:
        return [step for step, _ in step_files(self.folder / "checkpoints")]

    @contextmanager
    def start(self, prepare: Callable[[], None], *overrides: str) -> Iterator[Ranks]:
        arguments = ["train", str(self.config), *PIPELINE, "--run.collective_timeout", str(LIMIT), *overrides]
        with running(arguments, ranks=2, log=self.log, prepare=prepare) as ranks:
            yield ranks


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(model, tmp_path_factory.mktemp("faults"))


def stop(rank: int, *places: tuple[str, int]) -> None:
    """Let a rank stop, as by SIGSTOP, in phases for the n-th time."""
    for phase, number in places:
        at_phase(phase, partial(signal_self, signal.SIGSTOP), rank=rank, number=number)


def hang() -> None:
    while True:
        time.sleep(1.0)


def test_a_rank_that_stops_is_named_and_welcomed_back_or_ends_the_job(run: Run) -> None:
    with run.start(partial(stop, 1, ("score", 2), ("update", 2))) as ranks:
        ranks.wait_for("has been silent for", timeout=400)
        os.kill(ranks.pids[1], signal.SIGCONT)
        ranks.wait_for("WATCHDOG: rank 1 is back after", timeout=60)
        assert ranks.codes(timeout=200) == [1, -signal.SIGKILL]
        words = ranks.output
    named = rf"WATCHDOG: rank 1 \({os.uname().nodename}, pid {ranks.pids[1]}\) has been silent for \d+ s, last seen in"
    assert len(re.findall(named, words)) == 2, words
    assert f"(run.collective_timeout = {LIMIT}): the job ends here" in words
    assert "WATCHDOG:   rank 0: in update of step 2" in words
    assert "WATCHDOG: rank 0: what its threads do" in words and "schedule.py" in words
    assert "Traceback" not in words
    assert run.saved == [1]


def test_asked_to_stop_the_job_does_not_wait_for_a_rank_that_can_not(run: Run) -> None:
    with run.start(partial(stop, 1, ("rollout", 2))) as ranks:
        ranks.wait_for("engine/trainer log-prob mismatch", timeout=400)
        for pid in ranks.pids:
            os.kill(pid, signal.SIGTERM)
        start = time.monotonic()
        assert ranks.codes(timeout=200) == [1, -signal.SIGKILL]
        assert time.monotonic() - start < 60
        assert "WATCHDOG: the job was asked to stop, and can't save without every rank" in ranks.output
    assert run.saved == [1]


def test_the_next_rank_judges_where_the_first_is_silent(run: Run) -> None:
    with run.start(partial(stop, 0, ("sync", 2))) as ranks:
        assert ranks.codes(timeout=400) == [-signal.SIGKILL, 1]
        assert "WATCHDOG:   rank 0 (" in ranks.output and "WATCHDOG:   rank 1: in " in ranks.output


def test_ranks_that_live_but_do_not_work_end_the_job(run: Run) -> None:
    with run.start(partial(at_phase, "update", hang, number=1)) as ranks:
        assert ranks.codes(timeout=400) == [1, 1]
        words = ranks.output
    assert "WATCHDOG: no rank has made any progress for" in words
    assert "WATCHDOG:   ranks 0-1: in update of step 2" in words and " in hang" in words


def test_a_crash_of_native_code_leaves_its_stack(run: Run) -> None:
    with run.start(partial(at_phase, "update", partial(ctypes.string_at, 0), number=1)) as ranks:
        assert ranks.codes(timeout=400) == [1, -signal.SIGSEGV]
        assert "Fatal Python error: Segmentation fault" in ranks.output and "in _train" in ranks.output
        assert (
            "update of step 2: another rank has ended; its own words" in ranks.output
            and "Traceback" not in ranks.output
        )


def test_too_many_failed_verifications_are_a_line(run: Run) -> None:
    with run.start(partial(at_phase, "score", kill_verifiers, number=1), "--rewards.max_error_rate", "0") as ranks:
        assert ranks.codes(timeout=400) == [1, 1]
        assert "verifiers failed on " in ranks.output and "worker died (exit code -9)" in ranks.output
        assert "Traceback" not in ranks.output


def survivable(folder: Path) -> None:
    """Let a clock jump, and the folder of temporary files fill up."""
    at_phase("rollout", partial(jump_clock, -86400.0), number=2)
    at_phase("update", partial(fill_tmp, folder), rank=0, number=1)


def test_nothing_was_lost(run: Run, whole: Figures, model: Path, tmp_path: Path) -> None:
    """The run goes on to its end, also on a clock that jumps and with a full folder of temporary files."""
    with disk(tmp_path / "tmp", 1 << 16) as full, run.start(partial(survivable, full)) as ranks:
        assert ranks.codes(timeout=400) == [0, 0], ranks.output
    assert figures(run.folder) == whole


@contextmanager
def launched(model: Path, folder: Path) -> Iterator[tuple[psutil.Popen, list[psutil.Process]]]:
    """Start the program as a user does; provide its process and, once they have begun, those of its ranks."""
    config = write_config(model, folder)
    with (folder / "log").open("w") as log:
        launcher = psutil.Popen(command(config, *PIPELINE), cwd=ROOT, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 400
        while len(ranks := [each for each in launcher.children() if holds_signals(each)]) < 2:
            assert time.monotonic() < deadline and launcher.poll() is None
            time.sleep(0.05)
        yield launcher, ranks
    finally:
        for process in [*launcher.children(recursive=True), launcher] if launcher.is_running() else []:
            process.kill()


def holds_signals(process: psutil.Process) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    blocked = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigBlk"))
    return bool(blocked >> (signal.SIGUSR1 - 1) & 1)


def test_ctrl_c_ends_a_rank_that_can_not_answer(model: Path, tmp_path: Path) -> None:
    with launched(model, tmp_path) as (launcher, ranks):
        ranks[1].suspend()
        launcher.send_signal(signal.SIGINT)
        _, alive = psutil.wait_procs([launcher, *ranks], timeout=90)
        assert not alive and launcher.returncode == 130
    words = (tmp_path / "log").read_text()
    assert "interrupted: steps after the last checkpoint are lost; the same command would " in words
    assert "Traceback" not in words


def test_a_rank_that_was_killed_is_named_by_the_launcher(model: Path, tmp_path: Path) -> None:
    with launched(model, tmp_path) as (launcher, ranks):
        ranks[1].kill()
        _, alive = psutil.wait_procs([launcher, *ranks], timeout=120)
        assert not alive and launcher.returncode == 128 + signal.SIGKILL
    assert "rank 1 of 2 was ended by SIGKILL: usually by the kernel, because memory ran out" in (
        (tmp_path / "log").read_text()
    )


def test_too_few_open_files_are_refused(model: Path, tmp_path: Path) -> None:
    """The soft limit is raised as far as the hard one allows."""
    start = command(write_config(model, tmp_path), "--dry-run")
    for limit, code in (("-n 64", 2), ("-Sn 64", 0)):
        shell = ["bash", "-c", f'ulimit {limit}; exec "$@"', "bash", *start]
        ended = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert ended.returncode == code, ended.stderr
        assert ("ulimit -n = 64: must be at least 1024" in ended.stderr) == (code == 2)


def test_ranks_end_with_their_launcher(model: Path, tmp_path: Path) -> None:
    with launched(model, tmp_path) as (launcher, ranks):
        launcher.kill()
        _, alive = psutil.wait_procs([launcher, *ranks], timeout=60)
        assert not alive
