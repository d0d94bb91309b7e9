"""The files of a sharded torch checkpoint, one tensor at a time: reading any part of it, and writing one in parts.

Such a folder holds global tensors in chunks: .metadata says which chunk of which tensor stands where in which file.
Unlike torch.distributed.checkpoint, nothing here needs more memory than a chunk and what is asked for, and a folder
can be written file by file. Nothing but tensors and the table of contents is read, and neither can run code.
"""

import io
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_mcpo.config import ConfigError
from megatron_mcpo.mcore.pickles import METADATA, read_metadata

_BACKEND = "metadata.json"
_BACKEND_TEXT = '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'
"""What Megatron-Core (0.19.2) looks for before it opens a folder."""
_VERSION = "1.0.0"
"""Of torch's table of contents (CURRENT_DCP_VERSION)."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A chunk of tensor `key` in a file, `length` bytes from `start`. offsets, shape: where in the tensor it belongs.

    An entry that is no tensor has neither (a pickled object of Megatron's).
    """

    key: str
    file: str
    start: int
    length: int
    offsets: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None


class ShardedFolder:
    """The tensors of a folder. Raises ConfigError for a folder that has none, or whose files are missing or too short.

    Folders of unknown origin may be opened: the table of contents is read with an unpickler for plain data only, and
    tensors with torch's for tensors only.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            metadata = read_metadata(folder)
        except (OSError, ValueError) as error:
            raise ConfigError(
                [f"{folder}: no sharded checkpoint: {error}; give one that Megatron-Core wrote"]
            ) from error
        described = metadata.state_dict_metadata
        self._described = {key: found for key, found in described.items() if isinstance(found, TensorStorageMetadata)}
        self._entries: dict[str, list[Entry]] = {key: [] for key in self._described}
        self._indexed: dict[str, dict[tuple[int, ...], list[Entry]]] = {}
        for index, info in metadata.storage_data.items():
            if index.fqn in self._described:
                self._entries[index.fqn].append(self._entry(index, info))
        self._check_files()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors, of the optimizer too."""
        return {key: tuple(found.size) for key, found in self._described.items()}

    def dtype(self, key: str) -> torch.dtype:
        """Type of a tensor."""
        found: torch.dtype = self._described[key].properties.dtype
        return found

    def copy(self, key: str, index: tuple[int, ...], wanted: Sequence[tuple[tuple[int, ...], Tensor]]) -> None:
        """Fill tensors with parts of tensor `key` under `index`, its first dimensions.

        wanted: where in the tensor each part starts in the other dimensions, and the tensor that it goes into
        Raises ConfigError where chunks are missing or are not what the table of contents says.
        """
        missing = sum(target.numel() for _, target in wanted)
        for entry in self._under(key, index):
            assert entry.offsets is not None and entry.shape is not None
            offsets, shape = entry.offsets[len(index) :], entry.shape[len(index) :]
            boxes = [overlap(offsets, shape, start, target.shape) for start, target in wanted]
            if not any(boxes):
                continue
            values = self._load(entry).reshape(shape)
            for box, (start, target) in zip(boxes, wanted, strict=True):
                if box:
                    _part(target, start, box).copy_(_part(values, offsets, box))
                    missing -= torch.Size(size for _, size in box).numel()
        if missing:
            raise ConfigError([f"{self.folder}: {key}{list(index)}: {missing} values are in no file; copy it again"])

    def _entry(self, index: MetadataIndex, info: Any) -> Entry:
        key, name = index.fqn, str(info.relative_path)
        shapes = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in self._described[key].chunks}
        offsets = tuple(index.offset or (0,) * len(self._described[key].size))
        if name != Path(name).name or info.transform_descriptors or offsets not in shapes:
            rule = "a part of it lies outside the folder, is compressed, or is in no list of parts"
            raise ConfigError([f"{self.folder}: {key}: {rule}; give a folder that Megatron-Core wrote"])
        return Entry(key=key, file=name, start=info.offset, length=info.length, offsets=offsets, shape=shapes[offsets])

    def _check_files(self) -> None:
        needed: dict[str, int] = {}
        for entry in (entry for entries in self._entries.values() for entry in entries):
            needed[entry.file] = max(needed.get(entry.file, 0), entry.start + entry.length)
        problems = []
        for name, size in sorted(needed.items()):
            path = self.folder / name
            found = path.stat().st_size if path.is_file() and not path.is_symlink() else None
            if found is None or found < size:
                state = "missing" if found is None else f"has {found} bytes, must have {size}"
                problems.append(f"{path}: {state}; copy it again")
        if problems:
            raise ConfigError(problems)

    def _under(self, key: str, index: tuple[int, ...]) -> list[Entry]:
        """Entries that hold a part of key[index]; each holds a part of one only, as Megatron's stacked layers do."""
        if key not in self._indexed:
            depth = len(index)
            table: dict[tuple[int, ...], list[Entry]] = {}
            for entry in self._entries[key]:
                assert entry.offsets is not None and entry.shape is not None
                if entry.shape[:depth] != (1,) * depth:
                    raise ConfigError(
                        [f"{self.folder}: {key}: a chunk holds several layers; save it with Megatron-Core"]
                    )
                table.setdefault(entry.offsets[:depth], []).append(entry)
            self._indexed[key] = table
        return self._indexed[key].get(index, [])

    def _load(self, entry: Entry) -> Tensor:
        try:
            with (self.folder / entry.file).open("rb") as file:
                window = cast(IO[bytes], _Window(file, entry.start, entry.length))
                values = torch.load(window, map_location="cpu", weights_only=True)  # noqa: TID251 - tensors only
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            raise ConfigError(
                [f"{self.folder / entry.file}: {entry.key}: can't be read ({reason}); copy it again"]
            ) from error
        dtype = self.dtype(entry.key)
        if not isinstance(values, Tensor) or values.shape != entry.shape or values.dtype is not dtype:
            found = f"{values.dtype} {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            rule = f"is {found}, {METADATA} says {dtype} {list(entry.shape or ())}"
            raise ConfigError([f"{self.folder / entry.file}: {entry.key}: {rule}; copy it again"])
        return values


