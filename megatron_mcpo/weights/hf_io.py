"""Reads a Hugging Face folder into this rank's parameters, and no more of it than these need."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from megatron_mcpo.model_config import ModelConfig
from megatron_mcpo.parallel import Groups, together
from megatron_mcpo.weights.bind import bind
from megatron_mcpo.weights.layout import Slice, cut_dim, fill
from megatron_mcpo.weights.mapping import Parameter, hf_shapes

_DTYPES = ("F64", "F32", "F16", "BF16")
_NOT_WEIGHTS = re.compile(r".*\.rotary_emb\.inv_freq$")
"""Buffers that old checkpoints hold; they follow from the configuration."""


def load_hf(chunks: Sequence[nn.Module], model: ModelConfig, folder: Path, groups: Groups) -> None:
    """Fill every parameter of `chunks` but the contrastive head's from the safetensors in `folder`.

    Values are cast to the parameters' dtype; rows that pad the vocabulary become zero. Collective over all ranks: all
    return or all raise. Raises ValueError that names every tensor that is missing, unknown, of another shape, or not
    of a floating-point type, before any parameter is changed; or, for a file that can't be read, naming it.
    """
    bound = [(parameter, tensor) for parameter, tensor in bind(chunks, model, groups) if tensor is not None]
    with together(groups), torch.no_grad():
        checkpoint = _Checkpoint(folder)
        problems = checkpoint.problems(model)
        if problems:
            raise ValueError(
                f"{folder} does not hold the model that its config.json describes:\n" + "\n".join(problems)
            )
        for parameter, tensor in bound:
            _fill(tensor, parameter, checkpoint, groups)


def _fill(tensor: nn.Parameter, parameter: Parameter, checkpoint: "_Checkpoint", groups: Groups) -> None:
    row = parameter.row

    def read(piece: Slice) -> Tensor:
        return checkpoint.read(parameter.hugging_face[piece.tensor], piece, cut_dim(row))

    fill(row, tensor, read, rank=groups.tensor_rank, num_ranks=groups.layout.tensor)


class _Checkpoint:
    """The safetensors of a folder: one file, or several with an index. Reads headers at once and values on demand."""

    def __init__(self, folder: Path):
        """Raises ValueError when a file is missing or is not what it should be."""
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        else:
            names = ["model.safetensors"]
        for name in names:
            try:
                self._files[name] = safe_open(folder / name, framework="pt", device="cpu")
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"{folder / name}: can't be read as safetensors ({error}); download it again"
                ) from error
            self._file_of.update(dict.fromkeys(self._files[name].keys(), name))

    def problems(self, model: ModelConfig) -> list[str]:
        """A line for every tensor that differs from what `model` needs; reads headers only."""
        expected = hf_shapes(model)
        problems = [f"{name}: missing" for name in expected if name not in self._file_of]
        for name in self._file_of:
            header = self._header(name)
            if name not in expected:
                if not _NOT_WEIGHTS.match(name) and not (model.tied_embeddings and name == "lm_head.weight"):
                    problems.append(f"{name}: unknown, the {model.family} model has no such tensor")
            elif tuple(header.get_shape()) != expected[name]:
                problems.append(f"{name}: has shape {tuple(header.get_shape())}, must have {expected[name]}")
            elif header.get_dtype() not in _DTYPES:
                problems.append(f"{name}: has type {header.get_dtype()}, must be one of {', '.join(_DTYPES)}")
        return problems

    def read(self, name: str, piece: Slice, dim: int) -> Tensor:
        """Values start..stop-1 of dimension `dim`, everything of the others."""
        where = [slice(None)] * dim + [slice(piece.start, piece.stop)]
        values: Tensor = self._header(name)[tuple(where)]
        return values

    def _header(self, name: str) -> Any:
        return self._files[self._file_of[name]].get_slice(name)
