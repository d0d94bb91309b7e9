"""Write one checkpoint: every rank its shards, at once or in a thread, then rank 0 everything that names them.

Megatron-Core plans who writes what; its writer and its files are used as they are. Two parts of it are not used:
- Its ways of writing while training continues: it has dropped its own, which forks a process that has CUDA and NCCL
  open, for a package that hands device memory to a spawned one. Here a thread writes what was copied to host memory. It
  spends nearly all of its time in the disk and in SHA-256, where it does not hold the interpreter's lock.
- The last part of its save: rank 0 may fail there, on a full disk, while the others wait for it.
"""

import inspect
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.distributed.parallel import Groups
from megatron_mcpo.distributed.peers import agree, gather_objects, together
from megatron_mcpo.mcore import megatron_fixes
from megatron_mcpo.storage import checkpoint_files
from megatron_mcpo.storage.checkpoint_files import Fingerprint

_LONGEST_SECONDS = 1200.0
"""The longest wait for a rank's disk; shorter than the other ranks' collective waits for this rank."""
_STOP_SECONDS = 30.0
_BYTES_AN_ITEM = 2048
"""An upper bound of what torch.save adds to a tensor, and of its entry in the table of contents."""
_BYTES_BESIDES = 1 << 20

megatron_fixes.need_no_manager()

# Without the decorator, which turns off garbage collection in all threads.
_write_bucket = inspect.unwrap(FileSystemWriterAsync.write_preloaded_data)


class Saving:
    """A checkpoint that is being written and has no name yet. Constructor and `publish` are collective over all ranks.

    final: its folder, once it is complete
    sharded: what Megatron-Core saves; read before the constructor returns, and not afterwards
    beside: name -> content of rank 0's other files
    num_bytes: needed on the disk, by all ranks together
    """

    def __init__(self, final: Path, sharded: dict[str, Any], beside: Mapping[str, bytes], groups: Groups):
        """Plan the checkpoint and copy this rank's state.

        Raises ConfigError if the disk has too little room, RuntimeError if Megatron-Core can't plan it.
        """
        self.final = final
        self._staging = checkpoint_files.staging_of(final)
        self._beside = beside
        self._groups = groups
        self._thread: Thread | None = None
        self._stopping = Event()
        self._error: BaseException | None = None
        self._results: list[Any] = []
        self._measured: dict[str, Fingerprint] = {}
        with together(groups):
            if groups.rank == 0:
                checkpoint_files.remove_staging_folders(final.parent)
                self._staging.mkdir(parents=True)
        live = _storages(sharded)
        strategy = _Strategy()
        try:
            dist_checkpointing.save(
                sharded, str(self._staging), strategy, async_sharded_save=True, async_strategy="mcore"
            )
        except CheckpointException as error:  # does not derive from Exception
            raise RuntimeError(f"{final}: can't be planned ({reason(error)})") from error
        self._writer, self._contents = strategy.writer, strategy.contents
        self._buckets = host_copies(self._writer.write_buckets, live)
        self._writer.write_buckets = []
        own = _size(self._buckets) + (sum(map(len, beside.values())) + _BYTES_BESIDES if groups.rank == 0 else 0)
        self.num_bytes = sum(gather_objects(own, groups))
        if self._free() < self.num_bytes:
            self._fail([])

    def write(self, *, in_background: bool) -> None:
        """Write this rank's shards. in_background: in a thread, and return at once"""
        if in_background:
            self._thread = Thread(target=self._write, name=f"save {self.final.name}", daemon=True)
            self._thread.start()
        else:
            self._write()

    @property
    def is_written(self) -> bool:
        """Return whether this rank's shards are on disk, or have failed."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Wait until this rank's shards are on disk or have failed, or the longest wait is over."""
        if self._thread is not None:
            self._thread.join(_LONGEST_SECONDS)

    def publish(self) -> None:
        """Give the checkpoint its name, after all ranks have waited for their shards.

        On failure it deletes what was written and raises on every rank, with the causes: ConfigError if the disk has
        too little room, else RuntimeError.
        """
        if not self.is_written:
            self._error = TimeoutError(f"not written after {_LONGEST_SECONDS:.0f} s")
        self._raise_together()
        rank = self._groups.rank
        parts: list[Any] | None = [None] * self._groups.world_size if rank == 0 else None
        dist.gather_object((self._results, self._measured), parts, dst=0, group=self._groups.host)
        try:
            if parts is not None:
                self._finish(parts)
        except Exception as error:
            self._error = error
        self._raise_together()

    def abandon(self) -> None:
        """Stop this rank's thread before the process ends, which would crash it."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(_STOP_SECONDS)

    def _write(self) -> None:
        try:
            for number, (path, name, (objects, tensors)) in enumerate(self._buckets):
                bucket = (path, name, (objects, self._one_by_one(tensors)))
                transforms = [self._writer.transforms]
                _, results = _write_bucket(transforms, number, bucket, None, None, use_fsync=True)
                if isinstance(results, Exception):
                    raise results
                self._results += results
                self._measured |= checkpoint_files.measure(self._staging, [name])
        except Exception as error:
            self._error = error

    def _one_by_one(self, tensors: list[Any]) -> Iterator[Any]:
        """Yield the tensors in order; each one's memory is freed once it is written."""
        tensors.reverse()
        while tensors:
            if self._stopping.is_set():
                raise InterruptedError("the run ended")
            yield tensors.pop()

    def _finish(self, parts: list[Any]) -> None:
        """Write everything that rank 0 adds to the shards."""
        self._writer.finish(self._contents, [results for results, _ in parts])
        save_config(CheckpointingConfig("torch_dist", 1), str(self._staging))
        for name, content in self._beside.items():
            (self._staging / name).write_bytes(content)
        measured = {name: each for _, part in parts for name, each in part.items()}
        others = [name for name in checkpoint_files.names(self._staging) if name not in measured]
        measured |= checkpoint_files.measure(self._staging, others)
        checkpoint_files.publish(self._staging, self.final, measured)

    def _raise_together(self) -> None:
        own = None if self._error is None else reason(self._error)
        reasons = [f"rank {rank}: {text}" for rank, text in enumerate(gather_objects(own, self._groups)) if text]
        if reasons:
            self._fail(reasons)

    def _fail(self, reasons: list[str]) -> None:
        """Delete the staging folder, then raise the same error on every rank. Collective."""
        if self._groups.rank == 0:
            shutil.rmtree(self._staging, ignore_errors=True)
        free = self._free()
        numbers = f"it needs {self.num_bytes:,} bytes, the disk has {free:,} free"
        causes = f" ({'; '.join(reasons)})" if reasons else ""
        if free < self.num_bytes:
            fix = "free some space; the same command then resumes from the previous checkpoint"
            raise ConfigError([f"{self.final}: can't be written: {numbers}{causes}; {fix}"])
        raise RuntimeError(f"{self.final}: can't be written{causes}; {numbers}") from self._error

    def _free(self) -> int:
        """Return the bytes that rank 0 finds free on the disk."""
        return agree(shutil.disk_usage(self.final.parent).free if self._groups.rank == 0 else 0, self._groups)


