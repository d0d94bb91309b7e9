"""Read any part of any tensor of a sharded torch checkpoint, and write such a checkpoint in parts.

Such a folder holds global tensors in chunks: .metadata says which chunk of which tensor stands where in which file.
Why no library does this: torch.distributed.checkpoint runs code in the table of contents, loads whole tensors, and
writes a folder in one call. Here nothing needs more memory than a chunk and what is asked for, and a folder can be
written file by file. Only tensors and the table of contents are read, and neither can run code.
"""

import hashlib
import io
import pickle
from collections.abc import Buffer, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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

from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.storage.checkpoint_files import Fingerprint
from megatron_mcpo.weights.safe_unpickler import METADATA, read_metadata

_BACKEND = "metadata.json"
_BACKEND_TEXT = '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'
"""What Megatron-Core (0.19.2) looks for before it opens a folder."""
_VERSION = "1.0.0"
"""Version of torch's table of contents (CURRENT_DCP_VERSION)."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A chunk of tensor `key` in a file, `length` bytes from `start`. offsets, shape: where in the tensor it belongs.

    An entry that is not a tensor has neither (a pickled object of Megatron's).
    """

    key: str
    file: str
    start: int
    length: int
    offsets: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None


class ShardedFolder:
    """The tensors of a folder. Raises ConfigError where the folder has none, or its files are missing or too short.

    Folders of unknown origin may be opened: the table of contents is read with an unpickler for plain data only, and
    tensors with torch's for tensors only.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            metadata = read_metadata(folder)
        except (OSError, ValueError) as error:
            raise ConfigError(
                [f"{folder}: must be a sharded checkpoint ({error}). Give one that Megatron-Core wrote."]
            ) from error
        described = metadata.state_dict_metadata
        self._described = {key: found for key, found in described.items() if isinstance(found, TensorStorageMetadata)}
        chunks = {
            key: {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in found.chunks}
            for key, found in self._described.items()
        }
        self._entries: dict[str, list[Entry]] = {key: [] for key in self._described}
        self._indexed: dict[str, dict[tuple[int, ...], list[Entry]]] = {}
        self._firsts: dict[Entry, int] = {}
        for index, info in metadata.storage_data.items():
            if index.fqn in self._described:
                self._entries[index.fqn].append(self._entry(index, info, chunks[index.fqn]))
        self._check_files()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tensors, the optimizer's included."""
        return {key: tuple(found.size) for key, found in self._described.items()}

    def dtype(self, key: str) -> torch.dtype:
        """Return the type of a tensor."""
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
            if entry not in self._firsts:
                self._firsts[entry] = self._first_byte(entry)
            for box, (start, target) in zip(boxes, wanted, strict=True):
                if box:
                    inner = [(low - offset, size) for (low, size), offset in zip(box, offsets, strict=True)]
                    self._read(entry, shape, inner, _part(target, start, box))
                    missing -= torch.Size(size for _, size in box).numel()
        if missing:
            raise ConfigError([f"{self.folder}: {key}{list(index)}: {missing} values are in no file; copy it again"])

    def _entry(self, index: MetadataIndex, info: Any, shapes: Mapping[tuple[int, ...], tuple[int, ...]]) -> Entry:
        """shapes: of all chunks of its tensor, by where they begin"""
        key, name = index.fqn, str(info.relative_path)
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
        """Return the entries that hold a part of key[index]: none holds parts of two layers, as Megatron saves them."""
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

    def _first_byte(self, entry: Entry) -> int:
        """Return where in the file the values of a chunk begin, row by row. Raises ConfigError if it is damaged."""
        path = self.folder / entry.file
        try:
            with path.open("rb") as file, torch.serialization.skip_data():  # everything but the values
                window = cast(IO[bytes], _Window(file, entry.start, entry.length))
                values = torch.load(window, map_location="cpu", weights_only=True)  # noqa: TID251 - tensors only
                window.seek(0)
                inside = torch._C.PyTorchFileReader(window).get_record_offset("data/0")  # type: ignore[attr-defined]
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            raise ConfigError([f"{path}: {entry.key}: can't be read ({reason}); copy it again"]) from error
        dtype = self.dtype(entry.key)
        if not isinstance(values, Tensor) or values.shape != entry.shape or values.dtype is not dtype:
            found = f"{values.dtype} {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            rule = f"is {found}, {METADATA} says {dtype} {list(entry.shape or ())}"
            raise ConfigError([f"{path}: {entry.key}: {rule}; copy it again"])
        inside += int(values.storage_offset()) * dtype.itemsize
        if not values.is_contiguous() or inside + values.nbytes > entry.length:
            raise ConfigError(
                [f"{path}: {entry.key}: its values don't lie row by row in it; save it with Megatron-Core"]
            )
        return entry.start + inside

    def _read(self, entry: Entry, shape: Sequence[int], box: Sequence[tuple[int, int]], target: Tensor) -> None:
        """Fill `target` with a box of a chunk, which has this shape without its layer and expert."""
        row, num_rows = box[0] if box else (0, 1)
        whole = [(0, size) for size in shape[1:]] == list(box[1:]) and target.is_contiguous()
        rows = target if whole else torch.empty((num_rows, *shape[1:]), dtype=target.dtype)
        with (self.folder / entry.file).open("rb", buffering=0) as file:
            file.seek(self._firsts[entry] + row * torch.Size(shape[1:]).numel() * target.dtype.itemsize)
            read_into(file, rows, f"{self.folder / entry.file}: {entry.key}")
        if not whole:
            target.copy_(_part(rows, [row, *[0] * len(shape[1:])], box))


