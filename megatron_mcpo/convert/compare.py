"""Compare every bit of every tensor in two folders."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mcpo.convert.work_sharing import for_each_rank
from megatron_mcpo.distributed.peers import Peers, Team, gather_objects
from megatron_mcpo.weights.hf_io import Source
from megatron_mcpo.weights.hf_write import spread
from megatron_mcpo.weights.torch_dist import byte_view

SMALL_BYTES = 1 << 30
"""Up to this size in fp32 logits are compared by default: it takes a minute, and four times the size in memory."""
_TURN_BYTES = 1 << 30
_BLOCK_BYTES = 16 << 20
"""How much of a tensor is read at once. malloc reuses blocks of this size (below DEFAULT_MMAP_THRESHOLD_MAX, 32 MiB);
larger ones come from the kernel, which first fills them with zeros."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The result of comparing the tensors of two folders bit by bit.

    differing: a line for each tensor that differs; sha256: of the tensors in the second folder, by name
    left_out: tensors of the first folder that the second one has not, because they are no part of the model's own
    """

    num_tensors: int
    num_bits_different: int
    differing: tuple[str, ...]
    sha256: dict[str, str]
    left_out: tuple[str, ...] = ()


def compare(
    expected: Source, found: Source, *, dtype: torch.dtype | None = None, team: Peers | None = None
) -> Comparison:
    """Compare every tensor of a model in two folders, each tensor by one process; return the result of all of them.

    Args:
        expected: The folder that is right.
        found: The folder to be checked.
        dtype: What the tensors of `found` must have; None for the dtype that they have in `expected`.
        team: The processes that share the work; None for this process alone.
    """
    team = team or Team()
    groups = spread({name: nbytes(expected, name) for name in expected.names}, _TURN_BYTES)

    def work(names: list[str]) -> dict[str, tuple[int, str, str]]:
        with ThreadPoolExecutor(max_workers=1) as thread:
            return {name: _compare(expected, found, name, dtype, thread) for name in names}

    own = for_each_rank(groups, team, work)
    of_all = {name: each for parts in gather_objects(own, team) for part in parts for name, each in part.items()}
    return Comparison(
        num_tensors=len(expected.names),
        num_bits_different=sum(bits for bits, _, _ in of_all.values()),
        differing=tuple(f"{name}: {of_all[name][2]}" for name in expected.names if of_all[name][2]),
        sha256={name: of_all[name][1] for name in expected.names},
    )


def blocks(source: Source, name: str) -> Iterator[tuple[int, int]]:
    """Return (start, stop) of the rows that are read at once, for all rows of a tensor."""
    shape = source.shape(name)
    step = max(1, _BLOCK_BYTES // max(1, nbytes(source, name) // shape[0]))
    return ((start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def nbytes(source: Source, name: str, dtype: torch.dtype | None = None) -> int:
    """Return the bytes of a tensor in the dtype that it has, or in another one."""
    return torch.Size(source.shape(name)).numel() * (dtype or source.dtype(name)).itemsize


def bits_different(a: Tensor, b: Tensor) -> int:
    """Count the bits that differ between two tensors of one shape and dtype."""
    a, b = (x.contiguous().flatten().view(torch.uint8) for x in (a, b))
    whole = len(a) - len(a) % 8  # comparing eight bytes at a time is eight times as fast
    if torch.equal(a[:whole].view(torch.int64), b[:whole].view(torch.int64)) and torch.equal(a[whole:], b[whole:]):
        return 0
    return int(sum(((a ^ b) >> bit & 1).sum() for bit in range(8)))


def head_problems(expected: dict[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    """Return how two contrastive heads differ, a line per problem."""
    if expected.keys() != found.keys():
        return [f"contrastive head: has {sorted(found)}, must have {sorted(expected)}"]
    return [f"contrastive head: {name} differs" for name, a in expected.items() if not torch.equal(a, found[name])]


def is_small(source: Source) -> bool:
    """Return whether a model is so small that its logits are compared by default."""
    return sum(nbytes(source, name, torch.float32) for name in source.names) <= SMALL_BYTES


def _compare(
    expected: Source, found: Source, name: str, dtype: torch.dtype | None, thread: ThreadPoolExecutor
) -> tuple[int, str, str]:
    """Return (number of bits that differ, SHA-256 of the tensor found, what is wrong with it or "")."""
    wanted = dtype or expected.dtype(name)
    if (found.dtype(name), found.shape(name)) != (wanted, expected.shape(name)):
        return 0, "", f"is {found.dtype(name)} {list(found.shape(name))}, must be {wanted} {list(expected.shape(name))}"
    digest, bits = hashlib.sha256(), 0
    for start, stop in blocks(found, name):
        values = found.read(name, start, stop, dim=0)
        hashing = thread.submit(digest.update, byte_view(values))  # while the other side is read
        bits += bits_different(values, expected.read(name, start, stop, dim=0).to(wanted))
        hashing.result()
    return bits, digest.hexdigest(), f"{bits} bits differ" if bits else ""
