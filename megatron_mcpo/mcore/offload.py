"""Tensors that live in host memory while the device does not compute with them.

A tensor keeps its identity and only its `data` moves: an optimizer's groups, its state or a module hold the same
tensors wherever the content is. Bytes are copied, never rounded, so that nothing a run computes depends on where they
were. On a CPU both places are host memory; the same copies are made there, and what they were made of is freed.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_mcpo.distributed.device import device, uses_gpu
from megatron_mcpo.distributed.memory import trim

_ALIGNMENT = 64


class Offloaded:
    """Tensors with one block of host memory, which they leave for `on_device` alone.

    tensors: what is moved, asked for each time: an optimizer makes its moments with the first update
    frozen: they are always the same and never change, so that they are copied to the host only once
    """

    def __init__(self, tensors: Callable[[], Sequence[Tensor]], *, frozen: bool):
        self._tensors = tensors
        self._frozen = frozen
        self._device = device()
        self._block = torch.empty(0, dtype=torch.uint8)
        self._park()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """A block that finds the tensors on the device."""
        for tensor in self._tensors():
            tensor.data = tensor.to(self._device, non_blocking=True, copy=True)
        yield
        self._park()

    def _park(self) -> None:
        tensors = self._tensors()
        ends = [0]
        for tensor in tensors:
            ends.append(ends[-1] + -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT)
        is_new = ends[-1] > self._block.numel()
        if is_new:
            self._block = _host_block(ends[-1])
        places = [
            self._block[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for start, tensor in zip(ends[:-1], tensors, strict=True)
        ]
        if is_new or not self._frozen:
            for place, tensor in zip(places, tensors, strict=True):
                place.copy_(tensor, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        for place, tensor in zip(places, tensors, strict=True):
            tensor.data = place
        trim()


class OptimizerMemory:
    """Of Megatron-Core's distributed optimizer: on the device only what an update is just working with.

    The fp32 copies of the weights and both moments are there for the optimizer's step, the gradient buffers from
    `take_gradients` to `drop_gradients`. Their content is lost in between: every backward pass begins with zeros.
    Megatron-Core's own `offload_to_cpu` would tear fp32 weights, which are views of the model's, away from it.
    """

    def __init__(self, optimizer: Any, buffers: Sequence[Any]):
        """optimizer: before its first step; buffers: Megatron's gradient buffers"""
        self._optimizer = optimizer
        self._buffers = buffers
        self._state = Offloaded(lambda: state_tensors(optimizer), frozen=False)
        self.drop_gradients()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """A block that finds the optimizer's tensors on the device."""
        with self._state.on_device():
            yield

    def take_gradients(self) -> None:
        """Give the gradient buffers their memory, with any content; nothing happens where they have it."""
        for buffer in self._buffers:
            buffer.grad_data.untyped_storage().resize_(buffer.grad_data.nbytes)

    def drop_gradients(self) -> None:
        """Free the gradient buffers, and what was made of their content."""
        self._optimizer.zero_grad()
        for buffer in self._buffers:
            buffer.grad_data.untyped_storage().resize_(0)
        trim()


def state_tensors(optimizer: Any) -> list[Tensor]:
    """Fp32 copies of the weights, and moments; of fp32 weights, which have no copies, the moments alone."""
    found: list[Tensor] = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is None:  # as where a rank has no parameters of its kind
            continue
        found += [copy for group in part.shard_fp32_from_float16_groups for copy in group]
        states = part.optimizer.state.values()
        found += [value for state in states for value in state.values() if torch.is_tensor(value)]
    return found


def _host_block(num_bytes: int) -> Tensor:
    """So many bytes, pinned where there is a GPU. Torch's own pinned memory is rounded up to a power of two."""
    block = torch.empty(num_bytes, dtype=torch.uint8)
    if uses_gpu() and num_bytes:
        runtime: Any = torch.cuda.cudart()
        torch.cuda.check_error(int(runtime.cudaHostRegister(block.data_ptr(), num_bytes, 0)))
        weakref.finalize(block, runtime.cudaHostUnregister, block.data_ptr())
    return block
