"""Read the pickles in a sharded checkpoint so that they can't run code, whoever wrote them.

torch.distributed.checkpoint keeps its table of contents (.metadata) and everything but tensors as pickles, and reads
both with an unrestricted unpickler, which calls whatever a pickle names.
"""

import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint.metadata import Metadata

METADATA = ".metadata"

_CHECKPOINT = "torch.distributed.checkpoint"
_PLAIN_DATA = {
    (f"{_CHECKPOINT}.metadata", "BytesStorageMetadata"),
    (f"{_CHECKPOINT}.metadata", "ChunkStorageMetadata"),
    (f"{_CHECKPOINT}.metadata", "Metadata"),
    (f"{_CHECKPOINT}.metadata", "MetadataIndex"),
    (f"{_CHECKPOINT}.metadata", "StorageMeta"),
    (f"{_CHECKPOINT}.metadata", "TensorProperties"),
    (f"{_CHECKPOINT}.metadata", "TensorStorageMetadata"),
    (f"{_CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
    (f"{_CHECKPOINT}.planner", "SavePlan"),
    (f"{_CHECKPOINT}.planner", "TensorWriteData"),
    (f"{_CHECKPOINT}.planner", "WriteItem"),
    (f"{_CHECKPOINT}.planner", "WriteItemType"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
}
"""All that a table of contents is made of: dataclasses, enumerations, and a look-up among torch's layouts."""

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def read_metadata(folder: Path) -> Metadata:
    """Return the table of contents. Raises ValueError where it is damaged, or names anything that is not plain data.

    Reading the same bytes afterwards with the ordinary unpickler calls the same names, and no others, and sets
    attributes of the same new objects.
    """
    with (folder / METADATA).open("rb") as file:
        try:
            found = _PlainUnpickler(file).load()
        except _NotPlainError:
            raise
        except Exception as error:
            raise ValueError(f"{METADATA} is no table of contents ({type(error).__name__}: {error})") from error
    if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
        raise ValueError(f"{METADATA} is no table of contents")
    return found


@contextmanager
def no_code() -> Iterator[None]:
    """Restrict torch's unpickler to tensors and plain values inside this block, even where code asks for the other."""
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


class _NotPlainError(ValueError):
    pass


class _PlainUnpickler(pickle._Unpickler):
    """The unpickler in Python, as the one in C can't be told what may be changed.

    The opcode BUILD sets attributes of whatever lies on the stack: of a class, an enumeration's member or a function it
    would change that of this process, for good, even where the file is refused afterwards.
    """

    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _PLAIN_DATA:
            return super().find_class(module, name)
        raise _NotPlainError(
            f"{METADATA} names {module}.{name}, which no table of contents needs and which may run code"
        )

    def _build(self) -> None:
        stack: list[Any] = self.stack  # type: ignore[attr-defined]
        kind = type(stack[-2]) if len(stack) > 1 else type(None)
        if (kind.__module__, kind.__qualname__) not in _PLAIN_DATA or issubclass(kind, Enum):
            raise _NotPlainError(
                f"{METADATA} sets attributes of a {kind.__qualname__}, which no table of contents does and which would "
                "change this program"
            )
        self.load_build()  # type: ignore[attr-defined]

    dispatch[pickle.BUILD[0]] = _build
