"""Start the ranks of a run and form their process groups."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_mcpo.config.environment import queue_in_order
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.distributed import cpu_backend
from megatron_mcpo.distributed.device import backend, uses_gpu
from megatron_mcpo.distributed.transformer_engine import transformer_engine_problem

# Before the imports of Megatron-Core below.
cpu_backend.apply()
transformer_engine_problem()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Every process group that this rank belongs to. No group is None, which means all ranks to torch.distributed.

    tensor, pipeline, context: the ranks that share this rank's weights, layers, sequences
    data: the ranks that hold the same shard of the model, at the same place of the sequence, in other replicas
    data_context: data x context, the ranks over which gradients are reduced
    expert: the ranks over which this stage's experts are divided
    world: all ranks; host: all ranks, for Python objects and CPU tensors (gloo)
    """

    layout: Layout
    rank: int
    world_size: int
    tensor: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    context: dist.ProcessGroup
    data: dist.ProcessGroup
    data_context: dist.ProcessGroup
    expert: dist.ProcessGroup
    world: dist.ProcessGroup
    host: dist.ProcessGroup

    @property
    def tensor_rank(self) -> int:
        return self.tensor.rank()

    @property
    def pipeline_rank(self) -> int:
        return self.pipeline.rank()

    @property
    def context_rank(self) -> int:
        return self.context.rank()

    @property
    def data_rank(self) -> int:
        """Return the number of the replica that this rank belongs to."""
        return self.data.rank()

    @property
    def expert_rank(self) -> int:
        return self.expert.rank()

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline.rank() == self.pipeline.size() - 1

    @property
    def last_stage_global_rank(self) -> int:
        """Return the global rank of the last stage of this rank's pipeline: a source for broadcasts over `pipeline`."""
        return dist.get_global_rank(self.pipeline, self.pipeline.size() - 1)


def init(layout: Layout, *, seed: int, timeout_seconds: float) -> Groups:
    """Start this rank and form the groups of `layout`. Collective over all ranks; to be called once until `destroy`.

    The ranks are those that torchrun's environment names; without one this process is the only rank. A process group
    that exists already is used as it is.

    Args:
        layout: How the ranks are divided.
        seed: Of Megatron-Core's random states.
        timeout_seconds: A collective that takes longer fails.

    Raises:
        ValueError: `layout` does not fit the number of ranks.
    """
    timeout = timedelta(seconds=timeout_seconds)
    queue_in_order(tensor=layout.tensor, context=layout.context)
    if not dist.is_initialized():
        _start(timeout)
    world_size = dist.get_world_size()
    if layout.world_size != world_size:
        raise ValueError(
            f"{layout} needs {layout.world_size} ranks, {world_size} are running; start {layout.world_size} ranks"
        )
    _form_groups(layout, seed=seed, timeout=timeout, gloo=True)
    # On a CPU the world's group already carries objects; NCCL can't.
    host = None if backend() == "gloo" else dist.new_group(backend="gloo", timeout=timeout)
    return _groups(layout, host)


@contextmanager
def pretend(layout: Layout, *, rank: int) -> Iterator[Groups]:
    """Provide the groups of one rank of a run that does not exist, to find out what that rank would hold and send.

    Collectives return at once and move nothing (torch's fake backend). No process group may exist before.
    """
    assert not dist.is_initialized(), "a rank of a run can't pretend to be another one"
    dist.init_process_group("fake", rank=rank, world_size=layout.world_size, store=FakeStore())
    try:
        _form_groups(layout, seed=0, timeout=timedelta(seconds=60), gloo=False)
        # The optimizer asks for groups of host tensors; these do as well, since nothing travels.
        parallel_state._INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP_GLOO = parallel_state.get_data_parallel_group(
            with_context_parallel=True
        )
        parallel_state._INTRA_PARTIAL_EXPERT_DATA_PARALLEL_GROUP_GLOO = parallel_state.get_expert_data_parallel_group()
        yield _groups(layout, None)
    finally:
        destroy()


def destroy() -> None:
    """Leave all groups. Does nothing if there are none."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _start(timeout: timedelta) -> None:
    """Join the process group that torchrun's environment describes, or form one of this process alone."""
    if uses_gpu():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" in os.environ:
        dist.init_process_group(backend(), timeout=timeout)
    else:
        dist.init_process_group(backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def _form_groups(layout: Layout, *, seed: int, timeout: timedelta, gloo: bool) -> None:
    """Form Megatron-Core's groups and seed its random states.

    gloo: whether it also gets groups for host tensors, which its checkpoints use
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=1,
        distributed_timeout_minutes=timeout.total_seconds() / 60,
        create_gloo_process_groups=gloo,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def _groups(layout: Layout, host: dist.ProcessGroup | None) -> Groups:
    """Collect the groups that Megatron-Core formed. host: None for the world's own group"""
    world = dist.group.WORLD
    assert world is not None
    return Groups(
        layout=layout,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor=parallel_state.get_tensor_model_parallel_group(),
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        context=parallel_state.get_context_parallel_group(),
        data=parallel_state.get_data_parallel_group(),
        data_context=parallel_state.get_data_parallel_group(with_context_parallel=True),
        expert=parallel_state.get_expert_model_parallel_group(),
        world=world,
        host=host or world,
    )
