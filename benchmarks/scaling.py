"""Count what a rank receives in a step as a run grows: more replicas, layers, rollouts, domains.

`.venv/bin/python -m benchmarks.scaling [--json] [--out benchmarks/results/NAME.json]`
A rank of the trainer takes a real step in a run whose other ranks do not exist (torch's fake process group): its
messages are those that it would exchange, their content is not. The exchange of rollouts is counted without a group.
tests/distributed/test_bench_scaling.py compares all of it with real ranks.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.exchange import received_bytes
from benchmarks.measure import options, write_rows
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.data.batch import make_batch
from megatron_mcpo.distributed import parallel
from megatron_mcpo.distributed.gather import gather_rows
from megatron_mcpo.distributed.parallel import Groups
from megatron_mcpo.mcore.policy import LossInput, Policy, Reference
from megatron_mcpo.types import RolloutGroup
from megatron_mcpo.weights.full_sync import TransferStats, export
from tests.support import tiny_models
from tests.support.traffic import Received

SAMPLES, PROMPTS, LAYERS, DOMAINS = 2, 512, 2, 3
REPLICAS = tuple(2**power for power in range(10))
GROWTH: dict[str, tuple[int, ...]] = {
    "replicas": REPLICAS,
    "layers": (2, 4, 8, 16),
    "rollouts": (256, 1024, 4096),
    "domains": (1, 3, 30),
}
"""The quantities that grow, one at a time; the others stay at 2 replicas, 2 layers, 1,024 rollouts and 3 domains."""


def main(arguments: Sequence[str]) -> int:
    return write_rows("scaling", scaling_rows(), options(__doc__).parse_args(arguments))


def scaling_rows() -> Iterator[dict[str, Any]]:
    """Yield a row per run: bytes and messages that one rank receives in a step and its weight sync, by group."""
    for name, values in GROWTH.items():
        for value in values:
            sizes = {"replicas": 2, "layers": LAYERS, "rollouts": SAMPLES * PROMPTS, "domains": DOMAINS, name: value}
            yield {"grows": name, **sizes, **_pretended(**sizes)}


def _pretended(*, replicas: int, layers: int, rollouts: int, domains: int) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        tiny_models.save_model(Path(folder), "untied", num_layers=layers)
        groups = sampled(rollouts, domains)
        with parallel.pretend(Layout(data=replicas), rank=0) as ranks:
            return received(Path(folder), groups, ranks)


def sampled(rollouts: int, domains: int) -> list[RolloutGroup]:
    """Return random rollouts, of every domain in turn."""
    groups = tiny_models.rollout_groups(num_prompts=rollouts // SAMPLES, num_samples=SAMPLES)
    return [
        RolloutGroup(
            prompt=type(group.prompt)(
                domain=number % domains,
                source=group.prompt.source,
                index=number,
                token_ids=group.prompt.token_ids,
                entry={},
            ),
            completions=group.completions,
            rewards=group.rewards,
            correct=group.correct,
        )
        for number, group in enumerate(groups)
    ]


def small_loss(x: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a loss that needs all gradients."""
    assert x.z_nD is not None
    return x.logp_r.sum() * 1e-6 + x.z_nD.sum() * 1e-6, {}


def received(folder: Path, sampled: list[RolloutGroup], ranks: Groups) -> dict[str, Any]:
    """Count what a rank receives in a step: rollouts, scores, representations, update; then the weight sync."""
    config = tiny_models.config(folder, batch={"prompts": len(sampled), "micro_batch_tokens": 4096})
    model = from_folder(folder)
    policy, reference = Policy(config, model, ranks), Reference(config, model, ranks)
    batch = make_batch(
        sampled,
        num_data_ranks=ranks.layout.data,
        data_rank=ranks.data_rank,
        share_prompts=policy.shares_prompts,
    )

    with Received(ranks) as training:
        policy.score(batch)
        reference.score(batch)
        policy.update(batch, small_loss)
    with Received(ranks) as contrastive:
        gather_rows(torch.zeros(len(batch), 16), batch, ranks)
    held = [replace(group, holder=number % ranks.world_size) for number, group in enumerate(sampled)]
    stats = TransferStats()
    for _ in export(policy.chunks, model, ranks, stats=stats):
        pass
    return {
        "bytes": {
            **{name: round(value) for name, value in training.bytes.items()},
            "rollouts": received_bytes(held, ranks.layout, rank=ranks.rank, data_rank=ranks.data_rank),
            "contrastive": round(sum(contrastive.bytes.values())),
            "sync": stats.received,
        },
        "messages": {**training.messages, "contrastive": sum(contrastive.messages.values())},
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
