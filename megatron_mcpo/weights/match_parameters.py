"""Match the model's parameter mappings with the parameters in this rank's pipeline chunks."""

from collections.abc import Sequence

from torch import nn

from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.distributed.parallel import Groups
from megatron_mcpo.weights.mapping import HEAD_PREFIX, Parameter, parameters
from megatron_mcpo.weights.shards import shard_shape

_WRAPPER = "module."
"""What each of Megatron's wrappers (DDP, Float16Module) puts before the names of its module."""


def match_parameters(
    chunks: Sequence[nn.Module], model: ModelConfig, groups: Groups
) -> list[tuple[Parameter, nn.Parameter | None]]:
    """Return all parameters of the whole model in the order of export, each with this rank's shard.

    The shard is None where another stage or expert rank holds the parameter, and for tied output embeddings that need
    no second copy. Asserts that `chunks` hold these parameters in these shapes, and no others but those of the
    contrastive head.
    """
    assert len(chunks) == groups.layout.virtual_pipeline
    mine = {(number, name): tensor for number, chunk in enumerate(chunks) for name, tensor in _named(chunk)}
    matched: list[tuple[Parameter, nn.Parameter | None]] = []
    for parameter in parameters(model, groups.layout):
        if parameter.stage != groups.pipeline_rank or parameter.expert_rank not in (None, groups.expert_rank):
            matched.append((parameter, None))
            continue
        found = [mine.pop((parameter.chunk, n)) for n in parameter.megatron if (parameter.chunk, n) in mine]
        assert len(found) == 1 or (parameter.mapping.tied and not found), (
            f"{parameter.megatron}: {len(found)} in the model"
        )
        shard = found[0] if found else None
        if shard is not None:
            expected = shard_shape(parameter.mapping, parameter.mapping.num_shards(groups.layout))
            assert shard.shape == expected, f"{parameter.megatron}: {tuple(shard.shape)}, the mapping says {expected}"
        matched.append((parameter, shard))
    assert not mine, f"parameters that no mapping names: {sorted(mine)}"
    return matched


def _named(chunk: nn.Module) -> list[tuple[str, nn.Parameter]]:
    named = []
    for name, tensor in chunk.named_parameters():
        while name.startswith(_WRAPPER):
            name = name.removeprefix(_WRAPPER)
        if not name.startswith(HEAD_PREFIX):
            named.append((name, tensor))
    return named
