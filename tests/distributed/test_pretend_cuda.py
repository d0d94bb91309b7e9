"""One MCPO step, weight syncs and a checkpoint on a pretend CUDA device, on two ranks: nothing is left on the host.

A process of its own pretends that there is a GPU (tests/support/pretend_cuda.py), so that the package and Megatron-Core
take their roads for one; what it computes must be what a CPU computes. A tensor that was left on the host raises, which
the last test provokes. Not covered: kernels, Transformer Engine, vLLM, what is asynchronous on a GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import tiny_models
from tests.support.paths import ROOT
from tests.support.pretend_step import CASES, step
from tests.support.ranks import run_ranks


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for kind in {case.kind for case in CASES.values()}:
        tiny_models.save_model(folder / kind, kind, num_layers=2)
    return folder


@pytest.fixture(scope="module")
def on_pretend_device(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    file = tmp_path_factory.mktemp("pretend") / "found.json"
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.pretend_step", str(models), str(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert answer.returncode == 0, answer.stderr[-8000:]
    found: dict[str, list[dict[str, Any]]] = json.loads(file.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_step_on_the_device_computes_what_a_cpu_computes(
    on_pretend_device: dict[str, list[dict[str, Any]]], models: Path, tmp_path: Path, name: str
) -> None:
    case = CASES[name]
    tolerance = 1e-5 if case.dtype == "fp32" else 0.05  # torch's attention rounds differently on the device
    for found, expected in zip(on_pretend_device[name], run_ranks(2, step, case, models, tmp_path), strict=True):
        assert (found["places"], expected["places"]) == (["cuda"], ["cpu"])
        assert (found["fused"], expected["fused"]) == (case.dtype == "bf16", False)
        assert found["resumed_apart"] == expected["resumed_apart"] == []
        assert found["exported"] == pytest.approx(expected["exported"], rel=tolerance)
        for mine, theirs in zip(found["synced"], expected["synced"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-3)  # the engine is in bf16
        assert found["metrics"] == pytest.approx(expected["metrics"], rel=tolerance, abs=tolerance)
        assert found["metrics"]["update/grad_norm"] > 0


def test_what_is_left_on_the_host_is_found(on_pretend_device: dict[str, list[dict[str, Any]]]) -> None:
    for said in on_pretend_device["mixed up"]:
        assert "aten.index.Tensor of [('cpu'" in said["loss"], said
        assert "No backend type associated with device type cpu" in said["collective"], said
