"""Weight gradients added in fp32 by the matrix product that makes them, where Megatron-Core's own extension is missing.

Megatron-Core (0.19.2) asks for `fused_weight_gradient_mlp_cuda`, a compiled part of NVIDIA apex, and refuses to build
even an output layer that nobody calls without it; Transformer Engine's layers fuse by themselves. torch can do the same
product. What counts is the compiled extension: the package `apex` of the package index is an unrelated project.
"""

import importlib
import importlib.machinery
import importlib.util
import warnings
from functools import cache
from types import SimpleNamespace

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor

from megatron_mcpo.distributed.device import device

EXTENSION = "fused_weight_gradient_mlp_cuda"
_SIZE = 16
"""Of the product that tells whether torch can: what its kernels want rows to be a multiple of."""


def fuses_gradients(dtype: torch.dtype) -> bool:
    """Whether weights in `dtype` can have fused gradients on this machine; makes Megatron-Core able to.

    In bf16 on a GPU only: elsewhere gradients are fp32 already, or there is no such product.
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
    """Whether NVIDIA's compiled extension can be imported, as Megatron-Core found it or didn't."""
    try:
        importlib.import_module(EXTENSION)
    except ImportError:
        return False
    return True


def foreign_apex() -> str | None:
    """What to say about a package named apex that is not NVIDIA's."""
    found = importlib.util.find_spec("apex")
    if found is None:
        return None
    folders = found.submodule_search_locations or []
    if any(importlib.machinery.PathFinder.find_spec("apex.normalization", [folder]) for folder in folders):
        return None
    return (
        f"the package `apex` at {found.origin or list(folders)} is not NVIDIA's: it has no apex.normalization. The "
        "one on the package index is an unrelated project; uninstall it"
    )


def put_in() -> None:
    """Give Megatron-Core `accumulate` in the extension's place; its linear layers look it up whenever they need it."""
    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=accumulate)
    layers._grad_accum_fusion_available = True


def accumulate(input_TK: Tensor, grad_TN: Tensor, main_grad_NK: Tensor) -> None:
    """main_grad += grad^T input. main_grad in fp32, the others in bf16 (on a GPU) or fp32."""
    if input_TK.dtype == main_grad_NK.dtype:
        main_grad_NK.addmm_(grad_TN.t(), input_TK)
    else:
        torch.addmm(main_grad_NK, grad_TN.t(), input_TK, out_dtype=main_grad_NK.dtype, out=main_grad_NK)


def _adds_up() -> bool:
    """Whether torch has the product for this GPU, and it is right: sums of small integers are exact."""
    input_TK = torch.arange(_SIZE * _SIZE, device=device()).view(_SIZE, _SIZE).remainder(7).bfloat16()
    grad_TN = input_TK.flip(0)
    main_grad_NK = torch.ones(_SIZE, _SIZE, device=device())
    try:
        accumulate(input_TK, grad_TN, main_grad_NK)
    except (RuntimeError, TypeError):
        return False
    return torch.equal(main_grad_NK, 1 + grad_TN.float().t() @ input_TK.float())
