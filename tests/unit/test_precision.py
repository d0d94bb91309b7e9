"""Where FP8 and Transformer Engine's layers can be used: what is said where they can't.

There is neither a GPU nor Transformer Engine on the usual machine: what torch says of a GPU is made up, and so is a
package that can't be imported. Not covered: one that can (tests/gpu).
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.config.schema import Fp8
from megatron_mcpo.distributed.transformer_engine import transformer_engine_problem
from megatron_mcpo.mcore import precision
from megatron_mcpo.mcore.precision import check_context, check_fp8, layer_notes
from tests.support.paths import ROOT


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget what is known of Transformer Engine before and after each test, and remove modules that a test adds."""
    transformer_engine_problem.cache_clear()
    yield
    monkeypatch.undo()
    transformer_engine_problem.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
        del sys.modules[name]


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], cuda: str) -> None:
    monkeypatch.setattr(precision, "uses_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)


def pretend_engine(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (folder / "transformer_engine" / "pytorch").mkdir(parents=True)
    (folder / "transformer_engine" / "__init__.py").touch()
    (folder / "transformer_engine" / "pytorch" / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))


@pytest.mark.parametrize(
    ("fp8", "capability", "cuda", "said"),
    [
        ("tensorwise", (8, 9), "13.0", "a GPU of compute capability 9.0 (Hopper) or later, and this one has 8.9"),
        ("blockwise", (9, 0), "12.8", "CUDA 12.9 or later, and torch is built for 12.8"),
        ("tensorwise", (9, 0), "12.8", "Transformer Engine, and it is not installed"),
        ("blockwise", (9, 0), "13.0", "Transformer Engine, and it is not installed"),
    ],
)
def test_fp8_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, fp8: Fp8, capability: tuple[int, int], cuda: str, said: str
) -> None:
    pretend_gpu(monkeypatch, capability, cuda)
    with pytest.raises(ConfigError) as refused:
        check_fp8(fp8)
    assert refused.value.problems == [f"model.fp8 = {fp8!r}: needs {said}; set it to 'off'"]


@pytest.mark.parametrize("error", ["OSError", "SystemExit"])
def test_an_engine_that_cannot_be_imported_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: str
) -> None:
    pretend_engine(tmp_path, monkeypatch, f"raise {error}('libcublas.so.13: undefined symbol')")
    pretend_gpu(monkeypatch, (9, 0), "13.0")
    problem = f"and it can't be imported ({error}: libcublas.so.13: undefined symbol)"
    assert [transformer_engine_problem() for _ in range(2)] == [problem] * 2
    assert caplog.messages == [f"Transformer Engine is installed, {problem}: layers use torch's modules instead"]
    with pytest.raises(ConfigError, match="undefined symbol"):
        check_fp8("blockwise")
    check_context(2, torch.float32)  # plain layers can
    (warning,) = layer_notes()
    assert warning.startswith(
        f"WARNING: layers are made of torch's modules: Transformer Engine is wanted on a GPU, {problem}"
    )


def test_megatron_can_be_imported_beside_one_that_cannot(tmp_path: Path) -> None:
    """Megatron-Core expects no other error than that it is not installed."""
    module = tmp_path / "transformer_engine" / "__init__.py"
    module.parent.mkdir()
    module.write_text("raise OSError('libcublas.so.13: undefined symbol')")
    command = [sys.executable, "-c", "import megatron_mcpo.mcore.model"]
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    run = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and "libcublas.so.13: undefined symbol" in run.stderr, run.stderr


def test_one_that_can_be_imported_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_engine(tmp_path, monkeypatch, "")
    pretend_gpu(monkeypatch, (9, 0), "13.0")
    assert transformer_engine_problem() is None and layer_notes() == []
    check_fp8("blockwise")
    check_context(2, torch.bfloat16)
    check_context(1, torch.float32)
    with pytest.raises(ConfigError, match=r"parallel\.context = 2: must be 1 in fp32 on a GPU"):
        check_context(2, torch.float32)
