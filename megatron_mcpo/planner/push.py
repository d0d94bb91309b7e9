"""A push of weights to the engines: what every rank receives, and the buffers that it takes.

Which way they go is decided by the rules of run.py and weights/transfer.py. Where every engine rank gets the slices
that it lacks, they are counted as weights/reshard.py cuts them, but once for all layers, replicas and stages that are
alike: a search counts hundreds of layouts.
"""

from functools import cache
from itertools import pairwise
from math import prod

from megatron_mcpo.config.config import Config
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.rollout.vllm_server import BUCKET_BYTES as SERVER_BUCKET_BYTES
from megatron_mcpo.weights.full_sync import BUCKET_BYTES
from megatron_mcpo.weights.mapping import Place, Split, table
from megatron_mcpo.weights.reshard_plan import num_elements, overlap
from megatron_mcpo.weights.reshard_sync import why_gather
from megatron_mcpo.weights.shards import shard_shape


def is_direct(config: Config, model: ModelConfig) -> bool:
    """Whether engines are written into; else every rank puts together every full tensor."""
    return not config.engine.servers and why_gather(model, packed=config.engine.quantization != "none") is None


def received_bytes(config: Config, model: ModelConfig, layout: Layout, itemsize: int) -> tuple[int, ...]:
    """By rank; of gathered experts, on average over the ranks that they are divided over."""
    if is_direct(config, model):
        return tuple(itemsize * each for each in direct_elements(model, layout, config.engine.tensor_parallel))
    stages = (gathered_bytes(model, layout, stage, itemsize) for stage in range(layout.pipeline))
    return tuple(each for each in stages for _ in range(layout.world_size // layout.pipeline))


def staged_bytes(config: Config, model: ModelConfig, layout: Layout, itemsize: int) -> float:
    """Buckets under way and two neighbouring full tensors (see sync.export); a bucket more towards servers.

    Slices from rank to rank take less, but after the first push the engine is compared with full tensors.
    """
    sizes = [prod(shape) for row in table(model) if not row.tied for shape in row.shapes]
    neighbours = max(map(sum, pairwise(sizes))) * itemsize
    under_way = BUCKET_BYTES / 2 if layout.model_parallel * layout.expert > 1 else 0
    return under_way + neighbours + (SERVER_BUCKET_BYTES if config.engine.servers else 0)


@cache
def direct_elements(model: ModelConfig, layout: Layout, engine_ranks: int) -> tuple[int, ...]:
    """What reshard.Plan's Totals.received says, without asking who sends."""
    last = layout.pipeline - 1
    layers = model.num_layers // layout.pipeline
    found = []
    for rank in range(layout.world_size):
        stage = rank * layout.pipeline // layout.world_size
        own = {Place.FIRST: stage == 0 or (model.tied_embeddings and stage == last), Place.LAST: stage == last}
        share = _shares(model, layout.tensor, rank % layout.tensor, engine_ranks, rank % engine_ranks)
        total = sum(needed - held * own[place] for place, (needed, held) in share.items() if place in own)
        needed, held = share[Place.LAYER]
        found.append(total + model.num_layers * needed - layers * held)
    return tuple(found)


@cache
def _shares(
    model: ModelConfig, tensor: int, tensor_rank: int, engine_ranks: int, engine_rank: int
) -> dict[Place, tuple[int, int]]:
    """Of a layer and of either end: elements that an engine rank holds, and how many a trainer's shard has of them."""
    found = dict.fromkeys(Place, (0, 0))
    for row in table(model):
        assert not row.expert, "is_direct() says no"
        if row.tied:
            continue
        num_shards = 1 if row.split is Split.REPLICATED else tensor
        parts = [num_elements(row, overlap(row, n, num_shards, engine_rank, engine_ranks)) for n in range(num_shards)]
        needed, held = found[row.place]
        found[row.place] = needed + sum(parts), held + parts[tensor_rank if num_shards > 1 else 0]
    return found


@cache
def gathered_bytes(model: ModelConfig, layout: Layout, stage: int, itemsize: int) -> int:
    """What one rank of a stage receives in a push, on average over expert ranks.

    weights/sync.py sends the shards of every parameter along the pipeline (a divided expert's only to the ranks that
    stand where it is held), then over the expert ranks, and gathers them over the tensor ranks.
    """
    elsewhere = {
        Place.FIRST: float(stage > 0),
        Place.LAST: float(stage < layout.pipeline - 1),
        Place.LAYER: model.num_layers * (1 - 1 / layout.pipeline),
    }
    total = 0.0
    for row in table(model):
        if row.tied:
            continue
        ranks = row.num_shards(layout)
        shard = prod(shard_shape(row, ranks))
        copies = model.experts.count if row.expert and model.experts else 1
        number = copies * (model.num_layers if row.place is Place.LAYER else 1)
        total += copies * elsewhere[row.place] * shard / (layout.expert if row.expert else 1)
        if row.expert:
            total += number * shard * (layout.expert - 1) / layout.expert
        total += number * shard * (row.num_different(layout) - 1)
    return round(itemsize * total)
