"""Saving and loading what a run needs to go on: model, head, optimizer, schedule, random states, and the loop's state.

A checkpoint is a folder step_NNNNNN with Megatron's sharded files and state.json. It is written under another name
and renamed when it is complete: what has the name can be loaded, under the same parallel layout or any other.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_mcpo.mcore.model import unwrap
from megatron_mcpo.mcore.policy import Policy

_STATE = "state.json"


def save(policy: Policy, folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write the checkpoint of `step` into `folder` and drop the ones before it; collective over all ranks.

    state: JSON-able, the same on every rank
    """
    final = folder / f"step_{step:06d}"
    draft = folder / f".{final.name}.tmp"
    if policy.groups.rank == 0:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    dist.barrier(group=policy.groups.world)
    dist_checkpointing.save({**_sharded_state(policy, is_loading=False), "rng": _random_states(policy)}, str(draft))
    dist.barrier(group=policy.groups.world)
    if policy.groups.rank == 0:
        own = {"step": step, "version": policy.version, "ranks": policy.groups.world_size}
        (draft / _STATE).write_text(json.dumps({**own, **state}))
        shutil.rmtree(final, ignore_errors=True)
        draft.rename(final)
        for other in folder.glob("step_*"):
            if other != final:
                shutil.rmtree(other)
    dist.barrier(group=policy.groups.world)
    return final


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint."""
    return max((path for path in folder.glob("step_*") if (path / _STATE).exists()), default=None)


def load(policy: Policy, path: Path) -> dict[str, Any]:
    """Put the checkpoint into a policy that was just built; returns the state that `save` was given, with `step`.

    Collective. Every rank gets its random states back where the checkpoint was written by as many ranks; there is no
    telling which of them others should have.
    """
    state: dict[str, Any] = json.loads((path / _STATE).read_text())
    wanted = _sharded_state(policy, is_loading=True)
    if state["ranks"] == policy.groups.world_size:
        wanted["rng"] = _random_states(policy)
    loaded = dist_checkpointing.load(wanted, str(path))
    for number, chunk in enumerate(policy.chunks):
        unwrap(chunk).load_state_dict(loaded[f"model{number}"])
    policy.optimizer.load_state_dict(loaded["optimizer"])
    policy.lr_schedule.load_state_dict(loaded["lr_schedule"])
    if "rng" in loaded:
        torch.set_rng_state(loaded["rng"]["torch"])
        tensor_parallel.get_cuda_rng_tracker().set_states(loaded["rng"]["tracker"])
    policy.version = state["version"]
    return state


def _sharded_state(policy: Policy, *, is_loading: bool) -> dict[str, Any]:
    """What is saved, described so that another layout can load it."""
    _count_padding(policy)
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "dp_cp_group": policy.groups.data_context,
        "chained_optim_avoid_prefix": True,
    }
    models = {
        f"model{number}": unwrap(chunk).sharded_state_dict(metadata=metadata)
        for number, chunk in enumerate(policy.chunks)
    }
    optimizer = policy.optimizer.sharded_state_dict(dict(models), is_loading=is_loading, metadata=metadata)
    return {**models, "optimizer": optimizer, "lr_schedule": policy.lr_schedule.state_dict()}


def _count_padding(policy: Policy) -> None:
    """Make Megatron-Core find the optimizer's state where a buffer has several buckets (tied embeddings in a pipeline).

    Up to 0.19.2 it strips the padding at a bucket's end from what it saves, but looks parameters up where they stand
    with it: those in later buckets get their neighbours' weights and moments (NVIDIA/Megatron-LM#5077). Padding that
    counts as content stays; checkpoints are the same as with a Megatron-Core that has the repair.
    """
    for buffer in policy.gradient_buffers:
        for bucket in buffer.buckets[:-1]:
            bucket.numel_unpadded = bucket.grad_data.numel()
        buffer.numel_unpadded = sum(bucket.numel_unpadded for bucket in buffer.buckets)


def _random_states(policy: Policy) -> ShardedObject:
    """This rank's random states. Nothing draws from them today: no layer drops out, and every rollout has a seed."""
    states = {"torch": torch.get_rng_state(), "tracker": tensor_parallel.get_cuda_rng_tracker().get_states()}
    return ShardedObject("rng", states, (policy.groups.world_size,), (policy.groups.rank,), replica_id=0)
