"""Fill this rank's parameters from a folder of any format."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_mcpo import progress
from megatron_mcpo.config.hf_files import is_sharded
from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.distributed.parallel import Groups
from megatron_mcpo.distributed.peers import together
from megatron_mcpo.weights.checkpoint_layout import MegatronFolder
from megatron_mcpo.weights.hf_io import HfFolder, Source
from megatron_mcpo.weights.mapping import Parameter
from megatron_mcpo.weights.match_parameters import match_parameters
from megatron_mcpo.weights.shards import TensorSlice, fill


def load_hf(chunks: Sequence[nn.Module], model: ModelConfig, folder: Path, groups: Groups) -> None:
    """Fill every parameter of `chunks` but the contrastive head's from the safetensors or the shards in `folder`.

    Loads as `load_source` does. Raises ConfigError for files that can't be read or don't hold this model, before any
    parameter is changed.
    """
    source: Source | None = None
    with together(groups):
        source = MegatronFolder.open(folder, model) if is_sharded(folder) else HfFolder(folder, model)
    assert source is not None
    load_source(chunks, model, source, groups)


def load_source(chunks: Sequence[nn.Module], model: ModelConfig, source: Source, groups: Groups) -> None:
    """Fill every parameter of `chunks` but the contrastive head's, reading no more than this rank needs.

    Values are cast to the parameters' dtype; rows that pad the vocabulary become zero. Collective over all ranks: all
    return or all raise.
    """
    matched = match_parameters(chunks, model, groups)
    with together(groups), torch.no_grad():
        for parameter, tensor in matched:
            progress.tick()
            if tensor is not None:
                _fill(tensor, parameter, source, groups)


def _fill(tensor: nn.Parameter, parameter: Parameter, source: Source, groups: Groups) -> None:
    mapping = parameter.mapping

    def read(each: TensorSlice) -> Tensor:
        return source.read(parameter.hugging_face[each.tensor], each.start, each.stop)

    num_shards = mapping.num_shards(groups.layout)
    fill(mapping, tensor, read, rank=groups.tensor_rank if num_shards > 1 else 0, num_ranks=num_shards)