class _Strategy(TorchDistSaveShardedStrategy):
    """Megatron-Core's strategy, which here keeps its writer and, on rank 0, the table of contents."""

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, async_strategy: str) -> Any:
        self.writer, (_, self.contents, _) = writer, planned
        return super()._get_save_and_finalize_callbacks(writer, planned, async_strategy)


def host_copies(buckets: list[Any], live: set[int]) -> list[Any]:
    """Return Megatron-Core's buckets (a file, its name, objects, tensors) with tensors that training doesn't change.

    Megatron-Core copies what is on a device, and on the host what is part of a larger tensor.

    live: addresses of memory that training may write to
    """
    return [
        (path, name, (objects, [(item, x.clone() if _address(x) in live else x) for item, x in tensors]))
        for path, name, (objects, tensors) in FileSystemWriterAsync.preload_tensors(buckets)
    ]


def reason(error: BaseException) -> str:
    """Return what went wrong, in the system's words where torch hides them behind its own."""
    if isinstance(error, CheckpointException):
        found = sorted({f"{type(failure[0]).__name__}: {failure[0]}" for failure in error.failures.values()})
        return "; ".join(found) or "another rank failed"
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    shown = error if cause is None else cause
    return f"{type(shown).__name__}: {shown}"


def _storages(sharded: dict[str, Any]) -> set[int]:
    tensors = (getattr(value, "data", value) for value in nested_values(sharded))
    return {_address(x) for x in tensors if torch.is_tensor(x)}


def _address(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _size(buckets: list[Any]) -> int:
    return sum(
        sum(len(content.getbuffer()) + _BYTES_AN_ITEM for _, content in objects)
        + sum(x.nbytes + _BYTES_AN_ITEM for _, x in tensors)
        for _, _, (objects, tensors) in buckets
    )
