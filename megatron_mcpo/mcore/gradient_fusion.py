"""Add weight gradients in fp32 within their matrix product, where Megatron-Core's own extension is missing.

Megatron-Core (0.19.2) asks for `fused_weight_gradient_mlp_cuda`, a compiled part of NVIDIA apex, and without it refuses
to build even an output layer that is never called; Transformer Engine's layers fuse by themselves. torch can compute
the same product. Only the compiled extension counts: the package `apex` of the package index is an unrelated project.
"""

import importlib
import warnings
from functools import cache
from types import SimpleNamespace

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor

from megatron_mcpo.config.environment import foreign_apex
from megatron_mcpo.distributed.device import device

EXTENSION = "fused_weight_gradient_mlp_cuda"
_SIZE = 16
"""The size of the product that tests torch's kernels, which need rows to be a multiple of it."""


def fuses_gradients(dtype: torch.dtype) -> bool:
    """Return whether weights in `dtype` can have fused gradients on this machine, and enable them in Megatron-Core.

    Only for bf16 on a GPU: elsewhere gradients are fp32 already, or torch lacks such a product.
    """
    return dtype is torch.bfloat16 and device().type == "cuda" and _prepared()


@cache
def _prepared() -> bool:
    note = foreign_apex()
    if note:
        warnings.warn(note, stacklevel=3)
    if extension_there():
        return True
    if not _adds_up():
        return False
    put_in()
    return True


def extension_there() -> bool:
    """Return whether NVIDIA's compiled extension can be imported."""
    try:
        importlib.import_module(EXTENSION)
    except ImportError:
        return False
    return True


def put_in() -> None:
    """Give Megatron-Core `accumulate` in place of the extension; its linear layers look it up at every use."""
    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=accumulate)
    layers._grad_accum_fusion_available = True


def accumulate(input_TK: Tensor, grad_TN: Tensor, main_grad_NK: Tensor) -> None:
    """Add grad^T input to main_grad, which is in fp32; the others are in bf16 (on a GPU) or fp32."""
    if input_TK.dtype == main_grad_NK.dtype:
        main_grad_NK.addmm_(grad_TN.t(), input_TK)
    else:
        torch.addmm(main_grad_NK, grad_TN.t(), input_TK, out_dtype=main_grad_NK.dtype, out=main_grad_NK)


def _adds_up() -> bool:
    """Return whether torch has the product for this GPU and computes it correctly: sums of small integers are exact."""
    input_TK = torch.arange(_SIZE * _SIZE, device=device()).view(_SIZE, _SIZE).remainder(7).bfloat16()
    grad_TN = input_TK.flip(0)
    main_grad_NK = torch.ones(_SIZE, _SIZE, device=device())
    try:
        accumulate(input_TK, grad_TN, main_grad_NK)
    except (RuntimeError, TypeError):
        return False
    return torch.equal(main_grad_NK, 1 + grad_TN.float().t() @ input_TK.float())
