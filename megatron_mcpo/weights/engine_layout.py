"""What a tensor-parallel rank of a vLLM engine holds of a parameter, in the terms of weights/layout.py.

As vLLM (0.30.0) lays weights out before it packs or quantises them: QKVParallelLinear, MergedColumnParallelLinear,
RowParallelLinear, VocabParallelEmbedding, and w13 and w2 of its fused experts. Pure: imports neither torch nor vllm.
"""

from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import ModelConfig, padded_vocabulary
from megatron_mcpo.weights.mapping import Parameter, ParamMapping, Split, parameters
from megatron_mcpo.weights.shards import Slice, cut_dim, cut_shape


def engine_name(parameter: Parameter) -> tuple[str, int | None]:
    """The engine's parameter, and for one of its experts the index along dimension 0; None: it is the whole of it."""
    first = parameter.hugging_face[0]
    if parameter.row.expert:
        module, _, rest = first.partition(".experts.")
        part = "w13" if parameter.row.split is Split.RANKS else "w2"
        return f"{module}.experts.routed_experts.{part}_weight", int(rest.partition(".")[0])
    fused = {Split.GROUPS: ("q_proj", "qkv_proj"), Split.RANKS: ("gate_proj", "gate_up_proj")}.get(parameter.row.split)
    return (first.replace(*fused) if fused else first), None


def expert_place(expert: int, *, count: int, num_ranks: int) -> tuple[int, int]:
    """The rank that holds one of `count` experts, whole, and its index there, in an engine with expert parallelism.

    vLLM's linear placement (determine_expert_map): neighbours together, one more on each of the first ranks where they
    don't divide.
    """
    fewest, ranks_with_more = divmod(count, num_ranks)
    first_of_fewest = ranks_with_more * (fewest + 1)
    if expert < first_of_fewest:
        return divmod(expert, fewest + 1)
    rank, index = divmod(expert - first_of_fewest, fewest)
    return ranks_with_more + rank, index


def engine_slices(row: ParamMapping, *, rank: int, num_ranks: int) -> list[Slice]:
    """What rank `rank` of an engine holds of a parameter, in order; the vocabulary ends with zeros that aren't listed.

    An engine of more ranks than there are key-value heads gives the same head to several neighbours.
    """
    sizes = [shape[cut_dim(row)] for shape in row.shapes]
    if row.split is Split.REPLICATED:
        return [Slice(tensor=number, start=0, stop=size) for number, size in enumerate(sizes)]
    if row.split is Split.ROWS:
        (vocabulary,) = sizes
        size = padded_vocabulary(vocabulary) // num_ranks
        start, stop = min(rank * size, vocabulary), min((rank + 1) * size, vocabulary)
        return [Slice(tensor=0, start=start, stop=stop)] if start < stop else []
    found = []
    for number, size in enumerate(sizes):
        heads = row.groups if row.split is Split.GROUPS and number > 0 else num_ranks
        parts = min(num_ranks, heads)
        assert size % parts == num_ranks % parts == 0, "layout_problems() refuses sizes that don't divide"
        part = rank // (num_ranks // parts)
        found.append(Slice(tensor=number, start=part * size // parts, stop=(part + 1) * size // parts))
    return found


def engine_shard_shape(row: ParamMapping, num_ranks: int) -> tuple[int, ...]:
    """Shape of a rank's parameter, padding included, or of one expert in it: the same on every rank of an engine."""
    if row.split is Split.ROWS:
        return cut_shape(row, padded_vocabulary(row.shapes[0][cut_dim(row)]) // num_ranks)
    return cut_shape(row, sum(map(len, engine_slices(row, rank=0, num_ranks=num_ranks))))


def engine_shapes(model: ModelConfig, num_ranks: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an engine rank's parameters; a tied output embedding is absent, experts are one tensor."""
    shapes: dict[str, tuple[int, ...]] = {}
    for parameter in parameters(model, Layout()):
        if not parameter.row.tied:
            name, expert = engine_name(parameter)
            shape = engine_shard_shape(parameter.row, num_ranks)
            shapes[name] = shape if expert is None else (expert + 1, *shape)
    return shapes
