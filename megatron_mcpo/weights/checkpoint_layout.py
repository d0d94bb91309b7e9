"""Locate the model's parameters in Megatron's sharded checkpoints, whatever layout wrote them.

A checkpoint holds global tensors: layers are stacked along the first dimension, experts along the second, and the rest
is the parameter as one tensor rank would hold it. Only the padding of the vocabulary depends on the layout.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.weights.mapping import HEAD_PREFIX, Parameter, ParamMapping, Place, Split, parameters
from megatron_mcpo.weights.shards import TensorSlice, cut_dim, placed, shard_shape, shard_slices
from megatron_mcpo.weights.torch_dist import ShardedFolder, check_finite

DTYPES = (torch.bfloat16, torch.float32)
_MASTER = "optimizer.state.param."
"""What Megatron-Core's distributed optimizer (0.19.2, fully_reshardable) puts before the name of a parameter."""
_NUMBERS = re.compile(r"\.(\d+)(?=\.)")
_LAYERS = "decoder.layers."


@dataclass(frozen=True, kw_only=True)
class CheckpointEntry:
    """A parameter in a checkpoint: global tensor `key`, under `index` (its layer and expert)."""

    mapping: ParamMapping
    key: str
    index: tuple[int, ...]
    hugging_face: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A part of a parameter as one rank stores it.

    slices: of the mapping's Hugging Face tensors, in order; zeros where these don't fill it
    start: where it begins along the cut dimension; size: how long it is there, padding included
    """

    slices: tuple[TensorSlice, ...]
    start: int
    size: int


def checkpoint_entry(parameter: Parameter) -> CheckpointEntry:
    """Return where a parameter is stored; all modules save under the names that Transformer Engine's have."""
    index = tuple(int(number) for number in _NUMBERS.findall(parameter.hugging_face[0]))
    name = parameter.mapping.megatron[-1]
    if parameter.mapping.expert:
        name = name.replace("mlp.experts.", "mlp.experts.experts.").replace("{expert}", "")
    key = _LAYERS + name if parameter.mapping.place is Place.LAYER else name
    return CheckpointEntry(mapping=parameter.mapping, key=key, index=index, hugging_face=parameter.hugging_face)


def checkpoint_entries(model: ModelConfig) -> list[CheckpointEntry]:
    """Return the entries of all parameters but tied ones, in the order of export."""
    return [checkpoint_entry(each) for each in parameters(model, Layout()) if not each.mapping.tied]


def global_shape(model: ModelConfig, found: CheckpointEntry, tensor: int) -> tuple[int, ...]:
    """Return the shape of the whole tensor that a parameter is in. tensor: the vocabulary is padded to its multiple"""
    shape = list(shard_shape(found.mapping, 1))
    if found.mapping.split is Split.ROWS:
        shape[0] = tensor * shard_shape(found.mapping, tensor)[0]
    counts = (model.num_layers, model.experts.count if model.experts else 0)
    return (*counts[: len(found.index)], *shape)


def chunks(mapping: ParamMapping, *, rank: int, num_ranks: int) -> Iterator[Chunk]:
    """Yield what shard `rank` of `num_ranks` is saved as: one chunk, or one of each tensor where each is cut alone."""
    shard = shard_slices(mapping, rank=rank, num_ranks=num_ranks)
    if mapping.split is Split.RANKS:
        for each in shard:
            before = sum(shape[0] for shape in mapping.shapes[: each.tensor])
            yield Chunk(slices=(each,), start=before + each.start, size=len(each))
        return
    size = shard_shape(mapping, num_ranks)[cut_dim(mapping)]
    yield Chunk(slices=tuple(shard), start=0 if mapping.split is Split.REPLICATED else rank * size, size=size)


def problems(model: ModelConfig, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]) -> list[str]:
    """Return a line for each tensor that is missing, unknown, or of another shape or type than `model` has; else [].

    Args:
        model: what the checkpoint must hold.
        shapes: of all tensors in the checkpoint, by their keys there. The vocabulary may be padded to any length.
        dtypes: of the same tensors.
    """
    entries = {each.key: each for each in checkpoint_entries(model)}
    known = entries.keys() | set(head_keys(shapes))
    other = sorted(key for key in shapes if not key.startswith("optimizer.") and key not in known)
    found = (_entry_problem(model, entry, shapes.get(key), dtypes.get(key)) for key, entry in entries.items())
    return [
        *(problem for problem in found if problem),
        *(f"{key}: unknown, the {model.family} model has no such tensor" for key in other),
    ]


