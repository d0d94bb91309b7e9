"""The scripts of a Slurm job without a Slurm: what is read from sbatch's options, and a requeue that fails.

What a real Slurm makes of them: test_slurm.py. Not covered: options of sbatch in variables (SBATCH_GPUS_PER_NODE).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mcpo.cli import options, submit
from megatron_mcpo.cli.launch import first_failure
from megatron_mcpo.config.config import load
from megatron_mcpo.storage.run_folder import RunFolder
from tests.support import tiny_run
from tests.support.paths import ROOT
from tests.support.program import write_config

# Of rank -> (second, exit status): the one that the launcher names.
FAILURES: list[tuple[dict[int, tuple[int, int]], int]] = [
    ({0: (7, 1), 1: (7, 1)}, 0),
    ({0: (9, 1), 1: (7, 3)}, 1),
    ({0: (7, 1), 1: (7, -9)}, 1),  # rank 0 lost the connection to a rank that was killed
    ({0: (7, 1), 1: (8, -11)}, 1),
    ({0: (7, 1), 1: (7, -15)}, 0),  # torchrun ended rank 1, because rank 0 had failed
    ({0: (7, 1), 1: (37, -9)}, 0),
]

SCRIPT = "#!/bin/bash\n#SBATCH --nodes=2\n#SBATCH --time=1\n"


@pytest.mark.parametrize(
    ("options", "nodes", "gpus"),
    [
        ([], 2, None),
        (["-N4"], 4, None),
        (["-N", "4"], 4, None),
        (["-HN4"], 4, None),
        (["--nodes=4"], 4, None),
        (["--nodes", "4", "--nodelist=n[1-4]"], 4, None),
        (["-N4", "--nodes=3"], 3, None),
        (["--gpus-per-node=4"], 2, 4),
        (["--gpus-per-node", "h100:4", "-t", "60"], 2, 4),
        (["--gres=gpu:4"], 2, 4),
        (["--gres=license:1,gpu:h100:4(S:0-1)"], 2, 4),
        (["--gres=gpu"], 2, 1),
        (["--gres-flags=enforce-binding", "--gres", "shard:1"], 2, None),
    ],
)
def test_nodes_and_gpus_are_read_in_every_form(options: list[str], nodes: int, gpus: int | None) -> None:
    for gpu in (["--gpu", "h100"], ["--gpu=h100"]):
        found = submit.parse([*options, *gpu, "--", "a.toml", "--run.steps", "3"], SCRIPT)
        assert (found.nodes, found.gpus_per_node, found.gpu) == (nodes, gpus, "h100")
        assert (found.options, found.run) == (options, ["a.toml", "--run.steps", "3"])


def test_the_job_script_says_what_no_option_says() -> None:
    found = submit.parse(["a.toml"], SCRIPT + "#SBATCH --gpus-per-node=4\n")
    assert (found.nodes, found.gpus_per_node, found.gpu, found.options, found.run) == (2, 4, None, [], ["a.toml"])
    assert submit.parse(["--gpu=h100", "a.toml"], SCRIPT).gpu == "h100"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--nodes=2-4", "--", "a.toml"],
            "-N/--nodes: '2-4': must be one number (ranks are divided before the job starts)",
        ),
        (["-N2-4", "--", "a.toml"], "'2-4'"),
        (["-N", "0", "--", "a.toml"], "'0'"),
        (["--gpus-per-node=a100:2,h100:2", "--", "a.toml"], "must be one number of GPUs; give one"),
        (["--gres=gpu:a:2,gpu:b:2", "--", "a.toml"], "must be one number of GPUs; give one"),
        (
            ["--gpus=32", "--", "a.toml"],
            "-G/--gpus: '32': every node must have equally many ranks; give --gpus-per-node=N",
        ),
        (["--nodes=4", "a.toml"], "CONFIG is missing; give it first, after the options of sbatch and --"),
        (["--nodes=4", "--"], "CONFIG is missing"),
    ],
)
def test_what_leaves_the_number_of_ranks_open_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        submit.parse(arguments, SCRIPT)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("failures", "named"), FAILURES)
def test_the_rank_that_is_named_is_the_one_that_others_followed(
    failures: dict[int, tuple[int, int]], named: int
) -> None:
    assert first_failure(failures) == (named, failures[named][1])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_run.save_chat_model(folder)
    return folder


@pytest.mark.parametrize(
    ("options", "gib", "code", "said"),
    [
        (["-N4", "--gpus-per-node=2"], 80.0, 0, "4 node(s) of 2 x small"),
        (["-N", "4", "--gpus-per-node=2"], 0.01, 1, "Not queued: it does not fit on 4 node(s)"),
        (["-N1"], 80.0, 0, "1 node(s) of 8 x small"),
        (["-N4", "--gpus-per-node=4"], 80.0, 2, "needs 8 ranks, there are 16"),
        (["-N4"], 80.0, 2, "needs 8 ranks, there are 32"),
    ],
)
def test_checks_are_of_the_job_s_own_nodes(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    gib: float,
    code: int,
    said: str,
) -> None:
    queued: list[list[str]] = []
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setattr("os.execvp", lambda _, command: queued.append(command))
    monkeypatch.chdir(ROOT)
    gpu = tmp_path / "small.json"
    gpu.write_text(json.dumps({"base": "h100", "sources": ["made up"], "memory_gib": gib}))
    run = [str(write_config(model, tmp_path)), "--parallel.data", "8"]
    assert (submit.main([f"--gpu={gpu}", *options, "--", *run]) or 0) == code
    assert said in capsys.readouterr().err
    assert queued == ([] if code else [["sbatch", *options, submit.SCRIPT, *run]])


def test_where_there_is_no_slurm_it_is_said(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit.main([str(write_config(model, tmp_path))]) == options.FAILED
    assert "sbatch: not found" in capsys.readouterr().err


def test_without_options_the_fewest_ranks_are_checked(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    request = submit.parse([str(write_config(model, tmp_path)), "--parallel.pipeline", "2"], SCRIPT)
    assert submit.check(request) == 0
    printed = capsys.readouterr()
    assert printed.out == "", "sbatch's own is all that goes to stdout"
    assert "The number of ranks is not known" in printed.err and "layout   2 rank(s)" in printed.err


@pytest.mark.parametrize("chosen", [None, "mine/python"])
def test_a_job_runs_in_the_environment_that_submits_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], chosen: str | None
) -> None:
    """Jobs with GPUs must not run in the CPU environment, which would leave them unused."""
    (tmp_path / "sbatch").write_text('#!/bin/sh\necho "$PYTHON"\n')
    (tmp_path / "sbatch").chmod(0o755)
    given = {"PYTHON": chosen} if chosen else {}
    usual = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    command = [sys.executable, "-m", "megatron_mcpo", "submit", "--nodes=1", "--", str(write_config(model, tmp_path))]
    environment = {**usual, **given, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    job = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert job.stdout.split() == [chosen or sys.executable], job.stderr
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("PYTHON", raising=False)
    assert submit.main(["--nodes=1", "--gpus-per-node=8", "--", "a.toml"]) == 2
    assert "Submit with .venv-gpu/bin/mcpo" in capsys.readouterr().err


@pytest.mark.parametrize(("variables", "said"), [({"RANKS": "0"}, "RANKS = '0'"), ({"NODES": "4"}, "HEAD must be")])
def test_the_launch_script_says_what_is_wrong_with_its_variables(variables: dict[str, str], said: str) -> None:
    script = ["bash", "examples/launch/torchrun.sh", "a.toml"]
    usual = {"PATH": os.environ["PATH"]}
    answer = subprocess.run(script, cwd=ROOT, env={**usual, **variables}, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 2 and said in answer.stderr


@pytest.mark.parametrize("requeued", [True, False], ids=["requeued", "not requeued"])
def test_a_requeue_that_fails_is_said_and_leaves_the_mark(model: Path, tmp_path: Path, requeued: bool) -> None:
    config = write_config(model, tmp_path)
    folder = RunFolder.open(load(config))
    folder.mark_preempted()
    folder.close()
    for program, code in (("srun", 1), ("scontrol", 0 if requeued else 3)):
        (tmp_path / program).write_text(f'#!/bin/sh\necho {program} "$1"\nexit {code}\n')
        (tmp_path / program).chmod(0o755)
    slurm = {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "1"}
    ours = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    job = subprocess.run(
        ["bash", "examples/launch/train.sbatch", str(config)],
        cwd=ROOT,
        env={**os.environ, **slurm, **ours},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "scontrol requeue" in job.stdout, job.stderr
    assert job.returncode == (0 if requeued else 3)
    assert ("Job 7 could not be requeued: scontrol exited with 3" in job.stderr) is not requeued
    assert (folder.path / "PREEMPTED").exists() is not requeued
