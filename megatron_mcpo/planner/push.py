"""Estimate a weight sync: what every rank receives, and the buffers that it takes.

Which way the weights go is decided by the rules of trainer/setup.py and weights/reshard_sync.py. Where every engine
rank receives the slices that it lacks, they are counted as weights/reshard_plan.py cuts them, but once for all layers,
replicas and stages that are alike: a search counts hundreds of layouts.
"""

from functools import cache
from itertools import pairwise
from math import prod

from megatron_mcpo.config.config import Config
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.rollout.vllm_server import BUCKET_BYTES as SERVER_BUCKET_BYTES
from megatron_mcpo.weights.full_sync import GPU_BUCKET_BYTES
from megatron_mcpo.weights.mapping import Place, Split, hf_shapes, registry
from megatron_mcpo.weights.reshard_plan import num_elements, overlap
from megatron_mcpo.weights.reshard_sync import why_full_tensors
from megatron_mcpo.weights.shards import shard_shape


def is_resharded(config: Config, model: ModelConfig) -> bool:
    """Return whether engines get the slices that they lack; else every rank puts together every full tensor."""
    return not config.engine.servers and why_full_tensors(model, packed=config.engine.quantization != "none") is None


def received_bytes(config: Config, model: ModelConfig, layout: Layout, itemsize: int) -> tuple[int, ...]:
    """Count the bytes that each rank receives; for gathered experts the average over the ranks that divide them."""
    if is_resharded(config, model):
        return tuple(itemsize * each for each in resharded_elements(model, layout, config.engine.tensor_parallel))
    stages = (full_tensor_bytes(model, layout, stage, itemsize) for stage in range(layout.pipeline))
    return tuple(each for each in stages for _ in range(layout.world_size // layout.pipeline))


def staged_bytes(config: Config, model: ModelConfig, layout: Layout, itemsize: int) -> float:
    """Return the bytes of buckets under way and two full tensors (see full_sync.export), and two buckets for servers.

    Slices from rank to rank take less, but after the first sync the engine is compared with full tensors.
    """
    sizes = [prod(shape) for mapping in registry(model) if not mapping.tied for shape in mapping.shapes]
    neighbours = max(map(sum, pairwise(sizes))) * itemsize
    under_way = GPU_BUCKET_BYTES / 2 if layout.model_parallel * layout.expert > 1 else 0
    return under_way + neighbours + (2 * SERVER_BUCKET_BYTES if config.engine.servers else 0)


@cache
def num_tensors(model: ModelConfig) -> int:
    """Count the full tensors of a weight sync, which the engine loads one by one."""
    return len(hf_shapes(model))


@cache
def resharded_elements(model: ModelConfig, layout: Layout, engine_ranks: int) -> tuple[int, ...]:
    """Return what weights/reshard_plan.py's Totals.received says, without working out who sends."""
    last = layout.pipeline - 1
    layers = [sum(layout.stage_layers(model.num_layers, stage)) for stage in range(layout.pipeline)]
    found = []
    for rank in range(layout.world_size):
        stage = rank * layout.pipeline // layout.world_size
        own = {Place.FIRST: stage == 0 or (model.tied_embeddings and stage == last), Place.LAST: stage == last}
        share = _shares(model, layout.tensor, rank % layout.tensor, engine_ranks, rank % engine_ranks)
        total = sum(needed - held * own[place] for place, (needed, held) in share.items() if place in own)
        needed, held = share[Place.LAYER]
        found.append(total + model.num_layers * needed - layers[stage] * held)
    return tuple(found)


@cache
def _shares(
    model: ModelConfig, tensor: int, tensor_rank: int, engine_ranks: int, engine_rank: int
) -> dict[Place, tuple[int, int]]:
    """Count, for a layer and either end, the elements of an engine rank, and how many a trainer's shard has of them."""
    found = dict.fromkeys(Place, (0, 0))
    for mapping in registry(model):
        assert not mapping.expert, "is_resharded() excludes experts"
        if mapping.tied:
            continue
        num_shards = 1 if mapping.split is Split.REPLICATED else tensor
        parts = [
            num_elements(mapping, overlap(mapping, n, num_shards, engine_rank, engine_ranks)) for n in range(num_shards)
        ]
        needed, held = found[mapping.place]
        found[mapping.place] = needed + sum(parts), held + parts[tensor_rank if num_shards > 1 else 0]
    return found


@cache
def full_tensor_bytes(model: ModelConfig, layout: Layout, stage: int, itemsize: int) -> int:
    """Return what one rank of a stage receives in a sync of full tensors, on average over expert ranks.

    weights/full_sync.py sends the shards of every parameter along the pipeline (a divided expert's only to the ranks
    that have its expert rank), then over the expert ranks, and gathers them over the tensor ranks.
    """
    elsewhere = {
        Place.FIRST: float(stage > 0),
        Place.LAST: float(stage < layout.pipeline - 1),
        Place.LAYER: float(model.num_layers - sum(layout.stage_layers(model.num_layers, stage))),
    }
    total = 0.0
    for mapping in registry(model):
        if mapping.tied:
            continue
        ranks = mapping.num_shards(layout)
        shard = prod(shard_shape(mapping, ranks))
        copies = model.experts.count if mapping.expert and model.experts else 1
        number = copies * (model.num_layers if mapping.place is Place.LAYER else 1)
        total += copies * elsewhere[mapping.place] * shard / (layout.expert if mapping.expert else 1)
        if mapping.expert:
            total += number * shard * (layout.expert - 1) / layout.expert
        total += number * shard * (mapping.num_different(layout) - 1)
    return round(itemsize * total)
