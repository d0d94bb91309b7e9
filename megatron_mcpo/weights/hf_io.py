"""Reads a Hugging Face folder into this rank's parameters, and no more of it than these need."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from megatron_mcpo.config import ConfigError
from megatron_mcpo.hf_files import read_headers
from megatron_mcpo.model_config import ModelConfig
from megatron_mcpo.parallel import Groups, together
from megatron_mcpo.weights.bind import bind
from megatron_mcpo.weights.layout import Slice, cut_dim, fill
from megatron_mcpo.weights.mapping import Parameter, tensor_problems


def load_hf(chunks: Sequence[nn.Module], model: ModelConfig, folder: Path, groups: Groups) -> None:
    """Fill every parameter of `chunks` but the contrastive head's from the safetensors in `folder`.

    Values are cast to the parameters' dtype; rows that pad the vocabulary become zero. Collective over all ranks: all
    return or all raise. Raises ConfigError for files that can't be read or don't hold this model, before any parameter
    is changed.
    """
    bound = [(parameter, tensor) for parameter, tensor in bind(chunks, model, groups) if tensor is not None]
    with together(groups), torch.no_grad():
        problems = tensor_problems(model, folder)
        if problems:
            raise ConfigError(problems)
        checkpoint = _Checkpoint(folder)
        for parameter, tensor in bound:
            _fill(tensor, parameter, checkpoint, groups)


def _fill(tensor: nn.Parameter, parameter: Parameter, checkpoint: "_Checkpoint", groups: Groups) -> None:
    row = parameter.row

    def read(piece: Slice) -> Tensor:
        return checkpoint.read(parameter.hugging_face[piece.tensor], piece, cut_dim(row))

    num_shards = row.num_shards(groups.layout)
    fill(row, tensor, read, rank=groups.tensor_rank if num_shards > 1 else 0, num_ranks=num_shards)


class _Checkpoint:
    """The safetensors of a folder: one file, or several with an index. Reads values on demand."""

    def __init__(self, folder: Path):
        self._file_of = {name: header.file for name, header in read_headers(folder).items()}
        self._files: dict[Path, Any] = {
            file: safe_open(file, framework="pt", device="cpu") for file in set(self._file_of.values())
        }

    def read(self, name: str, piece: Slice, dim: int) -> Tensor:
        """Values start..stop-1 of dimension `dim`, everything of the others."""
        where = [slice(None)] * dim + [slice(piece.start, piece.stop)]
        values: Tensor = self._files[self._file_of[name]].get_slice(name)[tuple(where)]
        return values