def _entry_problem(
    model: ModelConfig, entry: CheckpointEntry, shape: tuple[int, ...] | None, dtype: torch.dtype | None
) -> str | None:
    if shape is None:
        return f"{entry.key}: missing"
    expected = global_shape(model, entry, 1)
    padded = entry.mapping.split is Split.ROWS and shape[:1] >= expected[:1]
    if (shape[1:] if padded else shape) != (expected[1:] if padded else expected):
        return f"{entry.key}: has shape {shape}, must have {expected}"
    return None if dtype in DTYPES else f"{entry.key}: has type {dtype}, must be bf16 or fp32"


def head_keys(keys: Iterable[str]) -> list[str]:
    """Return those of a checkpoint's keys that belong to the contrastive head, sorted."""
    return sorted(key for key in keys if key.startswith(HEAD_PREFIX))


@dataclass(frozen=True, kw_only=True)
class MegatronFolder:
    """The model in a sharded checkpoint, read as Hugging Face tensors. Optimizer and other state are left alone.

    names: of the Hugging Face tensors, in the order of export
    masters: the values are the fp32 weights that the optimizer keeps of a model in bf16
    where: the entry of each Hugging Face tensor, and the tensor's number there
    """

    folder: Path
    names: tuple[str, ...]
    masters: bool
    files: ShardedFolder
    where: Mapping[str, tuple[CheckpointEntry, int]]

    @classmethod
    def open(cls, folder: Path, model: ModelConfig, *, masters: bool = False) -> "MegatronFolder":
        """Open a checkpoint of `model`. masters: read the optimizer's fp32 weights where the checkpoint has them all.

        Raises ConfigError that names all tensors that are missing, unknown, or of another shape or type.
        """
        files, entries = ShardedFolder(folder), checkpoint_entries(model)
        shapes = files.shapes()
        dtypes = {key: files.dtype(key) for key in shapes}
        found = problems(model, shapes, dtypes)
        if found:
            rule = "it must hold the model that config.json describes"
            raise ConfigError([f"{folder}: {rule}:", *(f"  {problem}" for problem in found)])
        where = {name: (entry, number) for entry in entries for number, name in enumerate(entry.hugging_face)}
        return cls(
            folder=folder,
            names=tuple(where),
            masters=masters
            and all(
                shapes.get(_MASTER + key) == shapes[key] and dtypes[_MASTER + key] is torch.float32
                for key in (*(entry.key for entry in entries), *head_keys(shapes))
            ),
            files=files,
            where=where,
        )

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of a tensor."""
        return self.files.dtype(self._values_of(self.where[name][0].key))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the full shape of a tensor."""
        found, number = self.where[name]
        return found.mapping.shapes[number]

    def read(self, name: str, start: int = 0, stop: int | None = None, *, dim: int | None = None) -> Tensor:
        """Return a tensor, newly allocated, or its part start..stop-1 along `dim` (None: where shards are cut).

        Raises ConfigError where it holds NaN or an infinity.
        """
        found, number = self.where[name]
        cut, shape = cut_dim(found.mapping), list(found.mapping.shapes[number])
        dim = cut if dim is None else dim
        stop = shape[dim] if stop is None else stop
        shape[dim] = stop - start
        values = torch.empty(shape, dtype=self.dtype(name))
        wanted = []
        for each, position in placed(shard_slices(found.mapping, rank=0, num_ranks=1)):
            low, high = (max(start, each.start), min(stop, each.stop)) if dim == cut else (each.start, each.stop)
            if each.tensor == number and low < high:
                offsets = [0] * len(shape)
                offsets[dim] = start
                offsets[cut] = position + low - each.start
                wanted.append((tuple(offsets), values.narrow(cut, low - (start if dim == cut else 0), high - low)))
        self.files.copy(self._values_of(found.key), found.index, wanted)
        return check_finite(values, f"{self.folder}: {name}")

    def head(self) -> dict[str, Tensor]:
        """Return the contrastive head's tensors, without their prefix."""
        found = {}
        for head_key in head_keys(self.files.shapes()):
            key = self._values_of(head_key)
            values = torch.empty(self.files.shapes()[key], dtype=self.files.dtype(key))
            self.files.copy(key, (), [((0,) * values.dim(), values)])
            found[head_key.removeprefix(HEAD_PREFIX)] = values
        return found

    def _values_of(self, key: str) -> str:
        """Return the key of the tensor whose values are read for a parameter."""
        return _MASTER + key if self.masters else key
