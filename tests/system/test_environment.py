"""The CPU environment on a machine that has a GPU: the GPU is hidden, said once, and the program trains on the CPU.

There is no GPU here: its device file and what torch says of it are made up. Not covered: a GPU environment's run.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_mcpo.config import environment
from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.config.environment import hide_gpu, vllm_on_cpu
from megatron_mcpo.rollout import vllm_engine
from tests.support import program, tiny_run

VISIBLE = "CUDA_VISIBLE_DEVICES"
SAID = "This machine has a GPU, but this environment is the CPU one"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the root folder of a machine with NVIDIA's driver and two GPUs, none of them hidden yet."""
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / "dev" / name).touch()
    monkeypatch.delenv(VISIBLE, raising=False)
    monkeypatch.setattr(environment, "vllm_on_cpu", lambda: True)
    return tmp_path


def test_the_gpu_is_hidden_and_that_is_said_once(machine: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hide_gpu(machine)
    told = capfd.readouterr().err
    assert os.environ[VISIBLE] == "" and told.startswith(SAID) and told.count("\n") == 1
    hide_gpu(machine)
    assert capfd.readouterr().err == ""


def test_gpus_that_slurm_gave_are_hidden_too_and_one_rank_of_a_host_says_so(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for local_rank, speaks in (("0", True), ("1", False)):
        monkeypatch.setenv(VISIBLE, "0,1")
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        hide_gpu(machine)
        assert os.environ[VISIBLE] == "" and (SAID in capfd.readouterr().err) is speaks


def test_nothing_is_said_without_a_gpu_and_in_windows_the_driver_is_a_library(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("nvidia0", "nvidia1"):  # the control file stays when the last GPU is taken out
        (machine / "dev" / name).unlink()
    hide_gpu(machine)
    assert os.environ[VISIBLE] == "" and capfd.readouterr().err == ""
    monkeypatch.delenv(VISIBLE)
    library = machine / "usr/lib/wsl/lib/libcuda.so.1"
    library.parent.mkdir(parents=True)
    library.touch()
    hide_gpu(machine)
    assert SAID in capfd.readouterr().err


def test_a_gpu_environment_sees_its_gpus(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "vllm_on_cpu", lambda: False)
    hide_gpu(machine)
    assert VISIBLE not in os.environ and capfd.readouterr().err == ""


@pytest.mark.skipif(not vllm_on_cpu(), reason="this is a GPU environment")
def test_importing_the_package_hides_the_gpu_before_torch_is_there() -> None:
    code = f"import os, sys, megatron_mcpo; print(repr(os.environ[{VISIBLE!r}]), 'torch' in sys.modules)"
    shown = {key: value for key, value in os.environ.items() if key != VISIBLE}
    done = subprocess.run([sys.executable, "-c", code], env=shown, capture_output=True, text=True, timeout=120)
    assert done.stdout == "'' False\n", done.stderr


def pretend_gpu() -> None:
    """Have torch say what it says on a machine with a GPU that nothing hides."""
    torch.cuda.is_available = lambda: True


@pytest.mark.skipif(not vllm_on_cpu(), reason="this is a GPU environment")
def test_the_cpu_environment_trains_where_torch_finds_a_gpu(tmp_path: Path) -> None:
    """Without one predicate for trainer and engine, vLLM's CPU build is told to sleep, and refuses after minutes."""
    model = tmp_path / "model"
    tiny_run.save_chat_model(model)
    config = program.write_config(model, tmp_path)
    done = program.train_forked(config, "--run.steps", "1", prepare=pretend_gpu)
    assert done.returncode == 0, done.stderr
    assert len(program.metrics(tmp_path / "runs" / "tiny")) == 1


def test_a_gpu_environment_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "uses_gpu", lambda: False)
    monkeypatch.setattr(vllm_engine, "vllm_on_cpu", lambda: False)
    with pytest.raises(ConfigError, match=r"torch finds no GPU here, and vLLM's CPU build .* is not installed"):
        vllm_engine.check_hardware("none")


@pytest.mark.skipif(not vllm_on_cpu(), reason="this is a GPU environment")
def test_fp8_on_a_cpu_without_its_instructions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """On these vLLM's FP8 products abort the process, after the model was built."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    vllm_engine.check_hardware("fp8_per_block")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx512_core")
    with pytest.raises(ConfigError, match="ONEDNN_MAX_CPU_ISA = avx512_core keeps AVX512-BF16 from being used"):
        vllm_engine.check_hardware("fp8_per_block")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    with pytest.raises(ConfigError, match=r"engine\.quantization = 'fp8_per_block': this CPU lacks AVX512-BF16"):
        vllm_engine.check_hardware("fp8_per_block")
