"""The whole model as full Hugging Face tensors, on every rank, some parameters at a time."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod

import torch.distributed as dist
from torch import Tensor, nn

from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.distributed.parallel import Groups
from megatron_mcpo.weights.mapping import Parameter
from megatron_mcpo.weights.match_parameters import bind
from megatron_mcpo.weights.shards import ShardAssembler, cut_dim, cut_shape, shard_shape

BUCKET_BYTES = 512 * 2**20
_ARRIVED = object()


@dataclass(kw_only=True)
class TransferStats:
    """Bytes. received: by this rank from other ranks; staged: the most that buffers held at one time"""

    received: int = 0
    staged: int = 0


@dataclass(frozen=True, eq=False)
class _Piece:
    """Indices start..stop-1, along the cut dimension, of all shards of a parameter. mine: this rank's, if it has one"""

    parameter: Parameter
    mine: nn.Parameter | None
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one shard's part."""
        return cut_shape(self.parameter.row, self.stop - self.start)

    def read(self) -> Tensor | None:
        if self.mine is None:
            return None
        return self.mine.detach().narrow(cut_dim(self.parameter.row), self.start, self.stop - self.start)


def export(
    chunks: Sequence[nn.Module],
    model: ModelConfig,
    groups: Groups,
    *,
    bucket_bytes: int = BUCKET_BYTES,
    meter: TransferStats | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Every full tensor with its Hugging Face name, in layer order, the same on every rank. The tensors are new ones.

    Collective over the tensor, pipeline and expert groups: every rank must consume it to the end. Half of
    `bucket_bytes` is for what travels: two buckets, of which one sets out while the tensors of the other are consumed.
    A parameter that is larger than a bucket travels in pieces. The other half is for the tensor that is put together
    and the one before, which the consumer still holds; larger ones take what they need.
    The stage that owns a parameter sends its shards along the pipeline and then every stage gathers them: less travels
    between stages than with full tensors. Output embeddings tied to the input's and the contrastive head are left out.
    """
    meter = meter or TransferStats()
    template = next(chunks[0].parameters())
    bound = ((parameter, mine) for parameter, mine in bind(chunks, model, groups) if not parameter.row.tied)
    buckets = _buckets(bound, groups.layout, bucket_bytes // 4 // template.element_size())
    under_way = _UnderWay(next(buckets), template, groups, meter)
    for following in chain(buckets, [None]):
        arrived = under_way.arrived()
        ahead = _UnderWay(following, template, groups, meter) if following else None
        meter.staged = max(meter.staged, under_way.staged + (ahead.staged if ahead else 0))
        for piece in under_way.bucket:
            if piece.start == 0:
                joining = ShardAssembler(piece.parameter.row)
            for number, tensor in joining.add(arrived.pop(piece), start=piece.start):
                yield piece.parameter.hugging_face[number], tensor
        if ahead:
            under_way = ahead


def _buckets(
    bound: Iterable[tuple[Parameter, nn.Parameter | None]], layout: Layout, most_elements: int
) -> Iterator[list[_Piece]]:
    """The same on every rank."""
    bucket: list[_Piece] = []
    size = 0
    for parameter, mine in bound:
        num_shards = parameter.row.num_different(layout)
        shape = shard_shape(parameter.row, num_shards)
        length = shape[cut_dim(parameter.row)]
        longest = max(1, most_elements * length // (num_shards * prod(shape)))
        num_pieces = -(-length // longest)
        step = -(-length // num_pieces)
        for start in range(0, length, step):
            piece = _Piece(parameter, mine, start, min(start + step, length))
            elements = num_shards * prod(piece.shape)
            if bucket and size + elements > most_elements:
                yield bucket
                bucket, size = [], 0
            bucket.append(piece)
            size += elements
    yield bucket


class _UnderWay:
    """A bucket on three legs: along the pipeline, over the expert ranks, over the tensor ranks.

    Shards that come from the same ranks by the same way travel as one buffer. All ways go one leg before any goes the
    next, so that the calls of a group have the same order on all its ranks.
    """

    def __init__(self, bucket: Sequence[_Piece], template: nn.Parameter, groups: Groups, meter: TransferStats):
        """Sets out on the first leg that there is in this layout, and does not wait for it."""
        self.bucket, self.staged = bucket, 0
        self._template, self._groups, self._meter = template, groups, meter
        self._arrived: dict[_Piece, list[Tensor]] = {}
        self._works: list[dist.Work] = []
        layout = groups.layout
        ways: dict[tuple[int, int | None, bool], list[_Piece]] = {}
        for piece in bucket:
            parameter = piece.parameter
            way = (parameter.stage, parameter.expert_rank, parameter.row.num_different(layout) > 1)
            ways.setdefault(way, []).append(piece)
        self._ways = [self._way(pieces, *way) for way, pieces in ways.items()]
        first = next((leg for leg, size in enumerate((layout.pipeline, layout.expert)) if size > 1), 2)
        for _ in range(first + 1):
            self._leg()

    def arrived(self) -> dict[_Piece, list[Tensor]]:
        """Every piece as it is in the shards of all tensor ranks, in rank order. Waits for them."""
        while self._works or self._ways:
            self._leg()
        return self._arrived

    def _leg(self) -> None:
        for work in self._works:
            work.wait()
        steps = [next(way, _ARRIVED) for way in self._ways]
        self._ways = [way for way, step in zip(self._ways, steps, strict=True) if step is not _ARRIVED]
        self._works = [step for step in steps if isinstance(step, dist.Work)]

    def _way(
        self, pieces: Sequence[_Piece], stage: int, expert_rank: int | None, divided: bool
    ) -> Iterator[dist.Work | None]:
        """Three legs, each a call under way or None where there is none for this rank."""
        groups, layout = self._groups, self._groups.layout
        if not (layout.pipeline > 1 or divided or (expert_rank is not None and layout.expert > 1)):
            self._arrived |= {piece: [held] for piece in pieces if (held := piece.read()) is not None}
            return
        sizes = [prod(piece.shape) for piece in pieces]
        num_buffers = layout.tensor if divided else 1
        whole = self._template.new_empty(num_buffers * sum(sizes), requires_grad=False)
        buffers = whole.chunk(num_buffers)
        flat = buffers[groups.tensor_rank if divided else 0]
        self.staged += whole.nbytes
        for place, piece in zip(flat.split(sizes), pieces, strict=True):
            held = piece.read()
            if held is not None:
                place.view(piece.shape).copy_(held)
        to_stages = layout.pipeline > 1 and expert_rank in (None, groups.expert_rank)
        yield self._broadcast(flat, groups.pipeline, stage) if to_stages else None
        to_experts = expert_rank is not None and layout.expert > 1
        yield self._broadcast(flat, groups.expert, expert_rank or 0) if to_experts else None
        if divided:
            self._meter.received += whole.nbytes - flat.nbytes
            yield dist.all_gather_into_tensor(whole, flat, group=groups.tensor, async_op=True)
        places_of_all = zip(*(buffer.split(sizes) for buffer in buffers), strict=True)
        for piece, places in zip(pieces, places_of_all, strict=True):
            self._arrived[piece] = [place.view(piece.shape) for place in places]

    def _broadcast(self, flat: Tensor, group: dist.ProcessGroup, source: int) -> dist.Work:
        self._meter.received += flat.nbytes if group.rank() != source else 0
        return dist.broadcast(flat, group=group, group_src=source, async_op=True)
