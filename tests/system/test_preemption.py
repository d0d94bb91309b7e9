"""A preempted run ends its step, saves and is resumed: all its metrics equal those of a run that was not preempted.

Which phase the signal meets is tried on forked ranks, of which only the second one gets it; what torchrun does with
it, on a real launch. Not covered here: Slurm (test_slurm), GPUs, a third signal (torchrun then leaves the ranks alone).
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from megatron_mcpo.mcore.checkpoint import Checkpoints
from megatron_mcpo.mcore.policy import Policy
from megatron_mcpo.storage.files import step_files
from megatron_mcpo.trainer.collector import Collector
from megatron_mcpo.trainer.rollout_stream import RolloutStream
from tests.support.paths import ROOT
from tests.support.program import command, train_forked
from tests.support.resumed_runs import PIPELINE, Figures, figures, go_on, write_config

SEVERAL_STEPS = (*PIPELINE, "--run.checkpoint_every", "4", "--run.keep_every", "0")


def signal_in_call(owner: type, name: str, number: int) -> None:
    """Rank 1 gets SIGUSR1 when it calls the method for the `number`-th time."""
    honest: Callable[..., Any] = getattr(owner, name)
    calls = []

    def signalled(*args: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == number and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGUSR1)
        return honest(*args, **named)

    setattr(owner, name, signalled)


# In the order in which one run meets them: method, number of its call in that start, step after which the run ends.
PHASES: dict[str, tuple[type, str, int, int]] = {
    "evaluation": (Collector, "collect", 1, 0),
    "rollout": (RolloutStream, "next", 1, 1),
    "update": (Policy, "update", 1, 2),
    "save": (Checkpoints, "save", 1, 4),
    "last step": (Policy, "update", 2, 6),
}


def wants_restart(config: Path, *overrides: str) -> bool:
    """Return what a job script asks; the mark is then gone."""
    tool = [sys.executable, "-m", "megatron_mcpo", "requeue", config, *overrides]
    code = subprocess.run(tool, cwd=ROOT, timeout=180).returncode
    assert code in (0, 1)
    return code == 0


def test_in_every_phase_one_rank_s_signal_stops_all_after_the_same_step(
    model: Path,
    tmp_path: Path,
    whole: Figures,
) -> None:
    config, run = write_config(model, tmp_path), tmp_path / "runs" / "tiny"
    for phase, (owner, name, number, last) in PHASES.items():
        prepare = partial(signal_in_call, owner, name, number)
        stopped = train_forked(config, *SEVERAL_STEPS, ranks=2, prepare=prepare)
        assert stopped.returncode == 0, (phase, stopped.stderr[-3000:])
        assert f"asked to stop: ended after step {last};" in stopped.stdout, phase
        assert [step for step, _ in step_files(run / "checkpoints")][-1:] == ([last] if last else []), phase
        assert (run / "PREEMPTED").exists() and not (run / "FINISHED").exists(), phase
    go_on(model, tmp_path, *SEVERAL_STEPS)
    assert (run / "FINISHED").exists() and not (run / "PREEMPTED").exists()
    assert figures(run) == whole


def start(arguments: list[str], log: Path) -> psutil.Popen:
    with log.open("w") as output:
        return psutil.Popen(arguments, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)


def wait_until(condition: Callable[[], bool], process: psutil.Popen, log: Path) -> None:
    deadline = time.monotonic() + 400
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None, log.read_text()
        time.sleep(0.02)


def end_of_all(process: psutil.Popen, log: Path, *signals: int) -> int:
    """Send the signals to torchrun, wait for it; with it every process that it started must end."""
    family = process.children(recursive=True)
    for number in signals:
        process.send_signal(number)
        time.sleep(0.3)
    _, alive = psutil.wait_procs([process, *family], timeout=150)
    assert not alive, ("processes that outlive the run", alive, log.read_text())
    return process.returncode


def test_terminated_twice_the_program_saves_and_leaves_no_process(
    model: Path,
    tmp_path: Path,
    whole: Figures,
) -> None:
    config, run, log = write_config(model, tmp_path), tmp_path / "runs" / "tiny", tmp_path / "output.txt"
    program = start(command(config, *SEVERAL_STEPS), log)
    metrics = run / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and bool(metrics.read_text()), program, log)
    assert end_of_all(program, log, signal.SIGTERM, signal.SIGTERM) == 128 + signal.SIGTERM
    done = len(metrics.read_text().splitlines())
    assert done < 6, "the signals came too late to be tested"
    assert [step for step, _ in step_files(run / "checkpoints")][-1] == done
    assert "Traceback" not in log.read_text()
    assert wants_restart(config, *SEVERAL_STEPS)
    assert not wants_restart(config, *SEVERAL_STEPS), "once"
    go_on(model, tmp_path, *SEVERAL_STEPS)
    assert figures(run) == whole


def holds_signals(process: psutil.Process) -> bool:
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except FileNotFoundError:
        return False  # a helper of torchrun that is already gone
    blocked = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigBlk"))
    return bool(blocked >> (signal.SIGUSR1 - 1) & 1)


def test_a_signal_while_loading_ends_the_run_before_its_first_step(model: Path, tmp_path: Path) -> None:
    config, run, log = write_config(model, tmp_path), tmp_path / "runs" / "tiny", tmp_path / "output.txt"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    handled = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    arguments = [
        *torchrun,
        handled,
        "--shutdown-timeout",
        "120",
        "-m",
        "megatron_mcpo",
        "train",
        str(config),
        *PIPELINE,
    ]
    agent = start(arguments, log)
    wait_until(lambda: [holds_signals(rank) for rank in agent.children()] == [True, True], agent, log)
    assert end_of_all(agent, log, signal.SIGUSR1) == 1, "torchrun's own"
    assert "asked to stop: ended after step 0;" in log.read_text()
    assert (run / "PREEMPTED").exists() and not (run / "metrics.jsonl").exists() and not (run / "eval.jsonl").exists()
