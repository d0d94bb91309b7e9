"""Start a small policy on a rank, and give it a loss."""

from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_mcpo.config.config import Config
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.data.batch import make_batch
from megatron_mcpo.distributed import parallel
from megatron_mcpo.mcore.policy import LossInput, Policy
from megatron_mcpo.types import TrainBatch
from tests.support import tiny_models

ONE_RANK = Layout()


def start(config: Config, layout: Layout = ONE_RANK) -> tuple[Policy, TrainBatch]:
    ranks = parallel.init(layout, seed=0, timeout_seconds=60)
    policy = Policy(config, from_folder(Path(config.model.path)), ranks)
    groups = tiny_models.rollout_groups(num_prompts=4, num_samples=3)
    batch = make_batch(
        groups,
        num_data_ranks=layout.data,
        data_rank=ranks.data_rank,
        share_prompts=policy.shares_prompts,
    )
    return policy, batch


def maximise(factor: float) -> Any:
    def loss(x: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
        value = -factor * x.logp_r.sum() / 100
        return value, {"value": value}

    return loss
