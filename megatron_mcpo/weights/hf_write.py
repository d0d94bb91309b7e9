"""Write safetensors files one tensor at a time, and the other files of a Hugging Face folder."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_mcpo.storage.files import write_atomically
from megatron_mcpo.weights.buckets import fill_buckets
from megatron_mcpo.weights.hf_io import DTYPES
from megatron_mcpo.weights.torch_dist import byte_view

INDEX = "model.safetensors.index.json"
HEAD_FILE = "contrastive_head.safetensors"
ASSETS = (
    *("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.jinja", "LICENSE*", "README.md"),
)
"""Everything besides weights that a tokenizer, an engine or a reader may need."""
_OTHER_TEMPLATES = "additional_chat_templates"
_SPELLED = {dtype: name for name, dtype in DTYPES.items()}

log = logging.getLogger(__name__)


def spread(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Return the names in order, in groups of at most `limit` bytes; a larger tensor has a group of its own."""
    return list(fill_buckets(((name, (size,)) for name, size in sizes.items()), limit))


def file_names(count: int) -> list[str]:
    """Return the names that transformers gives to `count` files."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_index(folder: Path, files: Mapping[str, Sequence[str]], total_size: int) -> None:
    """Write the index of several files. files: the tensors in each"""
    weight_map = {name: file for file, names in files.items() for name in names}
    text = json.dumps({"metadata": {"total_size": total_size}, "weight_map": weight_map}, indent=2)
    (folder / INDEX).write_text(text + "\n", encoding="utf-8")


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    read: Callable[[str], Iterable[Tensor]],
) -> None:
    """Write a file of tensors. read: yields a tensor's rows, in order, in any number of parts"""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _SPELLED[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values begin at a multiple of eight
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            for values in read(name):
                assert values.dtype is dtype
                file.write(byte_view(values))
        assert file.tell() == 8 + len(text) + end


def read_assets(source: Path) -> dict[str, bytes]:
    """Return name -> content of configuration, tokenizer, chat template, generation settings and licence.

    Folders are left out: where transformers keeps more templates in one, the log says so.
    """
    if (source / _OTHER_TEMPLATES).is_dir():
        log.warning("%s: is not copied; copy it by hand where it is needed", source / _OTHER_TEMPLATES)
    paths = {path for pattern in ASSETS for path in source.glob(pattern) if path.is_file()}
    return {path.name: path.read_bytes() for path in sorted(paths)}


def copy_assets(source: Path, folder: Path) -> None:
    """Copy what `read_assets` reads, over what is there: nothing else would notice files of another content."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in read_assets(source).items():
        write_atomically(folder / name, content)