def overlap(
    offsets: Sequence[int], shape: Sequence[int], other_offsets: Sequence[int], other_shape: Sequence[int]
) -> list[tuple[int, int]]:
    """(start, size) in every dimension of what two boxes share; [] where they share nothing."""
    box = []
    for a, size_a, b, size_b in zip(offsets, shape, other_offsets, other_shape, strict=True):
        start, stop = max(a, b), min(a + size_a, b + size_b)
        if start >= stop:
            return []
        box.append((start, stop - start))
    return box


def write_tensor(file: BinaryIO, key: str, offsets: tuple[int, ...], values: Tensor) -> Entry:
    """Append a chunk to an open file, as torch.distributed.checkpoint does."""
    assert values.is_contiguous() and values.untyped_storage().nbytes() == values.nbytes, "the storage is what is saved"
    start = file.tell()
    with_sums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # nothing that reads the file looks at them, and they take most time
    try:
        torch.save(values, file)
    finally:
        torch.serialization.set_crc32_options(with_sums)
    return Entry(
        key=key,
        file=Path(file.name).name,
        start=start,
        length=file.tell() - start,
        offsets=offsets,
        shape=tuple(values.shape),
    )


def write_object(file: BinaryIO, key: str, value: Any) -> Entry:
    """Append an object, as Megatron-Core saves those that are no tensors."""
    start = file.tell()
    torch.save([value], file)
    return Entry(key=key, file=Path(file.name).name, start=start, length=file.tell() - start)


def write_contents(
    folder: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, entries: Iterable[Entry]
) -> None:
    """Write the table of contents, which makes a folder of it that Megatron-Core and ShardedFolder can open."""
    described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
        key: TensorStorageMetadata(properties=TensorProperties(dtype=dtype), size=torch.Size(shape), chunks=[])
        for key, shape in shapes.items()
    }
    storage = {}
    for entry in entries:
        info = _StorageInfo(relative_path=entry.file, offset=entry.start, length=entry.length)
        found = described.setdefault(entry.key, BytesStorageMetadata())
        if isinstance(found, TensorStorageMetadata):
            assert entry.offsets is not None and entry.shape is not None
            found.chunks.append(ChunkStorageMetadata(offsets=torch.Size(entry.offsets), sizes=torch.Size(entry.shape)))
            storage[MetadataIndex(entry.key, entry.offsets, len(found.chunks) - 1)] = info
        else:
            storage[MetadataIndex(entry.key)] = info
    meta = StorageMeta()
    contents = Metadata(state_dict_metadata=described, storage_data=storage, storage_meta=meta, version=_VERSION)
    (folder / METADATA).write_bytes(pickle.dumps(contents))
    (folder / _BACKEND).write_text(_BACKEND_TEXT, encoding="utf-8")


def _part(tensor: Tensor, offsets: Sequence[int], box: Sequence[tuple[int, int]]) -> Tensor:
    """The box of a tensor that starts at `offsets`."""
    for dim, ((start, size), offset) in enumerate(zip(box, offsets, strict=True)):
        tensor = tensor.narrow(dim, start - offset, size)
    return tensor


class _Window(io.RawIOBase):
    """Some bytes of a file as a file of their own: torch.load reads it without a second copy in memory."""

    def __init__(self, file: BinaryIO, start: int, length: int):
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        size = max(0, min(len(view), self._length - self._position))
        self._file.seek(self._start + self._position)
        got = self._file.readinto(view[:size])  # type: ignore[attr-defined]
        self._position += got
        return int(got)
