"""Read raw rows of a JSONL file, a Parquet file or a Hugging Face dataset, one at a time, without a look at them."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.config.domain_schema import SourceConfig
from megatron_mcpo.data import rows, verl
from megatron_mcpo.data.rows import RowError

MAX_ROW_BYTES = 16 << 20
"""A longer row is skipped, not held in memory."""

_TOO_LONG = f"is longer than {MAX_ROW_BYTES} bytes"

_BATCH = 64
"""Rows of Parquet that are decoded together: compressed, a row may be a thousandth of its size."""

RawRow = Mapping[str, Any] | RowError

_COLUMNS = {*rows.COLUMNS, *verl.COLUMNS}


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A file, or a split of a Hugging Face dataset."""

    path: str
    split: str | None = None
    """None for a file."""
    subset: str | None = None

    @property
    def name(self) -> str:
        return Path(self.path).name if self.split is None else f"{self.path}/{self.split}"

    def place(self, position: int) -> str:
        """Return how a person finds a row."""
        return f"line {position + 1}" if self.path.endswith(".jsonl") and self.split is None else f"row {position}"

    def rows(self) -> Iterator[tuple[int, RawRow]]:
        """Yield (position, row) of every row. Raises ConfigError where it can't be opened or read to its end."""
        if self.split is not None:
            return _dataset_rows(self.path, self.subset, self.split)
        return _jsonl_rows(Path(self.path)) if self.path.endswith(".jsonl") else _parquet_rows(Path(self.path))


def origins(source: SourceConfig) -> tuple[Origin, Origin | None]:
    """Return where training rows and held-out rows come from (None: from the same place)."""
    if source.dataset is None:
        assert source.file is not None
        held_out = Origin(path=source.held_out_file) if source.held_out_file else None
        return Origin(path=source.file), held_out
    if source.held_out_file:
        held_out = Origin(path=source.held_out_file)
    elif source.held_out_split:
        held_out = Origin(path=source.dataset, split=source.held_out_split, subset=source.subset)
    else:
        held_out = None
    return Origin(path=source.dataset, split=source.split, subset=source.subset), held_out


def _refuse(name: Path | str, error: Exception) -> NoReturn:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    raise ConfigError(
        [f"domain.sources: {str(name)!r} can't be read ({reason}); correct the path or the file"]
    ) from None


def _jsonl_rows(path: Path) -> Iterator[tuple[int, RawRow]]:
    """Yield the rows of a JSONL file; blank lines and a byte-order mark at the start are skipped."""
    try:
        with path.open("rb") as file:
            yield from ((i, _parse(line)) for i, line in enumerate(_lines(file)) if line is None or line.strip())
    except OSError as error:
        _refuse(path, error)


def _lines(file: BinaryIO) -> Iterator[bytes | None]:
    """Yield the lines of a file, None for one that is too long."""
    if file.read(3) != b"\xef\xbb\xbf":
        file.seek(0)
    while line := file.readline(MAX_ROW_BYTES):
        is_whole = line.endswith(b"\n") or len(line) < MAX_ROW_BYTES
        yield line if is_whole else None
        while not is_whole:
            rest = file.readline(MAX_ROW_BYTES)
            is_whole = not rest or rest.endswith(b"\n")


def _parse(line: bytes | None) -> RawRow:
    if line is None:
        return RowError("malformed", _TOO_LONG)
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return RowError("malformed", f"is not UTF-8: {error.reason} at byte {error.start}")
    except json.JSONDecodeError as error:
        return RowError("malformed", f"is not JSON: {error.msg} at character {error.pos + 1}")
    except (ValueError, RecursionError) as error:
        return RowError("malformed", f"is not JSON: {error}")
    return row if isinstance(row, dict) else RowError("malformed", f"is a {type(row).__name__}, must be an object")


def _parquet_rows(path: Path) -> Iterator[tuple[int, RawRow]]:
    # Imported here: runs with generators alone save 0.3 s.
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in _COLUMNS]
            batches = file.iter_batches(batch_size=_BATCH, columns=columns)
            yield from enumerate(row for batch in batches for row in _plain_rows(batch))
    except (OSError, pyarrow.ArrowException, ValueError, RecursionError) as error:
        _refuse(path, error)
    except MemoryError:
        _refuse(path, MemoryError("its rows need more memory than there is"))


def _plain_rows(batch: Any) -> Iterator[RawRow]:
    """Yield the rows of a batch of Arrow's, one at a time where they are large."""
    if batch.nbytes <= MAX_ROW_BYTES:
        yield from batch.to_pylist()
        return
    for number in range(batch.num_rows):
        row = batch.slice(number, 1)
        yield row.to_pylist()[0] if row.nbytes <= MAX_ROW_BYTES else RowError("malformed", _TOO_LONG)


def _dataset_rows(name: str, subset: str | None, split: str) -> Iterator[tuple[int, RawRow]]:
    """Yield rows of the hub (or its cache), or of a local folder: files, or what Dataset.save_to_disk wrote."""
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            [f"domain.sources.dataset = {name!r}: needs the package datasets; pip install 'megatron-mcpo[datasets]'"]
        ) from None
    try:
        if (Path(name) / "dataset_dict.json").is_file():
            data = datasets.load_from_disk(name)[split]
        elif (Path(name) / "state.json").is_file():
            data = datasets.load_from_disk(name)
        else:
            data = datasets.load_dataset(name, subset, split=split)
        data = data.select_columns([column for column in data.column_names if column in _COLUMNS])
    except Exception as error:  # its own classes, the hub's, the file system's, Arrow's
        _refuse(name, error)
    yield from enumerate(data)
