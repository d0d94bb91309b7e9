"""The whole model as full Hugging Face tensors, on every rank, one parameter at a time."""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_mcpo.model_config import ModelConfig
from megatron_mcpo.parallel import Groups
from megatron_mcpo.weights.bind import bind
from megatron_mcpo.weights.layout import join, shard_shape
from megatron_mcpo.weights.mapping import Split


def export(chunks: Sequence[nn.Module], model: ModelConfig, groups: Groups) -> Iterator[tuple[str, Tensor]]:
    """Every full tensor with its Hugging Face name, in layer order, the same on every rank. The tensors are new ones.

    Collective over the tensor, pipeline and expert groups: every rank must consume it to the end. Holds one parameter
    at a time (its shard, the gathered shards, the full tensors). The stage that owns a parameter sends its shards along
    the pipeline and then every stage gathers them: less travels between stages than with full tensors. Output
    embeddings tied to the input's and the contrastive head are left out.
    """
    some_parameter = next(chunks[0].parameters())
    for parameter, mine in bind(chunks, model, groups):
        row = parameter.row
        if row.tied:
            continue
        if mine is None:
            shape = shard_shape(row, row.num_shards(groups.layout))
            shard = torch.empty(shape, dtype=some_parameter.dtype, device=some_parameter.device)
        else:
            shard = mine.detach().contiguous()
        if groups.layout.pipeline > 1:
            dist.broadcast(shard, group=groups.pipeline, group_src=parameter.stage)
        if parameter.expert_rank is not None and groups.layout.expert > 1:
            dist.broadcast(shard, group=groups.expert, group_src=parameter.expert_rank)
        whole = row.split is Split.REPLICATED or row.num_shards(groups.layout) == 1
        shards = [shard] if whole else _gather(shard, groups)
        yield from zip(parameter.hugging_face, join(row, shards), strict=True)


def _gather(shard: Tensor, groups: Groups) -> list[Tensor]:
    """The shards of all tensor ranks, in rank order."""
    num_ranks = groups.layout.tensor
    gathered = shard.new_empty((num_ranks * shard.shape[0], *shard.shape[1:]))
    dist.all_gather_into_tensor(gathered, shard, group=groups.tensor)
    return list(gathered.chunk(num_ranks))
