"""FP8: what it means to Megatron-Core, and where it can run at all."""

import functools
import importlib
import importlib.util
import logging
from typing import Any

import torch

from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.config.schema import Fp8
from megatron_mcpo.distributed.device import uses_gpu

TOKEN_MULTIPLE = 128
"""Tokens of a rank's pack are a multiple of it: Transformer Engine's products want 16, its blocks are 128 long."""

_RECIPES = {"blockwise": ("e4m3", "blockwise"), "tensorwise": ("hybrid", "tensorwise")}
_LEAST_CAPABILITY = (9, 0)
_LEAST_CUDA = (12, 9)
"""For blockwise products (cuBLAS)."""

log = logging.getLogger(__name__)


@functools.cache
def transformer_engine_problem() -> str | None:
    """Why its layers can't be used; None: they can. One that is installed and can't be imported is warned of, once.

    `pip install transformer-engine` alone brings no layers for torch, and a build for another CUDA can't be loaded.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        return "and it is not installed"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # OSError or RuntimeError, too, where a library is missing or of another version
        reason = f"and it can't be imported ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        log.warning("Transformer Engine is installed, %s: layers are made of torch's modules", reason)
        return reason
    return None


def _cuda_version() -> tuple[int, ...]:
    return tuple(int(part) for part in (torch.version.cuda or "0").split("."))


def fp8_options(fp8: Fp8) -> dict[str, Any]:
    """Megatron's settings. The first and the last layer stay in bf16, as output layer, router and head always do.

    Delayed scaling is not offered: passes without gradient would change the history that the update scales by.
    Parameters stay in bf16 (no `fp8_param`): those in FP8 are tensors of Transformer Engine whose slices and copies
    would be rounded values, so that a push to the engine (rounded there a second time), an export and a checkpoint
    loaded in another layout would no longer hold the weights that the optimizer stepped.
    """
    if fp8 == "off":
        return {}
    values, recipe = _RECIPES[fp8]
    return {"fp8": values, "fp8_recipe": recipe, "first_last_layers_bf16": True}


def check_fp8(fp8: Fp8) -> None:
    """Raises ConfigError where FP8 can't be computed: there Megatron-Core (0.19.2) would train in bf16, silently."""
    if fp8 == "off":
        return
    if not uses_gpu():
        missing = "a GPU, and there is none"
    elif torch.cuda.get_device_capability() < _LEAST_CAPABILITY:
        major, minor = torch.cuda.get_device_capability()
        missing = f"a GPU of compute capability 9.0 (Hopper) or later, and this one has {major}.{minor}"
    elif fp8 == "blockwise" and _cuda_version() < _LEAST_CUDA:
        missing = f"CUDA 12.9 or later, and torch is built for {torch.version.cuda}"
    elif problem := transformer_engine_problem():
        missing = f"Transformer Engine, {problem}"
    else:
        return
    raise ConfigError([f"model.fp8 = {fp8!r}: needs {missing}; set it to 'off'"])
