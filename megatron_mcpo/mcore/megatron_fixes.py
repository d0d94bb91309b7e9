"""Repair defects of Megatron-Core on any device, for the versions that have them (CPU: distributed/cpu_backend.py)."""

import queue
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async

_LOSES_PADDING = ("0.19.2",)
_STARTS_MANAGER = ("0.19.2",)


def count_padding(buffers: Iterable[Any]) -> None:
    """Make Megatron-Core find the optimizer's state where a buffer has several buckets (tied embeddings in a pipeline).

    Up to 0.19.2 it strips the padding at a bucket's end from what it saves, but looks parameters up at their places
    with padding: those in later buckets get their neighbours' weights and moments (NVIDIA/Megatron-LM#5077). Padding
    that counts as content is not stripped; checkpoints are the same as with a Megatron-Core that has the repair.
    """
    if version("megatron-core") not in _LOSES_PADDING:
        return
    for buffer in buffers:
        for bucket in buffer.buckets[:-1]:
            bucket.numel_unpadded = bucket.grad_data.numel()
        buffer.numel_unpadded = sum(bucket.numel_unpadded for bucket in buffer.buckets)


def need_no_manager() -> None:
    """Make saves need no process beside the ranks: up to 0.19.2 each starts one at its first save, to hold a queue.

    Here only threads of the rank write, which need no queue between processes.
    """
    if version("megatron-core") in _STARTS_MANAGER:
        filesystem_async._results_queue = queue.Queue()
