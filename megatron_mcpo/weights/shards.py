"""What a tensor-parallel rank holds of a parameter, as data, and the two ways through it. Pure: no process group.

A shard is a row of slices of Hugging Face tensors laid end to end. The same list of slices cuts shards out of full
tensors and puts full tensors together from shards, so that one direction can't drift from the other.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_mcpo.weights.mapping import ParamMapping, Split

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


def cut_dim(row: ParamMapping) -> int:
    """The dimension that shards are cut along."""
    return 1 if row.split is Split.COLUMNS else 0


def shard_shape(row: ParamMapping, num_ranks: int) -> tuple[int, ...]:
    """Shape of one rank's shard, padding included: the same on every rank."""
    return cut_shape(row, _shard_size(row, num_ranks))


def cut_shape(row: ParamMapping, size: int) -> tuple[int, ...]:
    """Shape of a part of the row that has `size` indices along the cut dimension."""
    shape = list(row.shapes[0])
    shape[cut_dim(row)] = size
    return tuple(shape)


def slices(row: ParamMapping, *, rank: int, num_ranks: int) -> list[Slice]:
    """What shard `rank` of `num_ranks` is made of, in order; it ends with zeros where these don't fill it."""
    pieces = _pieces(row, num_ranks)
    if row.split is Split.REPLICATED:
        return pieces
    size = _shard_size(row, num_ranks)
    low, high = rank * size, (rank + 1) * size
    found: list[Slice] = []
    for piece, position in placed(pieces):
        first, last = max(low, position), min(high, position + len(piece))
        if first < last:
            offset = piece.start - position
            found.append(Slice(tensor=piece.tensor, start=first + offset, stop=last + offset))
    return found


def fill(row: ParamMapping, shard: "Tensor", read: "Callable[[Slice], Tensor]", *, rank: int, num_ranks: int) -> None:
    """Write shard `rank` of `num_ranks` into `shard`, in its dtype and on its device; what pads it becomes zero.

    `read` gives one slice of one Hugging Face tensor; it is called for no more than the shard needs.
    """
    dim = cut_dim(row)
    end = 0
    for piece, position in placed(slices(row, rank=rank, num_ranks=num_ranks)):
        end = position + len(piece)
        shard.narrow(dim, position, len(piece)).copy_(read(piece))
    shard.narrow(dim, end, shard.shape[dim] - end).zero_()


def placed(held: Iterable[Slice]) -> Iterator[tuple[Slice, int]]:
    """Every slice with the position it begins at: slices lie end to end."""
    position = 0
    for each in held:
        yield each, position
        position += len(each)


class ShardAssembler:
    """The full Hugging Face tensors of a parameter, put together from the shards of all ranks or from pieces of these.

    A tensor is allocated with its first element and let go with its last.
    """

    def __init__(self, row: ParamMapping):
        self._row = row
        self._begun: dict[int, Tensor] = {}
        self._missing = [shape[cut_dim(row)] for shape in row.shapes]

    def add(self, pieces: "Sequence[Tensor]", *, start: int = 0) -> "Iterator[tuple[int, Tensor]]":
        """Take in what the shards hold from index `start` on along the cut dimension.

        pieces: of all shards, in rank order; one where every rank holds the same

        Yields every tensor that this completes, newly allocated, after its number in the row.
        """
        dim = cut_dim(self._row)
        stop = start + pieces[0].shape[dim]
        for rank, piece in enumerate(pieces):
            for each, position in placed(slices(self._row, rank=rank, num_ranks=len(pieces))):
                first, last = max(start, position), min(stop, position + len(each))
                if first < last:
                    full = self._full(each.tensor, piece).narrow(dim, each.start + first - position, last - first)
                    full.copy_(piece.narrow(dim, first - start, last - first))
                    self._missing[each.tensor] -= last - first
        for tensor in sorted(self._begun):
            if not self._missing[tensor]:
                yield tensor, self._begun.pop(tensor)

    def _full(self, tensor: int, like: "Tensor") -> "Tensor":
        if tensor not in self._begun:
            self._begun[tensor] = like.new_empty(self._row.shapes[tensor])
        return self._begun[tensor]


def _pieces(row: ParamMapping, num_ranks: int) -> list[Slice]:
    """The tensors of a row in the order in which Megatron lays them out, before that is cut into shards."""
    groups = {Split.GROUPS: row.groups, Split.RANKS: num_ranks}.get(row.split, 1)
    sizes = [shape[cut_dim(row)] for shape in row.shapes]
    assert all(size % groups == 0 for size in sizes), "layout_problems() refuses sizes that don't divide"
    return [
        Slice(tensor=tensor, start=group * size // groups, stop=(group + 1) * size // groups)
        for group in range(groups)
        for tensor, size in enumerate(sizes)
    ]


def _shard_size(row: ParamMapping, num_ranks: int) -> int:
    total = sum(shape[cut_dim(row)] for shape in row.shapes)
    if row.split is Split.REPLICATED:
        return total
    assert row.split is Split.ROWS or total % num_ranks == 0, "layout_problems() refuses sizes that don't divide"
    return -(-total // num_ranks)
