"""Let processes agree and fail together. Imports no Megatron-Core."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_mcpo.config.config import ConfigError


class Peers(Protocol):
    """Processes that can agree. host: the group that carries Python objects between them; None for a single process."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def host(self) -> dist.ProcessGroup | None: ...


@dataclass(frozen=True, kw_only=True)
class Team:
    """Processes that share work without forming the groups of a model."""

    rank: int = 0
    world_size: int = 1
    host: dist.ProcessGroup | None = None


@contextmanager
def team(*, timeout_seconds: float) -> Iterator[Team]:
    """Provide the processes that torchrun started, or this one alone; one that waits longer for the others fails."""
    if "RANK" not in os.environ:
        yield Team()
        return
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_seconds))
    try:
        yield Team(rank=dist.get_rank(), world_size=dist.get_world_size(), host=dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def raise_together(error: Exception | None, groups: Peers) -> None:
    """Agree whether any rank has an error; then every rank raises, or none. Collective over all ranks.

    A rank with an error raises it, with those of the others as notes. A rank without one raises a ConfigError if
    another rank has one, which the user can correct, else a RuntimeError that names the ranks and their errors.
    """
    if not anywhere(error is not None, groups):
        return
    problems = error.problems if isinstance(error, ConfigError) else []
    mine = None if error is None else (f"{type(error).__name__}: {error}", problems)
    failures = gather_objects(mine, groups)
    others = [f"rank {rank}: {each[0]}" for rank, each in enumerate(failures) if each and rank != groups.rank]
    if error is None:
        to_correct = [problem for each in failures if each for problem in each[1]]
        if to_correct:
            raise ConfigError(list(dict.fromkeys(to_correct)))
        raise RuntimeError("failed on " + "; ".join(others))
    for note in others:
        error.add_note(f"also failed on {note}")
    raise error


@contextmanager
def together(groups: Peers) -> Iterator[None]:
    """Run a block whose failure on any rank is a failure on every rank, after the block (see `raise_together`).

    Nothing inside may wait for another rank, which might have failed.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as failure:
        error = failure
    raise_together(error, groups)


def agree[T](value: T, groups: Peers) -> T:
    """Return rank 0's value on every rank. Collective over all ranks."""
    if groups.host is None:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=groups.host)
    return box[0]


def anywhere(flag: bool, groups: Peers) -> bool:
    """Return whether the flag is set on any rank. Collective over all ranks."""
    if groups.host is None:
        return flag
    count = torch.tensor([flag], dtype=torch.int32)
    dist.all_reduce(count, dist.ReduceOp.MAX, group=groups.host)
    return bool(count.item())


def gather_objects[T](value: T, groups: Peers) -> list[T]:
    """Return every rank's value, in order of rank, on every rank. Collective over all ranks."""
    if groups.host is None:
        return [value]
    found: list[Any] = [None] * groups.world_size
    dist.all_gather_object(found, value, group=groups.host)
    return found


def gather_on_first[T](value: T, groups: Peers) -> list[T]:
    """Return every rank's value, in order of rank, on rank 0, and nothing on the others. Collective over all ranks."""
    if groups.host is None:
        return [value]
    found: list[Any] | None = [None] * groups.world_size if groups.rank == 0 else None
    dist.gather_object(value, found, dst=0, group=groups.host)
    return found or []


def gather_lists[T](mine: Iterable[T], groups: Peers) -> list[T]:
    """Return the elements of all ranks, in order of rank, on every rank. Collective over all ranks."""
    return [element for part in gather_objects(list(mine), groups) for element in part]
