"""Bring the policy's weights into the engines, in one of two ways behind one interface.

FullTensorSync: every rank assembles every full tensor and its engine takes what it needs; works with every engine.
ReshardSync: every engine rank receives the slices that it lacks, written into the engine's own parameters.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_mcpo import progress
from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.distributed.parallel import Groups
from megatron_mcpo.distributed.peers import gather_objects
from megatron_mcpo.weights.buckets import fill_buckets
from megatron_mcpo.weights.engine_layout import engine_name, engine_shapes, engine_slices
from megatron_mcpo.weights.full_sync import TransferStats, default_bucket_bytes, export
from megatron_mcpo.weights.mapping import ParamMapping, Split
from megatron_mcpo.weights.match_parameters import match_parameters
from megatron_mcpo.weights.reshard_plan import PlacedSlice, Step, SyncPlan
from megatron_mcpo.weights.shards import cut_dim, cut_shape


class Updatable(Protocol):
    """An engine as FullTensorSync sees it."""

    def update(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> int:
        """Load full tensors as rollout.engine.Engine.update does."""


class Receiver(Updatable, Protocol):
    """An engine rank in this process that may be written into."""

    def parameters(self) -> Mapping[str, Tensor] | None:
        """Return what it computes with, by vLLM's names; None: its weights are not as its loaders leave them.

        Raises EngineError as update does.
        """

    def rewriting(self, version: int) -> AbstractContextManager[Mapping[str, Tensor]]:
        """Yield `parameters` for a block that overwrites every element in place; then the engine is as after an update.

        Raises EngineError as update does, also where the block fails: the engine then holds a mixture of two versions.
        """


class WeightSync(Protocol):
    """A way to bring the policy's weights into the engine of this rank. All ranks sync together."""

    @property
    def name(self) -> str:
        """Return how weights go to the engine, in words for the console: full tensors, or reshard."""

    def sync(self, version: int) -> TransferStats:
        """Bring the whole policy, as `version`, into the engines of all ranks; returns the bytes of this rank.

        Raises EngineError when this rank's engine fails.
        """


@dataclass(frozen=True, kw_only=True)
class FullTensorSync:
    """Full tensors in layer order, in buckets (see full_sync.export)."""

    chunks: Sequence[nn.Module]
    model: ModelConfig
    groups: Groups
    engine: Updatable
    bucket_bytes: int | None = None
    name: ClassVar[str] = "full tensors"

    def sync(self, version: int) -> TransferStats:
        stats = TransferStats()
        tensors = export(self.chunks, self.model, self.groups, bucket_bytes=self.bucket_bytes, stats=stats)
        self.engine.update(tensors, version)
        return stats


@dataclass(frozen=True, kw_only=True)
class _BoundSlice:
    """A slice that this rank sends, receives or keeps, with its tensors.

    shard: the trainer's parameter that it is read from; None: it arrives in a message
    target, expert: the engine's parameter that it is written to, and the index of the expert there
    """

    mapping: ParamMapping
    placed: PlacedSlice
    shard: nn.Parameter | None
    target: str
    expert: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        return cut_shape(self.mapping, len(self.placed))

    def read(self) -> Tensor:
        assert self.shard is not None
        return self.shard.detach().narrow(cut_dim(self.mapping), self.placed.source_start, len(self.placed))

    def write(self, parameters: Mapping[str, Tensor], values: Tensor) -> None:
        parameter = parameters[self.target]
        mine = parameter if self.expert is None else parameter[self.expert]
        mine.narrow(cut_dim(self.mapping), self.placed.target_start, len(self.placed)).copy_(values)


@dataclass(frozen=True)
class _Bucket:
    """Hold what this rank sends and receives at one time, by peer."""

    sends: dict[int, list[_BoundSlice]]
    receives: dict[int, list[_BoundSlice]]