def overlap(
    offsets: Sequence[int], shape: Sequence[int], other_offsets: Sequence[int], other_shape: Sequence[int]
) -> list[tuple[int, int]]:
    """Return (start, size) in every dimension of what two boxes share; [] where they share nothing."""
    box = []
    for a, size_a, b, size_b in zip(offsets, shape, other_offsets, other_shape, strict=True):
        start, stop = max(a, b), min(a + size_a, b + size_b)
        if start >= stop:
            return []
        box.append((start, stop - start))
    return box


def byte_view(values: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    return memoryview(values.view(-1).view(torch.uint8).numpy())


def read_into(file: io.RawIOBase, values: Tensor, what: str) -> None:
    """Fill a contiguous tensor from where an unbuffered file stands. Raises ConfigError where the file ends before."""
    view = byte_view(values)
    while view:
        got = file.readinto(view)
        if not got:
            raise ConfigError([f"{what}: {len(view)} bytes are missing at its end; copy it again"])
        view = view[got:]


def check_finite(values: Tensor, what: str) -> Tensor:
    """Return weights as they are. Raises ConfigError where they hold NaN or an infinity: such a model computes NaN."""
    if values.numel():
        extremes = torch.stack(torch.aminmax(values))  # one pass without a copy; NaN anywhere gives NaN
        if not torch.isfinite(extremes).all():
            found = "NaN" if values.isnan().any() else "an infinity"
            raise ConfigError([f"{what}: must be finite (it holds {found}). Copy the model again, or use another one."])
    return values


class HashedFile:
    """A new file that is only appended to. Its SHA-256 is known when it is closed, without reading it again."""

    def __init__(self, path: Path):
        self.name = path.name
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self._error: OSError | None = None
        self._thread = ThreadPoolExecutor(max_workers=1)

    def save(self, value: Any) -> tuple[int, int]:
        """Append a value as torch.save writes it; returns where it starts, and its length. Raises OSError."""
        start = self._file.tell()
        with_sums = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)  # no reader looks at them, and they take most time
        try:
            torch.save(value, cast(IO[bytes], self))
        except RuntimeError as error:
            raise self._error or error from error  # torch has one of its own for a full disk
        finally:
            torch.serialization.set_crc32_options(with_sums)
        return start, self._file.tell() - start

    def write(self, data: Buffer) -> int:
        """Append bytes and hash them meanwhile; called by torch.save."""
        hashing = self._thread.submit(self._digest.update, data)  # while the bytes are written
        try:
            return self._file.write(data)
        except OSError as error:
            self._error = error
            raise
        finally:
            hashing.result()

    def flush(self) -> None:
        """Flush the file; called by torch.save."""
        self._file.flush()

    def close(self) -> Fingerprint:
        """Close the file; returns the size and the SHA-256 that it must have."""
        size = self._file.tell()
        self._file.close()
        self._thread.shutdown()
        return Fingerprint(bytes=size, sha256=self._digest.hexdigest())


def write_tensor(file: HashedFile, key: str, offsets: tuple[int, ...], values: Tensor) -> Entry:
    """Append a chunk to an open file, as torch.distributed.checkpoint does."""
    assert values.is_contiguous() and values.untyped_storage().nbytes() == values.nbytes, "the storage is what is saved"
    start, length = file.save(values)
    return Entry(key=key, file=file.name, start=start, length=length, offsets=offsets, shape=tuple(values.shape))


def write_object(file: HashedFile, key: str, value: Any) -> Entry:
    """Append an object as Megatron-Core saves those that are not tensors."""
    start, length = file.save([value])
    return Entry(key=key, file=file.name, start=start, length=length)


def write_contents(
    folder: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, entries: Iterable[Entry]
) -> None:
    """Write the table of contents, without which neither Megatron-Core nor ShardedFolder can open the folder."""
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
    """Return the box of a tensor that starts at `offsets`."""
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
