"""Describe what a tensor-parallel rank holds of a parameter, and cut and assemble tensors by that description.

A shard is a sequence of slices of Hugging Face tensors laid end to end. The same list of slices cuts shards out of full
tensors and assembles full tensors from shards, so that the two directions cannot diverge. Needs no process group.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_mcpo.weights.mapping import ParamMapping, Split

if TYPE_CHECKING:  # plans are made and printed without torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSlice:
    """Indices start..stop-1, along the cut dimension, of the mapping's Hugging Face tensor number `tensor`."""

    tensor: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def cut_dim(mapping: ParamMapping) -> int:
    """Return the dimension that shards are cut along."""
    return 1 if mapping.split is Split.COLUMNS else 0


def shard_shape(mapping: ParamMapping, num_ranks: int) -> tuple[int, ...]:
    """Return the shape of one rank's shard, padding included: the same on every rank."""
    return cut_shape(mapping, _shard_size(mapping, num_ranks))


def cut_shape(mapping: ParamMapping, size: int) -> tuple[int, ...]:
    """Return the shape of a part of the parameter that has `size` indices along the cut dimension."""
    shape = list(mapping.shapes[0])
    shape[cut_dim(mapping)] = size
    return tuple(shape)


def shard_slices(mapping: ParamMapping, *, rank: int, num_ranks: int) -> list[TensorSlice]:
    """Return the slices that shard `rank` of `num_ranks` consists of, in order; zeros fill up what they leave."""
    in_order = _slices_of_all_shards(mapping, num_ranks)
    if mapping.split is Split.REPLICATED:
        return in_order
    size = _shard_size(mapping, num_ranks)
    low, high = rank * size, (rank + 1) * size
    found: list[TensorSlice] = []
    for each, position in placed(in_order):
        first, last = max(low, position), min(high, position + len(each))
        if first < last:
            offset = each.start - position
            found.append(TensorSlice(tensor=each.tensor, start=first + offset, stop=last + offset))
    return found


def fill(
    mapping: ParamMapping,
    shard: "Tensor",
    read: "Callable[[TensorSlice], Tensor]",
    *,
    rank: int,
    num_ranks: int,
) -> None:
    """Write shard `rank` of `num_ranks` into `shard`, in its dtype and on its device; its padding becomes zero.

    `read` returns one slice of one Hugging Face tensor; it is called for no more than the shard needs.
    """
    dim = cut_dim(mapping)
    end = 0
    for each, position in placed(shard_slices(mapping, rank=rank, num_ranks=num_ranks)):
        end = position + len(each)
        shard.narrow(dim, position, len(each)).copy_(read(each))
    shard.narrow(dim, end, shard.shape[dim] - end).zero_()


def placed(slices: Iterable[TensorSlice]) -> Iterator[tuple[TensorSlice, int]]:
    """Yield every slice with the position where it begins: slices lie end to end."""
    position = 0
    for each in slices:
        yield each, position
        position += len(each)


class ShardAssembler:
    """The full Hugging Face tensors of a parameter, assembled from the shards of all ranks or from slices of these.

    A tensor is allocated with its first element and released with its last.
    """

    def __init__(self, mapping: ParamMapping):
        self._mapping = mapping
        self._begun: dict[int, Tensor] = {}
        self._missing = [shape[cut_dim(mapping)] for shape in mapping.shapes]

    def add(self, shards: "Sequence[Tensor]", *, start: int = 0) -> "Iterator[tuple[int, Tensor]]":
        """Take in what the shards hold from index `start` on along the cut dimension.

        shards: the same slice of all shards, in rank order; a single one where every rank holds the same

        Yields every tensor that this completes, newly allocated, after its number in the mapping.
        """
        dim = cut_dim(self._mapping)
        stop = start + shards[0].shape[dim]
        for rank, values in enumerate(shards):
            for each, position in placed(shard_slices(self._mapping, rank=rank, num_ranks=len(shards))):
                first, last = max(start, position), min(stop, position + len(each))
                if first < last:
                    full = self._full(each.tensor, values).narrow(dim, each.start + first - position, last - first)
                    full.copy_(values.narrow(dim, first - start, last - first))
                    self._missing[each.tensor] -= last - first
        for tensor in sorted(self._begun):
            if not self._missing[tensor]:
                yield tensor, self._begun.pop(tensor)

    def _full(self, tensor: int, like: "Tensor") -> "Tensor":
        if tensor not in self._begun:
            self._begun[tensor] = like.new_empty(self._mapping.shapes[tensor])
        return self._begun[tensor]


def _slices_of_all_shards(mapping: ParamMapping, num_ranks: int) -> list[TensorSlice]:
    """Return the tensors of a mapping in the order in which Megatron lays them out, before it cuts them into shards."""
    groups = {Split.GROUPS: mapping.groups, Split.RANKS: num_ranks}.get(mapping.split, 1)
    sizes = [shape[cut_dim(mapping)] for shape in mapping.shapes]
    assert all(size % groups == 0 for size in sizes), "layout_problems() refuses sizes that don't divide"
    return [
        TensorSlice(tensor=tensor, start=group * size // groups, stop=(group + 1) * size // groups)
        for group in range(groups)
        for tensor, size in enumerate(sizes)
    ]


def _shard_size(mapping: ParamMapping, num_ranks: int) -> int:
    total = sum(shape[cut_dim(mapping)] for shape in mapping.shapes)
    if mapping.split is Split.REPLICATED:
        return total
    assert mapping.split is Split.ROWS or total % num_ranks == 0, "layout_problems() refuses sizes that don't divide"
    return -(-total // num_ranks)
