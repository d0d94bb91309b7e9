"""Count what a rank of every pipeline stage holds: from the mapping table of weights, and from the model itself.

Ranks of a stage hold equally much: Megatron-Core pads the vocabulary, cuts everything else evenly and gives all expert
ranks the same number of experts.
"""

from dataclasses import dataclass
from functools import cache
from math import prod

import torch

from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.distributed import parallel
from megatron_mcpo.distributed.device import only_shapes
from megatron_mcpo.mcore.head import HeadSpec
from megatron_mcpo.mcore.model import build_chunks
from megatron_mcpo.weights.mapping import Place, registry
from megatron_mcpo.weights.match_parameters import match_parameters
from megatron_mcpo.weights.shards import shard_shape

Sizes = tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """The parameter sizes of one chunk of a stage, as its gradient buffers hold them.

    dense, expert: (elements, how many such parameters) of what is reduced over data x context ranks, and of what is
    reduced over the ranks that hold the same experts
    """

    dense: Sizes
    expert: Sizes


@dataclass(frozen=True, kw_only=True)
class RankSize:
    """The parameters of a rank of a pipeline stage. rank: the stage's first; head: elements of the contrastive head"""

    stage: int
    rank: int
    chunks: tuple[Chunk, ...]
    head: int

    @property
    def params(self) -> int:
        return sum(size * count for chunk in self.chunks for size, count in chunk.dense + chunk.expert)


def head_size(model: ModelConfig, head: HeadSpec | None) -> tuple[int, ...]:
    """Return the number of elements of each parameter of the contrastive head (mcore/head.py)."""
    if head is None:
        return ()
    hidden = model.hidden_size
    return (head.dim * hidden, hidden * hidden) if head.kind == "mlp" else (head.dim * hidden,)


@cache
def rank_size(model: ModelConfig, layout: Layout, head: HeadSpec | None, stage: int) -> RankSize:
    """Count one rank's parameters from the mapping table that weights are loaded by."""
    num_chunks = layout.virtual_pipeline
    experts = model.experts.count // layout.expert if model.experts else 0
    rows = [(row, prod(shard_shape(row, row.num_shards(layout)))) for row in registry(model)]
    of_head = head_size(model, head) if stage == layout.pipeline - 1 else ()
    chunks = []
    for number, layers in enumerate(layout.stage_layers(model.num_layers, stage)):
        first = stage == 0 and number == 0
        last = stage == layout.pipeline - 1 and number == num_chunks - 1
        ends = [
            (size, 1)
            for row, size in rows
            if (row.place is Place.FIRST and first)
            or (row.place is Place.LAST and last and not (row.tied and layout.pipeline == 1))
        ]
        inner = [(size, layers) for row, size in rows if row.place is Place.LAYER and not row.expert]
        chunks.append(
            Chunk(
                dense=(*ends, *inner, *((size, 1) for size in of_head if last)),
                expert=tuple((size, layers * experts) for row, size in rows if row.expert),
            )
        )
    return RankSize(
        stage=stage, rank=stage * layout.world_size // layout.pipeline, chunks=tuple(chunks), head=sum(of_head)
    )


def built_size(
    model: ModelConfig, layout: Layout, head: HeadSpec | None, size: RankSize, *, dtype: torch.dtype = torch.bfloat16
) -> int:
    """Count the parameters of a rank's chunks as Megatron-Core builds them, without memory, in a world of all ranks.

    The layers are those of plain torch: Transformer Engine's have the same parameters under other names, in the same
    shapes (weights/mapping.py lists both). Asserts that parameters and shapes are those of the table.
    """
    with parallel.pretend(layout, rank=size.rank) as groups, only_shapes():
        chunks = build_chunks(model, groups, dtype=dtype, head=head)
        match_parameters(chunks, model, groups)
        return sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
