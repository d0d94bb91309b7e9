"""Describe what a tensor-parallel rank of a vLLM engine holds of a parameter, as slices (see weights/shards.py).

As vLLM (0.30.0) lays weights out before it packs or quantises them: QKVParallelLinear, MergedColumnParallelLinear,
RowParallelLinear, VocabParallelEmbedding, and w13 and w2 of its fused experts. Pure: imports neither torch nor vllm.
"""

from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import ModelConfig, padded_vocabulary
from megatron_mcpo.weights.mapping import Parameter, ParamMapping, Split, parameters
from megatron_mcpo.weights.shards import TensorSlice, cut_dim, cut_shape


def engine_name(parameter: Parameter) -> tuple[str, int | None]:
    """Return the engine's parameter, and for an expert its index along dimension 0 (else None)."""
    first = parameter.hugging_face[0]
    if parameter.mapping.expert:
        module, _, rest = first.partition(".experts.")
        part = "w13" if parameter.mapping.split is Split.RANKS else "w2"
        return f"{module}.experts.routed_experts.{part}_weight", int(rest.partition(".")[0])
    fused = {Split.GROUPS: ("q_proj", "qkv_proj"), Split.RANKS: ("gate_proj", "gate_up_proj")}.get(
        parameter.mapping.split
    )
    return (first.replace(*fused) if fused else first), None


def expert_place(expert: int, *, count: int, num_ranks: int) -> tuple[int, int]:
    """Return the rank that holds one of `count` experts, whole, and its index there, under expert parallelism.

    vLLM's linear placement (determine_expert_map): neighbours together, one more on each of the first ranks where they
    don't divide.
    """
    fewest, ranks_with_more = divmod(count, num_ranks)
    first_of_fewest = ranks_with_more * (fewest + 1)
    if expert < first_of_fewest:
        return divmod(expert, fewest + 1)
    rank, index = divmod(expert - first_of_fewest, fewest)
    return ranks_with_more + rank, index


def engine_slices(mapping: ParamMapping, *, rank: int, num_ranks: int) -> list[TensorSlice]:
    """Return what rank `rank` of an engine holds of a parameter, in order; zeros that pad the vocabulary aren't listed.

    An engine of more ranks than there are key-value heads gives the same head to several neighbours.
    """
    sizes = [shape[cut_dim(mapping)] for shape in mapping.shapes]
    if mapping.split is Split.REPLICATED:
        return [TensorSlice(tensor=number, start=0, stop=size) for number, size in enumerate(sizes)]
    if mapping.split is Split.ROWS:
        (vocabulary,) = sizes
        size = padded_vocabulary(vocabulary) // num_ranks
        start, stop = min(rank * size, vocabulary), min((rank + 1) * size, vocabulary)
        return [TensorSlice(tensor=0, start=start, stop=stop)] if start < stop else []
    found = []
    for number, size in enumerate(sizes):
        heads = mapping.groups if mapping.split is Split.GROUPS and number > 0 else num_ranks
        parts = min(num_ranks, heads)
        assert size % parts == num_ranks % parts == 0, "layout_problems() refuses sizes that don't divide"
        part = rank // (num_ranks // parts)
        found.append(TensorSlice(tensor=number, start=part * size // parts, stop=(part + 1) * size // parts))
    return found


def engine_shard_shape(mapping: ParamMapping, num_ranks: int) -> tuple[int, ...]:
    """Return the shape of a rank's parameter, padding included, or of one expert in it: the same on every rank."""
    if mapping.split is Split.ROWS:
        return cut_shape(mapping, padded_vocabulary(mapping.shapes[0][cut_dim(mapping)]) // num_ranks)
    return cut_shape(mapping, sum(map(len, engine_slices(mapping, rank=0, num_ranks=num_ranks))))


def engine_shapes(model: ModelConfig, num_ranks: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of an engine rank's parameters: experts as one tensor, no tied output embedding."""
    shapes: dict[str, tuple[int, ...]] = {}
    for parameter in parameters(model, Layout()):
        if not parameter.mapping.tied:
            name, expert = engine_name(parameter)
            shape = engine_shard_shape(parameter.mapping, num_ranks)
            shapes[name] = shape if expert is None else (expert + 1, *shape)
    return shapes
