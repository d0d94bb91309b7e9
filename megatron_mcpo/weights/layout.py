"""What a tensor-parallel rank holds of a parameter, as data, and the two ways through it. Pure: no process group.

A shard is a row of slices of Hugging Face tensors laid end to end. The same list of slices cuts shards out of full
tensors and puts full tensors together from shards, so that one direction can't drift from the other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_mcpo.weights.mapping import Row, Split

if TYPE_CHECKING:  # plans are made and printed without torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Indices start..stop-1 along the cut dimension of the row's tensor number `tensor`."""

    tensor: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def cut_dim(row: Row) -> int:
    """The dimension that shards are cut along."""
    return 1 if row.split is Split.COLUMNS else 0


def shard_shape(row: Row, num_ranks: int) -> tuple[int, ...]:
    """Shape of one rank's shard, padding included: the same on every rank."""
    dim = cut_dim(row)
    shape = list(row.shapes[0])
    shape[dim] = _shard_size(row, num_ranks)
    return tuple(shape)


def slices(row: Row, *, rank: int, num_ranks: int) -> list[Slice]:
    """What shard `rank` of `num_ranks` is made of, in order; it ends with zeros where these don't fill it."""
    pieces = _pieces(row, num_ranks)
    if row.split is Split.REPLICATED:
        return pieces
    size = _shard_size(row, num_ranks)
    low, high = rank * size, (rank + 1) * size
    found: list[Slice] = []
    position = 0
    for piece in pieces:
        first, last = max(low, position), min(high, position + len(piece))
        if first < last:
            offset = piece.start - position
            found.append(Slice(tensor=piece.tensor, start=first + offset, stop=last + offset))
        position += len(piece)
    return found


def fill(row: Row, shard: "Tensor", read: "Callable[[Slice], Tensor]", *, rank: int, num_ranks: int) -> None:
    """Write shard `rank` of `num_ranks` into `shard`, in its dtype and on its device; what pads it becomes zero.

    `read` gives one slice of one Hugging Face tensor; it is called for no more than the shard needs.
    """
    dim = cut_dim(row)
    position = 0
    for piece in slices(row, rank=rank, num_ranks=num_ranks):
        shard.narrow(dim, position, len(piece)).copy_(read(piece))
        position += len(piece)
    shard.narrow(dim, position, shard.shape[dim] - position).zero_()


def join(row: Row, shards: "Sequence[Tensor]") -> "list[Tensor]":
    """The full Hugging Face tensors, newly allocated, from the shards of all ranks in rank order."""
    dim = cut_dim(row)
    full = [shards[0].new_empty(shape) for shape in row.shapes]
    for rank, shard in enumerate(shards):
        position = 0
        for piece in slices(row, rank=rank, num_ranks=len(shards)):
            full[piece.tensor].narrow(dim, piece.start, len(piece)).copy_(shard.narrow(dim, position, len(piece)))
            position += len(piece)
    return full


def _pieces(row: Row, num_ranks: int) -> list[Slice]:
    """The tensors of a row in the order in which Megatron lays them out, before that is cut into shards."""
    groups = {Split.GROUPS: row.groups, Split.RANKS: num_ranks}.get(row.split, 1)
    sizes = [shape[cut_dim(row)] for shape in row.shapes]
    assert all(size % groups == 0 for size in sizes), "layout_problems() refuses sizes that don't divide"
    return [
        Slice(tensor=tensor, start=group * size // groups, stop=(group + 1) * size // groups)
        for group in range(groups)
        for tensor, size in enumerate(sizes)
    ]


def _shard_size(row: Row, num_ranks: int) -> int:
    total = sum(shape[cut_dim(row)] for shape in row.shapes)
    if row.split is Split.REPLICATED:
        return total
    assert row.split is Split.ROWS or total % num_ranks == 0, "layout_problems() refuses sizes that don't divide"
    return -(-total // num_ranks)
