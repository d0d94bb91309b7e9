"""Gather rows from all data-parallel ranks in the batch's order. Shape legend: see megatron_mcpo.types."""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mcpo.distributed.parallel import Groups
from megatron_mcpo.types import TrainBatch


def gather_rows(local_ND: Tensor, batch: TrainBatch, groups: Groups) -> Tensor:
    """Return the rows [M, D] of all rollouts from every rank's own [N, D], without gradient.

    Ranks may hold different numbers of rows, also none. The numbers are known from the batch, so that only the rows
    themselves are exchanged, padded to the largest share.
    """
    assert local_ND.shape[0] == len(batch), (local_ND.shape, len(batch))
    largest = max(len(rows) for rows in batch.rank_rows)
    padded = local_ND.new_zeros(largest, local_ND.shape[1])
    padded[: len(batch)] = local_ND.detach()
    shares = [torch.empty_like(padded) for _ in batch.rank_rows]
    dist.all_gather(shares, padded, group=groups.data)
    gathered_MD = local_ND.new_empty(len(batch.response_lens_M), local_ND.shape[1])
    for rows, share in zip(batch.rank_rows, shares, strict=True):
        gathered_MD[list(rows)] = share[: len(rows)]
    return gathered_MD
