"""Assemble the whole model as full Hugging Face tensors on every rank, some parameters at a time."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import prod

import torch.distributed as dist
from torch import Tensor, nn

from megatron_mcpo import progress
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.distributed.device import device
from megatron_mcpo.distributed.parallel import Groups
from megatron_mcpo.weights.buckets import fill_buckets
from megatron_mcpo.weights.mapping import Parameter
from megatron_mcpo.weights.match_parameters import match_parameters
from megatron_mcpo.weights.shards import ShardAssembler, cut_dim, cut_shape, shard_shape

GPU_BUCKET_BYTES, CPU_BUCKET_BYTES = 512 * 2**20, 96 * 2**20
"""What is under way and put together at a time, of which a message is a quarter. On a CPU a message is smaller than
what malloc gives back to the kernel at once (glibc's DEFAULT_MMAP_THRESHOLD_MAX, 32 MiB): memory from the kernel is
filled with zeros each time, with which a sync took twice as long."""


@dataclass(kw_only=True)
class TransferStats:
    """Bytes of one weight sync on this rank.

    received: from other ranks; staged: the most that buffers held at one time
    """

    received: int = 0
    staged: int = 0


@dataclass(frozen=True, eq=False)
class _ShardSlice:
    """Indices start..stop-1, along the cut dimension, of all shards of a parameter. mine: this rank's, if it has one"""

    parameter: Parameter
    mine: nn.Parameter | None
    start: int
    stop: int
    num_shards: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the slice in one shard."""
        return cut_shape(self.parameter.mapping, self.stop - self.start)

    @property
    def elements(self) -> int:
        """Return the number of elements of the slice in all shards together."""
        return self.num_shards * prod(self.shape)

    def read(self) -> Tensor:
        """Return this rank's shard of the slice, as a view."""
        assert self.mine is not None
        return self.mine.detach().narrow(cut_dim(self.parameter.mapping), self.start, self.stop - self.start)


@dataclass(frozen=True, kw_only=True)
class _Buffer:
    """Slices that come from the same ranks by the same way, side by side in one message.

    whole: the shards of all tensor ranks, one after the other; mine: the part of this rank's shard
    stage, expert_rank: of the ranks that hold the slices (None: all expert ranks do)
    """

    slices: list[_ShardSlice]
    whole: Tensor
    mine: Tensor
    stage: int
    expert_rank: int | None
    num_shards: int

    def shards(self) -> Iterator[tuple[_ShardSlice, list[Tensor]]]:
        """Yield every slice as it is in the shards of all tensor ranks, in rank order."""
        sizes = [prod(each.shape) for each in self.slices]
        by_rank = [part.split(sizes) for part in self.whole.chunk(self.num_shards)]
        for each, flats in zip(self.slices, zip(*by_rank, strict=True), strict=True):
            yield each, [flat.view(each.shape) for flat in flats]


@dataclass(frozen=True, kw_only=True)
class _Transfer:
    """A bucket that is under way. local: slices of which this rank holds every shard; works: calls of the first leg"""

    bucket: list[_ShardSlice]
    buffers: list[_Buffer]
    local: dict[_ShardSlice, list[Tensor]]
    works: list[dist.Work] = field(default_factory=list)

    @property
    def staged(self) -> int:
        """Return the number of bytes that the buffers hold."""
        return sum(buffer.whole.nbytes for buffer in self.buffers)


def default_bucket_bytes() -> int:
    """Return how many bytes a weight sync stages on a rank of this machine."""
    return CPU_BUCKET_BYTES if device().type == "cpu" else GPU_BUCKET_BYTES


def export(
    chunks: Sequence[nn.Module],
    model: ModelConfig,
    groups: Groups,
    *,
    bucket_bytes: int | None = None,
    stats: TransferStats | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield every full tensor with its Hugging Face name, in layer order, the same on every rank, newly allocated.

    Collective over the tensor, pipeline and expert groups: every rank must consume it to the end. Half of
    `bucket_bytes` (None: default_bucket_bytes) is for what travels: two buckets, of which one sets out while the
    tensors of the other are consumed.
    A parameter that is larger than a bucket travels in slices. The other half is for the tensor that is put together
    and the one before, which the consumer still holds; larger ones take what they need.
    The stage that owns a parameter sends its shards along the pipeline and then every stage gathers them: less travels
    between stages than with full tensors. Output embeddings tied to the input's and the contrastive head are left out.
    """
    stats = stats or TransferStats()
    template = next(chunks[0].parameters())
    most_elements = (bucket_bytes or default_bucket_bytes()) // 4 // template.element_size()
    slices = _slices(match_parameters(chunks, model, groups), groups.layout, most_elements)
    buckets = fill_buckets(((each, (each.elements,)) for each in slices), most_elements)
    ahead: _Transfer | None = _start(next(buckets), template, groups, stats)
    for following in chain(buckets, [None]):
        assert ahead is not None
        transfer, arrived = ahead, _finish(ahead, groups, stats)
        ahead = _start(following, template, groups, stats) if following else None
        stats.staged = max(stats.staged, transfer.staged + (ahead.staged if ahead else 0))
        for each in transfer.bucket:
            if each.start == 0:
                assembler = ShardAssembler(each.parameter.mapping)
            for number, tensor in assembler.add(arrived.pop(each), start=each.start):
                yield each.parameter.hugging_face[number], tensor


def _slices(
    matched: Iterable[tuple[Parameter, nn.Parameter | None]], layout: Layout, most_elements: int
) -> Iterator[_ShardSlice]:
    """Yield all parameters but tied ones, the same on every rank; larger ones than a bucket in equal slices."""
    for parameter, mine in matched:
        if parameter.mapping.tied:
            continue
        num_shards = parameter.mapping.num_different(layout)
        shape = shard_shape(parameter.mapping, num_shards)
        length = shape[cut_dim(parameter.mapping)]
        longest = max(1, most_elements * length // (num_shards * prod(shape)))
        num_slices = -(-length // longest)
        step = -(-length // num_slices)
        for start in range(0, length, step):
            yield _ShardSlice(parameter, mine, start, min(start + step, length), num_shards)


def _start(bucket: list[_ShardSlice], template: nn.Parameter, groups: Groups, stats: TransferStats) -> _Transfer:
    """Fill the buffers of a bucket and send them over the first leg that this layout has, without waiting for it."""
    layout = groups.layout
    local: dict[_ShardSlice, list[Tensor]] = {}
    ways: dict[tuple[int, int | None, int], list[_ShardSlice]] = {}
    for each in bucket:
        stage, expert_rank = each.parameter.stage, each.parameter.expert_rank
        if layout.pipeline > 1 or each.num_shards > 1 or (expert_rank is not None and layout.expert > 1):
            ways.setdefault((stage, expert_rank, each.num_shards), []).append(each)
        else:
            local[each] = [each.read()]
    buffers = [_filled_buffer(slices, *way, template, groups) for way, slices in ways.items()]
    works = [work for leg in _legs(layout)[:1] for work in leg(buffers, groups, stats)]
    return _Transfer(bucket=bucket, buffers=buffers, local=local, works=works)


def _finish(transfer: _Transfer, groups: Groups, stats: TransferStats) -> dict[_ShardSlice, list[Tensor]]:
    """Return every slice of a bucket as it is in the shards of all tensor ranks, in rank order; waits for them.

    All buffers go one leg before any goes the next, so that the calls of a group have the same order on all its ranks.
    """
    progress.tick()
    works = transfer.works
    for leg in _legs(groups.layout)[1:]:
        _wait(works)
        works = leg(transfer.buffers, groups, stats)
    _wait(works)
    return transfer.local | dict(pair for buffer in transfer.buffers for pair in buffer.shards())


def _filled_buffer(
    slices: list[_ShardSlice],
    stage: int,
    expert_rank: int | None,
    num_shards: int,
    template: nn.Parameter,
    groups: Groups,
) -> _Buffer:
    sizes = [prod(each.shape) for each in slices]
    whole = template.new_empty(num_shards * sum(sizes), requires_grad=False)
    mine = whole.chunk(num_shards)[groups.tensor_rank if num_shards > 1 else 0]
    for each, place in zip(slices, mine.split(sizes), strict=True):
        if each.mine is not None:
            place.view(each.shape).copy_(each.read())
    return _Buffer(slices=slices, whole=whole, mine=mine, stage=stage, expert_rank=expert_rank, num_shards=num_shards)


type _Leg = Callable[[Sequence[_Buffer], Groups, TransferStats], list[dist.Work]]


def _legs(layout: Layout) -> list[_Leg]:
    """Return the functions that a bucket's buffers pass through in this layout, in order."""
    legs = ((layout.pipeline, _over_stages), (layout.expert, _over_expert_ranks), (layout.tensor, _over_tensor_ranks))
    return [leg for size, leg in legs if size > 1]


def _over_stages(buffers: Sequence[_Buffer], groups: Groups, stats: TransferStats) -> list[dist.Work]:
    """Start to broadcast shards along the pipeline from the stages that hold them; an expert's on its ranks alone."""
    return [
        _broadcast(buffer.mine, groups.pipeline, buffer.stage, stats)
        for buffer in buffers
        if buffer.expert_rank in (None, groups.expert_rank)
    ]


def _over_expert_ranks(buffers: Sequence[_Buffer], groups: Groups, stats: TransferStats) -> list[dist.Work]:
    """Start to broadcast experts to the expert ranks that do not hold them."""
    return [
        _broadcast(buffer.mine, groups.expert, buffer.expert_rank, stats)
        for buffer in buffers
        if buffer.expert_rank is not None
    ]


def _over_tensor_ranks(buffers: Sequence[_Buffer], groups: Groups, stats: TransferStats) -> list[dist.Work]:
    """Start to gather the shards of all tensor ranks."""
    divided = [buffer for buffer in buffers if buffer.num_shards > 1]
    stats.received += sum(buffer.whole.nbytes - buffer.mine.nbytes for buffer in divided)
    return [
        dist.all_gather_into_tensor(buffer.whole, buffer.mine, group=groups.tensor, async_op=True) for buffer in divided
    ]


def _broadcast(flat: Tensor, group: dist.ProcessGroup, source: int, stats: TransferStats) -> dist.Work:
    stats.received += flat.nbytes if group.rank() != source else 0
    return dist.broadcast(flat, group=group, group_src=source, async_op=True)


def _wait(works: Iterable[dist.Work]) -> None:
    for work in works:
        work.wait()
