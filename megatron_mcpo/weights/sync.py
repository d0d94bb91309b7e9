"""The whole model as full Hugging Face tensors, on every rank, some parameters at a time."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import prod

import torch.distributed as dist
from torch import Tensor, nn

from megatron_mcpo.model_config import ModelConfig
from megatron_mcpo.parallel import Groups
from megatron_mcpo.weights.bind import bind
from megatron_mcpo.weights.layout import join, shard_shape
from megatron_mcpo.weights.mapping import Parameter, Split

BUCKET_BYTES = 512 * 2**20
_ARRIVED = object()
Bound = tuple[Parameter, nn.Parameter | None]


@dataclass(kw_only=True)
class Meter:
    """Bytes. received: by this rank from other ranks; staged: the most that buffers held at one time"""

    received: int = 0
    staged: int = 0


def export(
    chunks: Sequence[nn.Module],
    model: ModelConfig,
    groups: Groups,
    *,
    bucket_bytes: int = BUCKET_BYTES,
    meter: Meter | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Every full tensor with its Hugging Face name, in layer order, the same on every rank. The tensors are new ones.

    Collective over the tensor, pipeline and expert groups: every rank must consume it to the end. What travels is
    batched in buckets of at most half of `bucket_bytes` of full tensors, or of one parameter; while the tensors of one
    are consumed, the next sets out if both are within `bucket_bytes`. These and one full parameter are held at a time.
    The stage that owns a parameter sends its shards along the pipeline and then every stage gathers them: less travels
    between stages than with full tensors. Output embeddings tied to the input's and the contrastive head are left out.
    """
    meter = meter or Meter()
    template = next(chunks[0].parameters())
    bound = ((parameter, mine) for parameter, mine in bind(chunks, model, groups) if not parameter.row.tied)
    most_elements = bucket_bytes // template.element_size()
    buckets = list(_buckets(bound, most_elements // 2))
    ahead = None
    for bucket, following in zip_longest(buckets, buckets[1:], fillvalue=()):
        under_way = ahead or _UnderWay(bucket, template, groups, meter)
        shards = under_way.arrived()
        fits = sum(_elements(parameter) for parameter, _ in (*bucket, *following)) <= most_elements
        ahead = _UnderWay(following, template, groups, meter) if fits else None
        meter.staged = max(meter.staged, under_way.staged + (ahead.staged if ahead else 0))
        for number, (parameter, _) in enumerate(bucket):
            yield from zip(parameter.hugging_face, join(parameter.row, shards.pop(number)), strict=True)


def _elements(parameter: Parameter) -> int:
    return sum(map(prod, parameter.row.shapes))


def _buckets(bound: Iterable[Bound], most_elements: int) -> Iterator[list[Bound]]:
    bucket: list[Bound] = []
    size = 0
    for parameter, mine in bound:
        elements = _elements(parameter)
        if bucket and size + elements > most_elements:
            yield bucket
            bucket, size = [], 0
        bucket.append((parameter, mine))
        size += elements
    yield bucket


class _UnderWay:
    """A bucket on three legs: along the pipeline, over the expert ranks, over the tensor ranks.

    Shards that come from the same ranks by the same way travel as one buffer. All ways go one leg before any goes the
    next, so that the calls of a group have the same order on all its ranks.
    """

    def __init__(self, bucket: Sequence[Bound], template: nn.Parameter, groups: Groups, meter: Meter):
        """Sets out on the first leg that there is in this layout, and does not wait for it."""
        self.staged = 0
        self._bucket, self._template, self._groups, self._meter = bucket, template, groups, meter
        self._shards: dict[int, list[Tensor]] = {}
        self._works: list[dist.Work] = []
        layout = groups.layout
        ways: dict[tuple[int, int | None, bool], list[int]] = {}
        for number, (parameter, _) in enumerate(bucket):
            divided = parameter.row.split is not Split.REPLICATED and parameter.row.num_shards(layout) > 1
            ways.setdefault((parameter.stage, parameter.expert_rank, divided), []).append(number)
        self._ways = [self._way(numbers, *way) for way, numbers in ways.items()]
        first = next((leg for leg, size in enumerate((layout.pipeline, layout.expert)) if size > 1), 2)
        for _ in range(first + 1):
            self._leg()

    def arrived(self) -> dict[int, list[Tensor]]:
        """By number in the bucket: the shards of all tensor ranks, in rank order. Waits for them."""
        while self._works or self._ways:
            self._leg()
        return self._shards

    def _leg(self) -> None:
        for work in self._works:
            work.wait()
        steps = [next(way, _ARRIVED) for way in self._ways]
        self._ways = [way for way, step in zip(self._ways, steps, strict=True) if step is not _ARRIVED]
        self._works = [step for step in steps if isinstance(step, dist.Work)]

    def _way(
        self, numbers: Sequence[int], stage: int, expert_rank: int | None, divided: bool
    ) -> Iterator[dist.Work | None]:
        """Three legs, each a call under way or None where there is none for this rank."""
        groups, layout = self._groups, self._groups.layout
        members = [self._bucket[number] for number in numbers]
        if not (layout.pipeline > 1 or divided or (expert_rank is not None and layout.expert > 1)):
            held = zip(numbers, members, strict=True)
            self._shards |= {number: [mine.detach()] for number, (_, mine) in held if mine is not None}
            return
        shapes = [shard_shape(p.row, p.row.num_shards(layout)) for p, _ in members]
        sizes = [prod(shape) for shape in shapes]
        num_buffers = layout.tensor if divided else 1
        whole = self._template.new_empty(num_buffers * sum(sizes), requires_grad=False)
        buffers = whole.chunk(num_buffers)
        flat = buffers[groups.tensor_rank if divided else 0]
        self.staged += whole.nbytes
        for part, (_, mine) in zip(flat.split(sizes), members, strict=True):
            if mine is not None:
                part.view(mine.shape).copy_(mine.detach())
        to_stages = layout.pipeline > 1 and expert_rank in (None, groups.expert_rank)
        yield self._broadcast(flat, groups.pipeline, stage) if to_stages else None
        to_experts = expert_rank is not None and layout.expert > 1
        yield self._broadcast(flat, groups.expert, expert_rank or 0) if to_experts else None
        if divided:
            self._meter.received += whole.nbytes - flat.nbytes
            yield dist.all_gather_into_tensor(whole, flat, group=groups.tensor, async_op=True)
        parts_of_all = zip(*(buffer.split(sizes) for buffer in buffers), strict=True)
        for number, shape, parts in zip(numbers, shapes, parts_of_all, strict=True):
            self._shards[number] = [part.view(shape) for part in parts]

    def _broadcast(self, flat: Tensor, group: dist.ProcessGroup, source: int) -> dist.Work:
        self._meter.received += flat.nbytes if group.rank() != source else 0
        return dist.broadcast(flat, group=group, group_src=source, async_op=True)
