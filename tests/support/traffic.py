"""Count what a rank receives from other ranks while a block of code runs, where torch dispatches its messages."""

from collections import Counter, defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_mcpo.distributed.parallel import Groups


class Received(TorchDispatchMode):
    """The bytes that this rank receives from others, and their messages, by group.

    An all-reduce is a reduce-scatter and an all-gather. Raises AssertionError for a message of an unknown kind.
    """

    def __init__(self, groups: Groups):
        super().__init__()
        self.names = {
            frozenset(dist.get_process_group_ranks(group)): name
            for name, group in (
                ("world", groups.world),
                ("data", groups.data_context),
                ("context", groups.context),
                ("expert", groups.expert),
                ("pipeline", groups.pipeline),
                ("tensor", groups.tensor),
            )
        }
        self.bytes: defaultdict[str, float] = defaultdict(float)
        self.messages: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.name()
        if name.startswith("c10d::"):
            self._count(name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple) -> None:
        group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
        ranks, size = frozenset(dist.get_process_group_ranks(group)), group.size()
        first = _flat(args[0])
        whole = sum(tensor.nbytes for tensor in first)
        if name.startswith(("_allgather_base_", "allgather_")):  # also allgather_into_tensor_coalesced_
            received = whole * (size - 1) / size
        elif name.startswith(("_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_")):
            received = whole * (size - 1)
        elif name.startswith("allreduce_"):
            received = 2 * whole * (size - 1) / size
        elif name.startswith("alltoall_base_"):
            sizes = args[3]  # of the parts received; equal ones are not named
            own = sizes[group.rank()] / sum(sizes) if sizes and whole else 1 / size
            received = whole * (1 - own)
        elif name.startswith("recv_"):
            received = whole
        elif name.startswith(("send", "broadcast_", "barrier")):
            received = 0.0
        else:
            raise AssertionError(f"a message of an unknown kind: {name}")
        if received:
            self.bytes[self.names[ranks]] += received
            self.messages[self.names[ranks]] += 1


def _flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [tensor for each in value for tensor in _flat(each)]
