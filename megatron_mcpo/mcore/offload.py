"""Keep tensors in host memory while the device does not compute with them.

A tensor keeps its identity and only its `data` moves: an optimizer's groups, its state or a module hold the same
tensors wherever the content is. Bytes are copied, never rounded, so that no result of a run depends on where they were.
On a CPU both places are host memory; the same copies are made there, and the originals are freed.
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
    """Tensors that are kept in one block of host memory except during `on_device`.

    tensors: returns what is moved; called each time, since an optimizer creates its moments with the first update
    frozen: the tensors and their values never change, so that they are copied to the host only once
    """

    def __init__(self, tensors: Callable[[], Sequence[Tensor]], *, frozen: bool):
        self._tensors = tensors
        self._frozen = frozen
        self._device = device()
        self._block = torch.empty(0, dtype=torch.uint8)
        self._park()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Move the tensors to the device for a block."""
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
    """The memory of Megatron-Core's distributed optimizer: the device holds only what an update is working with.

    The fp32 copies of the weights and both moments are on the device for the optimizer's step, the gradient buffers
    from `take_gradients` to `drop_gradients`. In between their content is lost: every backward pass begins with zeros.
    Megatron-Core's own `offload_to_cpu` would separate fp32 weights, which are views of the model's, from the model.
    """

    def __init__(self, optimizer: Any, buffers: Sequence[Any]):
        """optimizer: before its first step; buffers: Megatron's gradient buffers"""
        self._optimizer = optimizer
        self._buffers = buffers
        self._state = Offloaded(lambda: state_tensors(optimizer), frozen=False)
        self.drop_gradients()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Move the optimizer's tensors to the device for a block."""
        with self._state.on_device():
            yield

    def take_gradients(self) -> None:
        """Allocate the memory of the gradient buffers, with any content, unless they have it."""
        for buffer in self._buffers:
            buffer.grad_data.untyped_storage().resize_(buffer.grad_data.nbytes)

    def drop_gradients(self) -> None:
        """Free the gradient buffers, and what was computed from their content."""
        self._optimizer.zero_grad()
        for buffer in self._buffers:
            buffer.grad_data.untyped_storage().resize_(0)
        trim()


def state_tensors(optimizer: Any) -> list[Tensor]:
    """Return the fp32 copies of the weights and the moments; fp32 weights have no copies, only moments."""
    found: list[Tensor] = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is None:  # a rank may have no parameters of its kind
            continue
        found += [copy for group in part.shard_fp32_from_float16_groups for copy in group]
        states = part.optimizer.state.values()
        found += [value for state in states for value in state.values() if torch.is_tensor(value)]
    return found


def _host_block(num_bytes: int) -> Tensor:
    """Allocate bytes, pinned if a GPU is used. Torch's own pinned memory is rounded up to a power of two."""
    block = torch.empty(num_bytes, dtype=torch.uint8)
    if uses_gpu() and num_bytes:
        runtime: Any = torch.cuda.cudart()
        torch.cuda.check_error(int(runtime.cudaHostRegister(block.data_ptr(), num_bytes, 0)))
        weakref.finalize(block, runtime.cudaHostUnregister, block.data_ptr())
    return block
