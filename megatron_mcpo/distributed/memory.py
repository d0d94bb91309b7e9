"""Measure the memory of a job, and give back what it does not need."""

import ctypes
import resource
import sys

import psutil
import torch
import torch.distributed as dist

from megatron_mcpo.distributed.device import uses_gpu
from megatron_mcpo.distributed.parallel import Groups

_most_in_use = 0
"""Bytes of this rank's GPU."""


def peak_memory_gib(groups: Groups) -> float:
    """Return the peak memory of the job in GiB. Collective over all ranks.

    On a CPU: the largest resident size so far of every rank plus the present one of its worker processes, summed. Pages
    that processes share count once for each of them, so that this is an upper bound. On a GPU: the most memory in use
    on any one device when `look` was called, whoever uses it: torch counts neither graphs and NCCL nor that a sleeping
    engine has given its memory back.
    """
    if uses_gpu():
        look()
        peak = torch.tensor(float(_most_in_use), device=torch.device("cuda"))
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=groups.world)
        return peak.item() / 2**30
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    workers = sum(_resident(child) for child in psutil.Process().children(recursive=True))
    total = torch.tensor(float(own + workers))
    dist.all_reduce(total, group=groups.world)
    return total.item() / 2**30


def look() -> None:
    """Note how much of this rank's GPU is in use, at the ends of phases; does nothing on a CPU."""
    global _most_in_use
    if uses_gpu():
        free, total = torch.cuda.mem_get_info()
        _most_in_use = max(_most_in_use, total - free)


def trim() -> None:
    """Give freed memory back to the system, including that of the device.

    glibc keeps the gaps that tensors of ever new sizes leave in its heap; over a run they add up to gigabytes. Torch
    keeps what it freed on a GPU, where the engine needs memory of its own.
    """
    if uses_gpu():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0
