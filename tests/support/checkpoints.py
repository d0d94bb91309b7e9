"""Policies that train a little, save and load, on ranks."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import tensor_parallel
from torch import Tensor

from megatron_mcpo.algo.surrogate import surrogate
from megatron_mcpo.config.config import Config
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.data.batch import make_batch
from megatron_mcpo.distributed import parallel
from megatron_mcpo.mcore import saving
from megatron_mcpo.mcore.checkpoint import Checkpoints
from megatron_mcpo.mcore.model import unwrap
from megatron_mcpo.mcore.policy import LossInput, Policy
from megatron_mcpo.types import Update
from tests.support import tiny_models

NUM_PROMPTS, NUM_SAMPLES, DIM, UPDATES = 6, 3, 16, 3


HEAD = "contrastive_head"


def build(config: Config, layout: Layout) -> Policy:
    ranks = parallel.init(layout, seed=0, timeout_seconds=240)
    return Policy(config, from_folder(Path(config.model.path)), ranks)


def checkpoints_of(policy: Policy, folder: Path, *, in_background: bool = False) -> Checkpoints:
    return Checkpoints(
        policy=policy,
        folder=folder,
        vocabulary="tokens",
        assets={"config.json": b"{}"},
        keep=2,
        keep_every=0,
        in_background=in_background,
        say=print,
    )


def learn(policy: Policy, seed: int) -> Update:
    """Update everything, the head too, on a batch that depends on the seed and not on the layout."""
    layout = policy.groups.layout
    batch = make_batch(
        tiny_models.rollout_groups(num_prompts=NUM_PROMPTS, num_samples=NUM_SAMPLES, seed=seed),
        num_data_ranks=layout.data,
        data_rank=policy.groups.data_rank,
        share_prompts=policy.shares_prompts,
    )
    generator = torch.Generator().manual_seed(seed)
    advantages_M = torch.randn(NUM_PROMPTS * NUM_SAMPLES, generator=generator)
    grad_MD = torch.randn(NUM_PROMPTS * NUM_SAMPLES, DIM, generator=generator) / 10
    advantages_R = advantages_M[batch.rows_N][batch.rollout_R].to(policy.device)
    grad_ND = grad_MD[batch.rows_N].to(policy.device)

    def loss(x: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
        assert x.z_nD is not None
        policy_term = -(x.logp_r * advantages_R[x.response_r]).sum() / batch.num_response_tokens
        return policy_term + surrogate(x.z_nD, grad_ND[list(x.rollouts)]), {}

    return policy.update(batch, loss)


def weights(policy: Policy) -> dict[str, Tensor]:
    """Return the exported weights, and those of the head on ranks that hold it."""
    found = {name: tensor.clone() for name, tensor in policy.weights()}
    head = getattr(unwrap(policy.chunks[-1]), HEAD, None)
    return found if head is None else {**found, HEAD: head.weight.detach().clone()}


def random_states(policy: Policy) -> list[Tensor]:
    tracked = tensor_parallel.get_cuda_rng_tracker().get_states()
    return [torch.get_rng_state(), *(tracked[name] for name in sorted(tracked))]


def train_save_train(config: Config, layout: Layout, folder: Path) -> tuple[dict, dict, float, list[Tensor]]:
    """Weights when saved and one update later, the latter's gradient norm, random states when saved."""
    policy = build(config, layout)
    for seed in range(UPDATES):
        learn(policy, seed)
    torch.rand(1 + policy.groups.rank)  # no longer what a new process has
    saved, states = weights(policy), random_states(policy)
    checkpoints_of(policy, folder).save(UPDATES, {"loop": [1, 2]})
    update = learn(policy, UPDATES)
    return saved, weights(policy), update.grad_norm, states


def load_train(config: Config, layout: Layout, folder: Path) -> tuple[dict, dict, float, list[Tensor]]:
    """Load a checkpoint, then train as `train_save_train` does after its save."""
    policy = build(config, layout)
    found = checkpoints_of(policy, folder).load()
    assert found is not None
    assert (found.step, found.state, found.skipped, policy.version) == (UPDATES, {"loop": [1, 2]}, (), UPDATES)
    loaded, states = weights(policy), random_states(policy)
    update = learn(policy, UPDATES)
    assert update.lr == pytest.approx(config.optimizer.lr * (1 - (UPDATES + 1) / (config.run.steps + 1)))
    return loaded, weights(policy), update.grad_norm, states


def settings(model: Path, dtype: str) -> Config:
    return tiny_models.config(
        model,
        run={"steps": UPDATES + 2},
        model={"dtype": dtype},
        optimizer={"schedule": "linear", "weight_decay": 0.1, "head_lr": 3e-3},
        contrastive={"dim": DIM},
    )


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest error relative to the largest entry of its tensor, and the name of that tensor."""
    assert set(found) == set(expected)
    errors = {name: (found[name] - expected[name]).abs().max() / expected[name].abs().max() for name in expected}
    return max((error.nan_to_num(nan=torch.inf).item(), name) for name, error in errors.items())


ENOUGH = 240.0


def close_gate() -> threading.Event:
    """From now on this rank's writer waits for the event."""
    gate, write = threading.Event(), saving._write_bucket

    def gated(*args: Any, **kwargs: Any) -> Any:
        assert gate.wait(ENOUGH)
        return write(*args, **kwargs)

    saving._write_bucket = gated
    return gate


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def until(condition: Callable[[], bool]) -> None:
    """Wait for what is to become true, in the same way on all ranks."""
    deadline = time.monotonic() + ENOUGH
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def in_background(policy: Policy, folder: Path) -> Checkpoints:
    return checkpoints_of(policy, folder, in_background=True)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
