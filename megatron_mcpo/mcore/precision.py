"""Say what FP8 means to Megatron-Core, and where it can run."""

from typing import Any

import torch

from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.config.schema import Fp8
from megatron_mcpo.distributed.device import uses_gpu
from megatron_mcpo.distributed.transformer_engine import transformer_engine_problem

TOKEN_MULTIPLE = 128
"""The tokens of a rank's pack are a multiple of it: Transformer Engine's products need 16, its blocks are 128 long."""

_RECIPES = {"blockwise": ("e4m3", "blockwise"), "tensorwise": ("hybrid", "tensorwise")}
_LEAST_CAPABILITY = (9, 0)
_LEAST_CUDA = (12, 9)
"""What cuBLAS needs for blockwise products."""


def layer_notes() -> list[str]:
    """Return a warning where layers are plain torch modules on a GPU."""
    problem = transformer_engine_problem() if uses_gpu() else None
    if problem is None:
        return []
    return [
        f"WARNING: layers are made of torch's modules: Transformer Engine is wanted on a GPU, {problem}. Attention is "
        "computed sequence by sequence, which is slow. See docs/gpu.md."
    ]


def check_context(context: int, dtype: torch.dtype) -> None:
    """Raise ConfigError where no attention divides fp32 sequences: that of Transformer Engine (2.20.2) needs bf16."""
    if context > 1 and dtype is torch.float32 and uses_gpu() and transformer_engine_problem() is None:
        raise ConfigError(
            [f"parallel.context = {context}: must be 1 in fp32 on a GPU. Set it to 1, or model.dtype to 'bf16'."]
        )


def _cuda_version() -> tuple[int, ...]:
    return tuple(int(part) for part in (torch.version.cuda or "0").split("."))


def fp8_options(fp8: Fp8) -> dict[str, Any]:
    """Return Megatron's settings of FP8. First and last layer stay in bf16, as output layer, router and head always do.

    Delayed scaling is not offered: passes without gradient would change the history that the update scales by.
    Parameters stay in bf16 (no `fp8_param`): parameters in FP8 are tensors of Transformer Engine whose slices and
    copies are rounded values, so that a weight sync (rounded a second time in the engine), an export and a checkpoint
    loaded in another layout would no longer hold the weights that the optimizer updated.
    """
    if fp8 == "off":
        return {}
    values, recipe = _RECIPES[fp8]
    return {"fp8": values, "fp8_recipe": recipe, "first_last_layers_bf16": True}


def check_fp8(fp8: Fp8) -> None:
    """Raise ConfigError if FP8 can't be computed here: Megatron-Core (0.19.2) would silently train in bf16."""
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
