"""The command `mcpo` as a shell sees it: help, exit codes, closed pipes.

Not covered here: what the subcommands do.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mcpo import __version__
from megatron_mcpo.cli import main as cli
from tests.support.paths import ROOT

HEAVY = ("torch", "megatron", "vllm", "pydantic", "rich")


def mcpo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_mcpo", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_help_lists_every_subcommand_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from megatron_mcpo.cli.main import main; main(['--help']);"
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert answer.stdout.splitlines()[-1] == "[]", answer.stderr
    assert all(f"  {name} " in answer.stdout for name in cli.COMMANDS)


def test_every_module_of_a_subcommand_is_there_and_no_other() -> None:
    shared = {"main", "options", "launch", "preflight", "converting", "machine", "machine_problems", "probes"}
    modules = {path.stem for path in (ROOT / "megatron_mcpo" / "cli").glob("*.py")} - {"__init__"}
    assert {command.module for command in cli.COMMANDS.values()} == modules - shared


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_a_subcommand_names_it_and_gives_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*name.split(), "--help"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"usage: mcpo {name}" in printed and f"example: mcpo {name}" in printed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "usage: mcpo SUBCOMMAND"),
        (["trian"], "did you mean `mcpo train`?"),
        (["7"], "`mcpo --help` lists them."),
        (["convert"], "needs one of: to-megatron, to-hf, check"),
        (["data", "chek"], "needs one of: check, prepare"),
    ],
)
def test_an_unknown_subcommand_is_refused(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    assert says in capsys.readouterr().err


REQUIRED = {
    **dict.fromkeys(
        ["train", "evaluate", "serve", "push-plan", "data check", "requeue", "submit"], "CONFIG is missing"
    ),
    "plan": "CONFIG, --nodes are missing",
    "convert to-megatron": "SRC, DST are missing",
    "convert to-hf": "SRC, DST are missing",
    "convert check": "HF_DIR is missing",
    "report": "RUN is missing",
    "compare": "RUN is missing",
    "reward try": "give --response, or --pairs",
    "data prepare": "give a SET, its files and --out, or --list",
}
"""What a subcommand without arguments says."""


def test_the_subcommands_that_run_without_arguments_are_known() -> None:
    assert cli.COMMANDS.keys() - REQUIRED.keys() == {"config keys", "doctor", "sandbox check"}


@pytest.mark.parametrize("name", REQUIRED)
def test_missing_arguments_are_named_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(name.split())
    problem, example, more = capsys.readouterr().err.splitlines()
    assert ended.value.code == cli.REFUSED
    assert problem.startswith(f"mcpo {name}: {REQUIRED[name]}")
    assert example.startswith(f"example: mcpo {name} ") and more == f"help:    mcpo {name} --help"


def test_help_of_compare_has_the_default_of_out(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["compare", "--help"])
    assert "folder for the plots (default: comparison)" in capsys.readouterr().out


def test_a_group_has_help_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "convert to-hf" in printed and "sandbox check" not in printed


def test_the_module_and_the_tools_are_the_same_command() -> None:
    assert mcpo("--version").stdout == f"{__version__}\n"
    for name, subcommand in (("hf_to_megatron", "to-megatron"), ("megatron_to_hf", "to-hf")):
        command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), "--help"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert answer.returncode == 0 and f"usage: mcpo convert {subcommand}" in answer.stdout, answer.stderr


def test_bad_input_has_exit_code_2(tmp_path: Path) -> None:
    answer = mcpo("train", str(tmp_path / "none.toml"))
    assert answer.returncode == 2 and "none.toml" in answer.stderr and "Traceback" not in answer.stderr


@pytest.mark.parametrize("arguments", ["config keys", "--help"])
def test_a_closed_pipe_is_no_error(arguments: str) -> None:
    command = f"set -o pipefail; {sys.executable} -m megatron_mcpo {arguments} | true"
    answer = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (answer.returncode, answer.stderr) == (0, ""), answer.stderr


def test_modules_of_the_current_folder_can_be_imported_as_with_python_m(tmp_path: Path) -> None:
    """A console script has its own folder on the path instead."""
    (tmp_path / "my_rewards.py").write_text("found = 'here'")
    code = (
        "import sys; sys.path.remove(''); from megatron_mcpo.cli.main import main; main(['--version']);"
        "import my_rewards; print(my_rewards.found)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert answer.stdout.splitlines() == [__version__, "here"], answer.stderr
