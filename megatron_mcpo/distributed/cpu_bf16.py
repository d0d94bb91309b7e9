"""Multiply bf16 tensors by way of fp32 on CPUs for which torch has no such kernels: x86 without AVX-512.

There torch (2.13) multiplies bf16 one number at a time, 4 to 90 times slower than fp32. The operands are converted,
the products are added up in fp32, and the result is rounded once, as the kernels of newer CPUs do. A product needs the
memory of its operands in fp32 meanwhile. Elsewhere nothing is changed.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library

_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")
_ATTENTION = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward")

_library: Library | None = None


def is_needed() -> bool:
    """Return whether torch has no kernels for products of bf16 on this CPU, or may not use them, and can be helped."""
    if not hasattr(torch.library, "get_kernel"):  # an older torch, as an environment for GPUs may have
        return False
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def apply() -> bool:
    """Replace the products where that is needed; return whether it is. Later calls do nothing."""
    if not is_needed():
        return False
    if _library is None:
        install()
    return True


def install() -> None:
    """Replace the products, whatever the CPU."""
    global _library
    _library = Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s).*Overriding a previously registered kernel")
        for name in (*_PRODUCTS, *_ATTENTION):
            _library.impl(name, _by_way_of_fp32(name), "CPU")


def _by_way_of_fp32(name: str) -> Callable[..., Any]:
    """Return a kernel that computes an operator of bf16 with torch's kernel for fp32, and others as before."""
    kernel = torch.library.get_kernel(f"aten::{name}", "CPU")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def compute(*args: Any, **named: Any) -> Any:
        operands = [each for each in args[:3] if isinstance(each, torch.Tensor)]
        if any(each.dtype is not torch.bfloat16 for each in operands):
            return kernel.call_boxed(keys, *args, **named)
        wide = [_widened(each) for each in args]
        found = kernel.call_boxed(keys, *wide, **{key: _widened(each) for key, each in named.items()})
        if isinstance(found, torch.Tensor):
            return found.bfloat16()
        if name.endswith("_backward"):
            return tuple(each.bfloat16() for each in found)
        output, logsumexp = found
        return output.bfloat16(), logsumexp  # the latter is fp32 in any case

    return compute


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype is torch.bfloat16 else value
