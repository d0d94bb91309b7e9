"""The whole model as full Hugging Face tensors, on every rank, some parameters at a time."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch.distributed as dist
from torch import Tensor, nn

from megatron_mcpo.model_config import ModelConfig
from megatron_mcpo.parallel import Groups
from megatron_mcpo.weights.bind import bind
from megatron_mcpo.weights.layout import join, shard_shape
from megatron_mcpo.weights.mapping import Parameter, Split

BUCKET_BYTES = 512 * 2**20
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
    batched in buckets of at most `bucket_bytes` of full tensors, or of one parameter: a bucket, its shards and one
    full parameter are held at a time. The stage that owns a parameter sends its shards along the pipeline and then
    every stage gathers them: less travels between stages than with full tensors. Output embeddings tied to the input's
    and the contrastive head are left out.
    """
    gathering = _Gathering(next(chunks[0].parameters()), groups, meter or Meter())
    bound = ((parameter, mine) for parameter, mine in bind(chunks, model, groups) if not parameter.row.tied)
    for bucket in _buckets(bound, bucket_bytes // gathering.itemsize):
        yield from gathering.full_tensors(bucket)


def _buckets(bound: Iterable[Bound], most_elements: int) -> Iterator[list[Bound]]:
    bucket: list[Bound] = []
    size = 0
    for parameter, mine in bound:
        elements = sum(map(prod, parameter.row.shapes))
        if bucket and size + elements > most_elements:
            yield bucket
            bucket, size = [], 0
        bucket.append((parameter, mine))
        size += elements
    yield bucket


@dataclass(frozen=True)
class _Gathering:
    some_parameter: nn.Parameter
    groups: Groups
    meter: Meter

    @property
    def itemsize(self) -> int:
        return self.some_parameter.element_size()

    def full_tensors(self, bucket: Sequence[Bound]) -> Iterator[tuple[str, Tensor]]:
        """Shards that come from the same ranks by the same way travel as one buffer."""
        ways: dict[tuple[int, int | None, bool], list[int]] = {}
        for number, (parameter, _) in enumerate(bucket):
            row = parameter.row
            divided = row.split is not Split.REPLICATED and row.num_shards(self.groups.layout) > 1
            ways.setdefault((parameter.stage, parameter.expert_rank, divided), []).append(number)
        shards: dict[int, list[Tensor]] = {}
        staged = 0
        for (stage, expert_rank, divided), numbers in ways.items():
            members = [bucket[number] for number in numbers]
            if self._travels(expert_rank, divided):
                arrived = list(self._arrived(members, stage, expert_rank, divided))
                staged += sum(shard.nbytes for each in arrived for shard in each)
            else:
                arrived = [[mine.detach()] for _, mine in members if mine is not None]
            shards |= zip(numbers, arrived, strict=True)
        self.meter.staged = max(self.meter.staged, staged)
        for number, (parameter, _) in enumerate(bucket):
            yield from zip(parameter.hugging_face, join(parameter.row, shards.pop(number)), strict=True)

    def _travels(self, expert_rank: int | None, divided: bool) -> bool:
        layout = self.groups.layout
        return layout.pipeline > 1 or divided or (expert_rank is not None and layout.expert > 1)

    def _arrived(
        self, members: Sequence[Bound], stage: int, expert_rank: int | None, divided: bool
    ) -> Iterator[list[Tensor]]:
        """The shards of all tensor ranks, in rank order, for every member."""
        groups, layout = self.groups, self.groups.layout
        shapes = [shard_shape(p.row, p.row.num_shards(layout)) for p, _ in members]
        sizes = [prod(shape) for shape in shapes]
        flat = self.some_parameter.new_empty(sum(sizes), requires_grad=False)
        for part, (_, mine) in zip(flat.split(sizes), members, strict=True):
            if mine is not None:
                part.view(mine.shape).copy_(mine.detach())
        if layout.pipeline > 1 and expert_rank in (None, groups.expert_rank):
            dist.broadcast(flat, group=groups.pipeline, group_src=stage)
            self.meter.received += flat.nbytes if groups.pipeline_rank != stage else 0
        if expert_rank is not None and layout.expert > 1:
            dist.broadcast(flat, group=groups.expert, group_src=expert_rank)
            self.meter.received += flat.nbytes if groups.expert_rank != expert_rank else 0
        gathered = [flat]
        if divided:
            whole = flat.new_empty(layout.tensor * len(flat))
            dist.all_gather_into_tensor(whole, flat, group=groups.tensor)
            self.meter.received += whole.nbytes - flat.nbytes
            gathered = list(whole.chunk(layout.tensor))
        for shape, parts in zip(shapes, zip(*(each.split(sizes) for each in gathered), strict=True), strict=True):
            yield [part.view(shape) for part in parts]