class ReshardSync:
    """Exactly the slices of a SyncPlan, from rank to rank, in buckets; what a process holds itself is copied in place.

    At most `bucket_bytes` (None: a quarter of default_bucket_bytes) of slices are staged on a rank, sent and received
    together.
    """

    name: ClassVar[str] = "reshard"

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        model: ModelConfig,
        groups: Groups,
        engine: Receiver,
        *,
        engine_ranks: int,
        bucket_bytes: int | None = None,
    ):
        """Make the plan that every sync of these parameters carries out. Collective over all ranks."""
        self._groups = groups
        self._engine = engine
        self._some_parameter = next(chunks[0].parameters())
        self._mine = {
            (p.chunk, p.megatron): mine for p, mine in match_parameters(chunks, model, groups) if mine is not None
        }
        self._local: list[_BoundSlice] = []
        self._buckets: list[_Bucket] = []
        self._padding: list[tuple[str, int]] = []
        plan = SyncPlan(model=model, layout=groups.layout, engine_ranks=engine_ranks)
        most_bytes = bucket_bytes or default_bucket_bytes() // 4
        for bucket in _portions_in_buckets(plan, most_bytes // self._some_parameter.element_size()):
            self._buckets.append(_Bucket({}, {}))
            for step, portion, num_portions in bucket:
                self._add(step, portion, num_portions)
                if step.parameter.mapping.split is Split.ROWS and portion == 0:
                    held = engine_slices(
                        step.parameter.mapping, rank=groups.rank % engine_ranks, num_ranks=engine_ranks
                    )
                    self._padding.append((engine_name(step.parameter)[0], sum(map(len, held))))
        # To NCCL a group's first call is one of all its ranks, and not every rank has a part in every bucket.
        dist.all_reduce(self._some_parameter.new_zeros(1, requires_grad=False), group=groups.world)

    @torch.no_grad()
    def sync(self, version: int) -> TransferStats:
        """Sync as WeightSync says; the engine must keep the parameters of the plan (see `choose_weight_sync`)."""
        stats = TransferStats()
        with self._engine.rewriting(version) as parameters:
            for name, num_rows in self._padding:
                parameters[name][num_rows:].zero_()
            for each in self._local:
                each.write(parameters, each.read())
            for bucket in self._buckets:
                self._exchange(bucket, parameters, stats)
        return stats

    def _exchange(self, bucket: _Bucket, parameters: Mapping[str, Tensor], stats: TransferStats) -> None:
        progress.tick()
        outgoing = {peer: self._staged(slices) for peer, slices in bucket.sends.items()}
        incoming = {peer: self._staged(slices) for peer, slices in bucket.receives.items()}
        for peer, slices in bucket.sends.items():
            for each, values in _views(slices, outgoing[peer]):
                values.copy_(each.read())
        world = self._groups.world
        operations = [dist.P2POp(dist.isend, flat, peer, world) for peer, flat in outgoing.items()]
        operations += [dist.P2POp(dist.irecv, flat, peer, world) for peer, flat in incoming.items()]
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()
        for peer, slices in bucket.receives.items():
            for each, values in _views(slices, incoming[peer]):
                each.write(parameters, values)
        received = sum(flat.nbytes for flat in incoming.values())
        stats.received += received
        stats.staged = max(stats.staged, received + sum(flat.nbytes for flat in outgoing.values()))

    def _staged(self, slices: Sequence[_BoundSlice]) -> Tensor:
        return self._some_parameter.new_empty(sum(prod(each.shape) for each in slices), requires_grad=False)

    def _add(self, step: Step, portion: int, num_portions: int) -> None:
        """Add this rank's share of a portion to the last bucket; local messages go whole with the first portion."""
        rank, bucket = self._groups.rank, self._buckets[-1]
        places = [place for place in (step.parameter, step.copy) if place]
        keys = [(place.chunk, place.megatron) for place in places if place.stage == self._groups.pipeline_rank]
        shard = self._mine.get(keys[0]) if keys else None
        name, expert = engine_name(step.parameter)
        for message in step.messages:
            local, is_source = message.source == message.target, message.source == rank
            if rank not in (message.source, message.target) or (local and portion > 0):
                continue
            slices = message.slices if local else [_portion(each, portion, num_portions) for each in message.slices]
            found = [
                _BoundSlice(
                    mapping=step.parameter.mapping,
                    placed=each,
                    shard=shard if is_source else None,
                    target=name,
                    expert=expert,
                )
                for each in slices
                if len(each)
            ]
            if local:
                self._local += found
            elif is_source:
                bucket.sends.setdefault(message.target, []).extend(found)
            else:
                bucket.receives.setdefault(message.source, []).extend(found)


def choose_weight_sync(
    chunks: Sequence[nn.Module],
    model: ModelConfig,
    groups: Groups,
    engine: Receiver,
    *,
    engine_ranks: int,
    bucket_bytes: int | None = None,
) -> tuple[WeightSync, str | None]:
    """Return ReshardSync where every rank's engine can be written into, else FullTensorSync and the reason.

    Collective over all ranks.
    """
    problems = gather_objects(_problem(engine, model, engine_ranks), groups)
    found = [f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem]
    if found:
        full = FullTensorSync(chunks=chunks, model=model, groups=groups, engine=engine, bucket_bytes=bucket_bytes)
        return full, found[0] if len(set(problems)) > 1 else problems[0]
    return ReshardSync(chunks, model, groups, engine, engine_ranks=engine_ranks, bucket_bytes=bucket_bytes), None


def why_full_tensors(model: ModelConfig, *, packed: bool) -> str | None:
    """Return why an engine of this model can't be written into, as far as that is known without one; None: it can.

    packed: it keeps its weights otherwise than its loaders leave them
    """
    if model.experts is not None:
        return "some of vLLM's kernels rearrange experts after loading"
    return "the engine keeps its weights packed or quantised" if packed else None


def _problem(engine: Receiver, model: ModelConfig, engine_ranks: int) -> str | None:
    if model.experts is not None:
        return why_full_tensors(model, packed=False)
    parameters, shapes = engine.parameters(), engine_shapes(model, engine_ranks)
    if parameters is None:
        return why_full_tensors(model, packed=True)
    for name in sorted(set(parameters) ^ set(shapes)):
        return f"{name}: only {'the engine' if name in parameters else 'the plan'} has it"
    for name, shape in shapes.items():
        tensor = parameters[name]
        if tuple(tensor.shape) != shape or tensor.dtype not in (torch.float32, torch.bfloat16):
            return f"{name}: the engine has {tuple(tensor.shape)} in {tensor.dtype}, the plan {shape} in bf16 or fp32"
    return None


def _portions_in_buckets(plan: SyncPlan, most_elements: int) -> Iterator[list[tuple[Step, int, int]]]:
    """Return the plan's steps, cut into portions (step, number, how many) that fit a bucket: the same on every rank."""

    def portions() -> Iterator[tuple[tuple[Step, int, int], list[int]]]:
        for step in plan.steps():
            elements = [0] * plan.layout.world_size
            for message in step.messages:
                if message.source != message.target:
                    elements[message.source] += step.elements(message)
                    elements[message.target] += step.elements(message)
            num_portions = max(1, -(-max(elements) // most_elements))
            share = [-(-each // num_portions) for each in elements]
            for number in range(num_portions):
                yield (step, number, num_portions), share

    return fill_buckets(portions(), most_elements)


def _portion(whole: PlacedSlice, number: int, num_portions: int) -> PlacedSlice:
    begin, end = (len(whole) * each // num_portions for each in (number, number + 1))
    return PlacedSlice(
        tensor=whole.tensor,
        start=whole.start + begin,
        stop=whole.start + end,
        source_start=whole.source_start + begin,
        target_start=whole.target_start + begin,
    )


def _views(slices: Sequence[_BoundSlice], flat: Tensor) -> Iterator[tuple[_BoundSlice, Tensor]]:
    """Yield every slice with its place in a message."""
    for each, values in zip(slices, flat.split([prod(each.shape) for each in slices]), strict=True):
        yield each, values.view(each.shape)
