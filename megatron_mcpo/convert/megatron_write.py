"""Write a Megatron checkpoint as the ranks of a layout would save it, in parts that are independent of each other."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.storage.checkpoint_files import sync
from megatron_mcpo.weights.checkpoint_layout import CheckpointEntry, Chunk, checkpoint_entries, chunks, global_shape
from megatron_mcpo.weights.hf_io import HfFolder
from megatron_mcpo.weights.mapping import HEAD_PREFIX, Parameter, parameters
from megatron_mcpo.weights.shards import cut_dim, cut_shape, placed
from megatron_mcpo.weights.torch_dist import Entry, HashedFile, write_contents, write_object, write_tensor

PART_BYTES = 1 << 30
_OBJECTS = "__objects.distcp"


type Part = list[tuple[Parameter, CheckpointEntry]]
"""Parameters, each with its place in the layout and in the checkpoint."""


def parts(model: ModelConfig, layout: Layout, dtype: torch.dtype) -> Iterator[Part]:
    """Divide all parameters, in order, into parts of about PART_BYTES."""
    there = [parameter for parameter in parameters(model, layout) if not parameter.mapping.tied]
    part: Part = []
    size = 0
    for pair in zip(there, checkpoint_entries(model), strict=True):
        part.append(pair)
        size += sum(torch.Size(shape).numel() for shape in pair[0].mapping.shapes) * dtype.itemsize
        if size >= PART_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def write_part(
    folder: Path, number: str, part: Part, source: HfFolder, layout: Layout, dtype: torch.dtype
) -> tuple[list[str], dict[str, Any]]:
    """Write a file for every rank that holds a share of the part; return their names and a JSON-able record of them."""
    entries = []
    files: dict[int, HashedFile] = {}
    for parameter, where in part:
        num_shards = parameter.mapping.num_shards(layout)
        full = [source.read(name) for name in where.hugging_face]
        for shard in range(parameter.mapping.num_different(layout)):
            rank = parameter.stage * max(layout.tensor, layout.expert) + (parameter.expert_rank or shard)
            if rank not in files:
                files[rank] = HashedFile(folder / f"__{rank}_{number}.distcp")
            for chunk in chunks(parameter.mapping, rank=shard, num_ranks=num_shards):
                values = _values(where, chunk, full, dtype)
                offsets = [0] * (values.dim() - len(where.index))
                offsets[cut_dim(where.mapping)] = chunk.start
                entries.append(write_tensor(files[rank], where.key, (*where.index, *offsets), values))
    measured = {file.name: asdict(file.close()) for file in files.values()}
    return list(measured), {"entries": [asdict(entry) for entry in entries], "files": measured}


def _values(where: CheckpointEntry, chunk: Chunk, full: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Cut a chunk [1, ..., size, ...] from the full tensors, with leading dimensions for its layer and expert."""
    dim = cut_dim(where.mapping)
    shape = cut_shape(where.mapping, chunk.size)
    values = torch.empty((1,) * len(where.index) + shape, dtype=dtype)
    flat, end = values.view(shape), 0
    for each, position in placed(chunk.slices):
        end = position + len(each)
        flat.narrow(dim, position, len(each)).copy_(full[each.tensor].narrow(dim, each.start, len(each)))
    flat.narrow(dim, end, chunk.size - end).zero_()
    return values


def write_rest(
    folder: Path,
    model: ModelConfig,
    layout: Layout,
    dtype: torch.dtype,
    head: dict[str, Tensor],
    records: Sequence[dict[str, Any]],
) -> None:
    """Write the head, the empty state that Megatron's linear layers save and expect, and the table of contents.

    Args:
        folder: The checkpoint's folder, with all parts in it.
        model: The model.
        layout: The layout whose ranks would save it.
        dtype: Of all tensors.
        head: The contrastive head's parameters by name; may be empty.
        records: Those that `write_part` returned, of all parts in order.
    """
    wanted = checkpoint_entries(model)
    entries = [Entry(**entry) for record in records for entry in record["entries"]]
    file = HashedFile(folder / _OBJECTS)
    for name, values in head.items():
        entries.append(write_tensor(file, HEAD_PREFIX + name, (0,) * values.dim(), values.clone()))
    counts = (model.num_layers, model.experts.count if model.experts else 0)
    for each in wanted:
        module, _, kind = each.key.rpartition(".")
        if kind == "weight" and module.rpartition(".")[2].startswith("linear_"):
            of = counts[: len(each.index)]
            shard = f"shard_{'.'.join(map(str, each.index))}_{'.'.join(map(str, of))}"
            entries.append(write_object(file, f"{module}._extra_state/{shard}", None))
    entries.append(write_object(file, "common_state/shard_0_1", {}))
    file.close()
    shapes = {each.key: global_shape(model, each, layout.tensor) for each in wanted}
    shapes |= {HEAD_PREFIX + name: tuple(values.shape) for name, values in head.items()}
    write_contents(folder, shapes, dtype, entries)
    sync(folder / _OBJECTS, forget=True)
