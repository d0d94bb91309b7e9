"""Read parts of tensors from a Hugging Face folder."""

import logging
import mmap
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.config.hf_files import Header, is_sharded, read_headers
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.distributed.peers import Peers, gather_lists, together
from megatron_mcpo.storage import checkpoint_files
from megatron_mcpo.weights.mapping import parameters, tensor_problems
from megatron_mcpo.weights.shards import cut_dim
from megatron_mcpo.weights.torch_dist import check_finite, read_into

RECORD = "conversion.json"
"""What a converted folder was made from, and the SHA-256 of every tensor."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types by their names in safetensors files."""

log = logging.getLogger(__name__)


class Source(Protocol):
    """A folder that holds a model, whatever its format: read as Hugging Face tensors.

    names: in the order of export
    """

    @property
    def names(self) -> tuple[str, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, start: int = 0, stop: int | None = None, *, dim: int | None = None) -> Tensor:
        """Return a tensor, newly allocated, or its part start..stop-1 along `dim` (None: where shards are cut).

        Raises ConfigError where it holds NaN or an infinity.
        """
        ...


class HfFolder:
    """The safetensors of a folder: one file, or several with an index. Values are read on demand and not kept.

    left_out: tensors that are no part of the model's own: rotary frequencies, which are computed, and an output layer
        that repeats a tied embedding

    Raises ConfigError for files that can't be read or don't hold this model.
    """

    def __init__(self, folder: Path, model: ModelConfig):
        problems = tensor_problems(model, folder)
        if problems:
            raise ConfigError(problems)
        self.folder = folder
        self._headers = read_headers(folder)
        self._dims = {
            name: cut_dim(parameter.mapping)
            for parameter in parameters(model, Layout())
            if not parameter.mapping.tied
            for name in parameter.hugging_face
        }
        self.names = tuple(self._dims)
        self.left_out = tuple(sorted(self._headers.keys() - self._dims.keys()))

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self._headers[name].dtype]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._headers[name].shape

    def read(self, name: str, start: int = 0, stop: int | None = None, *, dim: int | None = None) -> Tensor:
        header = self._headers[name]
        dim = self._dims[name] if dim is None else dim
        stop = header.shape[dim] if stop is None else stop
        read = _read_rows if dim == 0 or stop - start == header.shape[dim] else _read_columns
        return check_finite(read(header, name, start, stop, dim), f"{header.file}: {name}")


def _read_rows(header: Header, name: str, start: int, stop: int, dim: int) -> Tensor:
    """Return rows start..stop-1 of a tensor, or all of it where they are another dimension's."""
    shape, first, dtype = list(header.shape), header.start, DTYPES[header.dtype]
    if dim == 0:
        first += start * torch.Size(shape[1:]).numel() * dtype.itemsize
        shape[0] = stop - start
    values = torch.empty(shape, dtype=dtype)
    with header.file.open("rb", buffering=0) as file:
        file.seek(first)
        read_into(file, values, f"{header.file}: {name}")
    return values


def _read_columns(header: Header, name: str, start: int, stop: int, dim: int) -> Tensor:
    """Return start..stop-1 of another dimension than the first."""
    shape, first, dtype = header.shape, header.start, DTYPES[header.dtype]
    size = torch.Size(shape).numel() * dtype.itemsize
    page = first - first % mmap.ALLOCATIONGRANULARITY
    # Mapped for this one read: pages of a file that stays mapped would count as this process's memory.
    with (
        header.file.open("rb", buffering=0) as file,
        mmap.mmap(file.fileno(), size + first - page, offset=page, access=mmap.ACCESS_COPY) as mapped,
    ):
        whole = torch.frombuffer(mapped, dtype=dtype, offset=first - page, count=size // dtype.itemsize)
        values = whole.view(shape).narrow(dim, start, stop - start).clone()
        del whole
    return values


def check_files(folder: Path, peers: Peers) -> None:
    """Check that the files of a sharded checkpoint are those that were written; every process reads a share.

    Folders of safetensors, and checkpoints of foreign origin without a manifest, have nothing to check; of the latter
    the log warns. Raises ConfigError that names every damaged file.
    """
    with together(peers):
        ours = any((folder / name).exists() for name in (checkpoint_files.MANIFEST, checkpoint_files.STATE, RECORD))
        found: list[str] = []
        if is_sharded(folder) and ours:
            found = checkpoint_files.problems(folder, part=peers.rank, num_parts=peers.world_size)
        elif is_sharded(folder) and peers.rank == 0:
            log.warning("%s: has no %s, so its files are not checked for damage", folder, checkpoint_files.MANIFEST)
    problems = sorted(set(gather_lists(found, peers)))
    if problems:
        raise ConfigError([f"{folder}: {problem}; copy or convert it again" for problem in problems])
