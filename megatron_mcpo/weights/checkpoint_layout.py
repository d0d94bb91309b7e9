"""Where in Megatron's sharded checkpoints the parameters of the table are, whatever layout wrote them.

A checkpoint holds global tensors: layers are stacked along the first dimension, experts along the second, and the rest
is the parameter as one tensor rank would hold it. Only the padding of the vocabulary depends on the layout.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.weights.mapping import HEAD_PREFIX, Parameter, ParamMapping, Place, Split, parameters
from megatron_mcpo.weights.shards import Slice, cut_dim, placed, shard_shape, slices
from megatron_mcpo.weights.torch_dist import ShardedFolder

DTYPES = (torch.bfloat16, torch.float32)
_MASTER = "optimizer.state.param."
"""What Megatron-Core's distributed optimizer (0.19.2, fully_reshardable) puts before the name of a parameter."""
_NUMBERS = re.compile(r"\.(\d+)(?=\.)")
_LAYERS = "decoder.layers."


@dataclass(frozen=True, kw_only=True)
class CheckpointEntry:
    """A parameter in a checkpoint: global tensor `key`, under `index` (its layer and expert)."""

    row: ParamMapping
    key: str
    index: tuple[int, ...]
    hugging_face: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A piece of a parameter as one rank stores it.

    pieces: slices of the row's Hugging Face tensors that it is made of, in order; zeros where these don't fill it
    start: where it begins along the cut dimension; size: how long it is there, padding included
    """

    pieces: tuple[Slice, ...]
    start: int
    size: int


def stored(parameter: Parameter) -> CheckpointEntry:
    """Names are those that Transformer Engine's modules have: it is these that both kinds of modules save under."""
    index = tuple(int(number) for number in _NUMBERS.findall(parameter.hugging_face[0]))
    name = parameter.row.megatron[-1]
    if parameter.row.expert:
        name = name.replace("mlp.experts.", "mlp.experts.experts.").replace("{expert}", "")
    key = _LAYERS + name if parameter.row.place is Place.LAYER else name
    return CheckpointEntry(row=parameter.row, key=key, index=index, hugging_face=parameter.hugging_face)


def global_shape(model: ModelConfig, found: CheckpointEntry, tensor: int) -> tuple[int, ...]:
    """Of the whole tensor that a parameter is in. tensor: ranks whose multiple the vocabulary is padded to"""
    shape = list(shard_shape(found.row, 1))
    if found.row.split is Split.ROWS:
        shape[0] = tensor * shard_shape(found.row, tensor)[0]
    counts = (model.num_layers, model.experts.count if model.experts else 0)
    return (*counts[: len(found.index)], *shape)


def chunks(row: ParamMapping, *, rank: int, num_ranks: int) -> Iterator[Chunk]:
    """What shard `rank` of `num_ranks` is saved as: one chunk, or one of each tensor where these are cut one by one."""
    shard = slices(row, rank=rank, num_ranks=num_ranks)
    if row.split is Split.RANKS:
        for piece in shard:
            before = sum(shape[0] for shape in row.shapes[: piece.tensor])
            yield Chunk(pieces=(piece,), start=before + piece.start, size=len(piece))
        return
    size = shard_shape(row, num_ranks)[cut_dim(row)]
    yield Chunk(pieces=tuple(shard), start=0 if row.split is Split.REPLICATED else rank * size, size=size)


class MegatronFolder:
    """The model in a sharded checkpoint, read as Hugging Face tensors. Optimizer and other state are left alone.

    masters: read the fp32 weights that the optimizer keeps of a model in bf16, where the checkpoint has them; `masters`
        says afterwards whether it does
    Raises ConfigError that names all tensors that are missing, unknown, or of another shape or type.
    """

    def __init__(self, folder: Path, model: ModelConfig, *, masters: bool = False):
        self.folder = folder
        self._files = ShardedFolder(folder)
        wanted = [stored(parameter) for parameter in parameters(model, Layout()) if not parameter.row.tied]
        self._where = {name: (each, number) for each in wanted for number, name in enumerate(each.hugging_face)}
        self.names = tuple(self._where)
        shapes = self._files.shapes()
        problems = []
        for each in {each.key: each for each in wanted}.values():
            expected, found = global_shape(model, each, 1), shapes.get(each.key)
            padded = each.row.split is Split.ROWS and found is not None and found[0] >= expected[0]
            if found is None or (found[1:] if padded else found) != (expected[1:] if padded else expected):
                problems.append(
                    f"{each.key}: has shape {found}, must have {expected}" if found else f"{each.key}: missing"
                )
            elif self._files.dtype(each.key) not in DTYPES:
                problems.append(f"{each.key}: has type {self._files.dtype(each.key)}, must be bf16 or fp32")
        known = {each.key for each in wanted}
        head = {key for key in shapes if key.startswith(HEAD_PREFIX)}
        other = {key for key in shapes if not key.startswith("optimizer.")} - known - head
        problems += [f"{key}: unknown, the {model.family} model has no such tensor" for key in sorted(other)]
        if problems:
            rule = "it must hold the model that config.json describes"
            raise ConfigError([f"{folder}: {rule}:", *(f"  {problem}" for problem in problems)])
        self.masters = masters and all(self._is_master(_MASTER + key, shapes[key]) for key in known | head)
        prefix = _MASTER if self.masters else ""
        self._key = {key: prefix + key for key in known}
        self._head = {key.removeprefix(HEAD_PREFIX): prefix + key for key in sorted(head)}

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor."""
        return self._files.dtype(self._key[self._where[name][0].key])

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a tensor."""
        found, number = self._where[name]
        return found.row.shapes[number]

    def read(self, name: str, start: int = 0, stop: int | None = None, *, dim: int | None = None) -> Tensor:
        """A tensor, newly allocated, or its part start..stop-1. dim: of these; None: that which shards are cut along"""
        found, number = self._where[name]
        cut, shape = cut_dim(found.row), list(found.row.shapes[number])
        dim = cut if dim is None else dim
        stop = shape[dim] if stop is None else stop
        shape[dim] = stop - start
        values = torch.empty(shape, dtype=self.dtype(name))
        wanted = []
        for piece, position in placed(slices(found.row, rank=0, num_ranks=1)):
            low, high = (max(start, piece.start), min(stop, piece.stop)) if dim == cut else (piece.start, piece.stop)
            if piece.tensor == number and low < high:
                offsets = [0] * len(shape)
                offsets[dim] = start
                offsets[cut] = position + low - piece.start
                wanted.append((tuple(offsets), values.narrow(cut, low - (start if dim == cut else 0), high - low)))
        self._files.copy(self._key[found.key], found.index, wanted)
        return values

    def head(self) -> dict[str, Tensor]:
        """The contrastive head's tensors, without their prefix."""
        found = {}
        for name, key in self._head.items():
            values = torch.empty(self._files.shapes()[key], dtype=self._files.dtype(key))
            self._files.copy(key, (), [((0,) * values.dim(), values)])
            found[name] = values
        return found

    def _is_master(self, key: str, shape: tuple[int, ...]) -> bool:
        return self._files.shapes().get(key) == shape and self._files.dtype(key) is torch.float32
