"""Keep vLLM's changes to its process away from the trainer, and repair defects of its CPU backend.

vLLM expects a process of its own: it replaces functions of torch, edits the environment, reseeds the random generators
and freezes the garbage collector. `isolated` allows this during a call and undoes it afterwards. The other functions
repair vLLM's CPU backend; each names the versions that it is for.
"""

import gc
import logging
import os
import random
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from megatron_mcpo.distributed.device import uses_gpu

LAST_AFFECTED = (0, 33)
"""The newest (major, minor) version of vLLM whose reload is known to leave stale weights on a CPU."""

_ABSENT = object()
_PATCHED: tuple[tuple[Any, str], ...] = (
    (torch, "set_num_threads"),
    (torch, "Event"),
    (torch.cuda, "Event"),
    (torch.cuda, "Stream"),
    (torch.cuda, "set_stream"),
    (torch.cuda, "current_stream"),
    (torch.cuda, "stream"),
    (torch.accelerator, "synchronize"),
    (torch.accelerator, "empty_cache"),
    (torch.accelerator, "get_memory_info"),
    (torch.Tensor, "pin_memory"),
    (torch.Tensor, "record_stream"),
)
# vLLM patches torch once per process, at its first import: every later engine needs the same values.
_vllm_values: list[Any] = []


@contextmanager
def isolated(*, compile_kernels: bool) -> Iterator[None]:
    """Run a block of vLLM calls and undo its side effects afterwards.

    These are restored: the global generators of torch (CPU and the current CUDA device), python and numpy; the
    environment; torch's patched functions and stream; the thread count; what the garbage collector scans. vLLM's
    patches return for the next block, because its CPU backend can't run on a CUDA build of torch without them.

    compile_kernels: if False, vLLM's compiled helpers run eagerly, which saves seconds of C++ compiler on a CPU
    """
    ours = _patched_values()
    environment = dict(os.environ)
    num_threads, frozen = torch.get_num_threads(), gc.get_freeze_count()
    cuda_state = torch.cuda.get_rng_state() if uses_gpu() else None
    stream = torch.cuda.current_stream() if uses_gpu() else None
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    if _vllm_values:
        _set_patched_values(_vllm_values)
    try:
        with ExitStack() as stack:
            if not compile_kernels:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield
    finally:
        _vllm_values[:] = _patched_values()
        _set_patched_values(ours)
        _set_environment(environment)
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
        if cuda_state is not None:
            torch.cuda.set_rng_state(cuda_state)
        if stream is not None:  # an engine with CUDA graphs leaves its own as the current one
            torch.cuda.synchronize()
            torch.cuda.set_stream(stream)
        if torch.get_num_threads() != num_threads:
            torch.set_num_threads(num_threads)
        if gc.get_freeze_count() > frozen:
            gc.unfreeze()


def _patched_values() -> list[Any]:
    return [vars(owner).get(name, _ABSENT) for owner, name in _PATCHED]


def _set_patched_values(values: list[Any]) -> None:
    for (owner, name), value in zip(_PATCHED, values, strict=True):
        if value is not _ABSENT:
            setattr(owner, name, value)
        elif name in vars(owner):
            delattr(owner, name)


def _set_environment(wanted: dict[str, str]) -> None:
    for key in set(os.environ) - set(wanted):
        del os.environ[key]
    for key, value in wanted.items():
        if os.environ.get(key) != value:
            os.environ[key] = value


@contextmanager
def quiet_import() -> Iterator[None]:
    """Import vLLM in a block without its banners, unless the user sets VLLM_LOGGING_LEVEL.

    This also keeps torch from warning that a machine with a CUDA toolkit has no GPU, which vLLM's imports make it do.
    """
    extensions = logging.getLogger("torch.utils.cpp_extension")
    level, wanted = extensions.level, os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    extensions.setLevel(logging.ERROR)
    try:
        yield
        # vLLM reads the variable once per process, at its first import, which may have been an earlier one.
        logging.getLogger("vllm").setLevel(wanted.upper())
    finally:
        extensions.setLevel(level)


@contextmanager
def cpu_start(job_tag: str) -> Iterator[None]:
    """Build a CPU engine in a block, on a host with other jobs and in a process with a trainer.

    Two defects, seen in 0.30 to 0.33:
    - Under a launcher vLLM gives the shared-memory segments of all jobs the same names: two jobs collide, and what a
      crash leaves in /dev/shm stops every later job. Here the names begin with `job_tag` and a number drawn by rank 0,
      and are removed as soon as every rank has mapped the memory (which exists until the last rank ends).
    - vLLM binds all memory of the process to one NUMA node, and prints so on the console. This is left out.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    shm_group: Any = _CPUSHMDistributed
    kernels: Any = torch.ops._C
    prefix = _common_prefix(job_tag)
    make_name, bind_memory = vars(shm_group)["make_group_name"], kernels.init_cpu_memory_env
    shm_group.make_group_name = staticmethod(lambda comm: f"{prefix}-{make_name(comm).lstrip('/')}")
    kernels.init_cpu_memory_env = lambda nodes: None
    try:
        yield
    finally:
        shm_group.make_group_name = make_name
        kernels.init_cpu_memory_env = bind_memory
        for segment in Path("/dev/shm").glob(f"{prefix}-*"):
            segment.unlink(missing_ok=True)


@contextmanager
def cpu_fp8() -> Iterator[None]:
    """Build an FP8 engine in a block on a CPU without AMX: vLLM (0.30) asks for it, but needs only AVX512-BF16."""
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8BlockScaledMMKernel
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsFp8

    linear: Any = CPUFp8BlockScaledMMKernel
    experts: Any = CPUExpertsFp8
    asks = vars(linear)["is_supported"], vars(experts)["_supports_current_device"]
    linear.is_supported = classmethod(lambda kernel, capability=None: (True, None))
    experts._supports_current_device = staticmethod(lambda: True)
    try:
        yield
    finally:
        linear.is_supported, experts._supports_current_device = asks


def _common_prefix(job_tag: str) -> str:
    """Return a prefix that is the same on all ranks of a job and was never used before."""
    prefix = [f"{job_tag}-{secrets.token_hex(4)}"]
    if dist.is_initialized():
        dist.broadcast_object_list(prefix, src=0)
    return prefix[0]


def reload_is_stale_on_cpu() -> bool:
    """Return whether this vLLM needs the two functions below."""
    import vllm
    from vllm.platforms import current_platform

    return current_platform.is_cpu() and vllm.__version_tuple__[:2] <= LAST_AFFECTED


def before_reload(model: nn.Module) -> None:
    """Make vLLM pack unquantised experts again: their method does it only as long as it has no kernel."""
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if type(method).__name__ == "UnquantizedFusedMoEMethod":
            method.moe_kernel = None


def after_reload(model: nn.Module) -> None:
    """Pack a tied output embedding again: a reload packs only modules that tensors were loaded into."""
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        is_head = type(module).__name__ == "ParallelLMHead"
        if is_head and type(method).__name__ == "UnquantizedEmbeddingMethod":
            method.process_weights_after_loading(module)
