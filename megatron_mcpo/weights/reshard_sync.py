"""Two ways to bring the policy's weights into the engines, behind one interface.

FullTensorSync: every rank puts together every full tensor and its engine takes what it needs: works with every engine.
ReshardSync: every engine rank gets the slices that it lacks, and they are written into the engine's own parameters.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.distributed.parallel import Groups, gather_objects
from megatron_mcpo.weights.engine_layout import engine_name, engine_shapes, engine_slices
from megatron_mcpo.weights.full_sync import BUCKET_BYTES, TransferStats, export
from megatron_mcpo.weights.mapping import ParamMapping, Split
from megatron_mcpo.weights.match_parameters import bind
from megatron_mcpo.weights.reshard_plan import Piece, Plan, Step
from megatron_mcpo.weights.shards import cut_dim, cut_shape


class Updatable(Protocol):
    """An engine, as far as gather is concerned."""

    def update(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> int:
        """See rollout.engine.Engine.update."""


class Receiver(Updatable, Protocol):
    """An engine rank in this process that may be written into."""

    def parameters(self) -> Mapping[str, Tensor] | None:
        """What it computes with, by vLLM's names; None: it keeps its weights otherwise than its loaders leave them.

        Raises EngineError as update does.
        """

    def rewriting(self, version: int) -> AbstractContextManager[Mapping[str, Tensor]]:
        """A block that overwrites every element of `parameters` in place; after it the engine is as after an update.

        Raises EngineError as update does, also where the block fails: the engine then holds half of the weights.
        """


class WeightSync(Protocol):
    """A way to push to the engine of this rank. All ranks push together."""

    @property
    def name(self) -> str:
        """gather or direct."""

    def push(self, version: int) -> TransferStats:
        """Bring the whole policy, as `version`, into the engines of all ranks; returns what it took of this rank.

        Raises EngineError when this rank's engine fails.
        """


@dataclass(frozen=True, kw_only=True)
class FullTensorSync:
    """Full tensors in layer order, in buckets (see sync.export)."""

    chunks: Sequence[nn.Module]
    model: ModelConfig
    groups: Groups
    engine: Updatable
    bucket_bytes: int = BUCKET_BYTES
    name: ClassVar[str] = "gather"

    def push(self, version: int) -> TransferStats:
        meter = TransferStats()
        tensors = export(self.chunks, self.model, self.groups, bucket_bytes=self.bucket_bytes, meter=meter)
        self.engine.update(tensors, version)
        return meter


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A piece of a parameter that this rank sends, gets or keeps. shard: where it takes it from; None: it arrives."""

    row: ParamMapping
    piece: Piece
    shard: nn.Parameter | None
    target: str
    expert: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        return cut_shape(self.row, len(self.piece))

    def read(self) -> Tensor:
        assert self.shard is not None
        return self.shard.detach().narrow(cut_dim(self.row), self.piece.source_start, len(self.piece))

    def write(self, parameters: Mapping[str, Tensor], values: Tensor) -> None:
        parameter = parameters[self.target]
        mine = parameter if self.expert is None else parameter[self.expert]
        mine.narrow(cut_dim(self.row), self.piece.target_start, len(self.piece)).copy_(values)


@dataclass(frozen=True)
class _Bucket:
    """What this rank sends and gets at one time, by peer."""

    sends: dict[int, list[_Part]]
    receives: dict[int, list[_Part]]


class ReshardSync:
    """Exactly the slices of a plan, from rank to rank, in buckets; what a process holds itself is copied in place.

    At most `bucket_bytes` of slices are staged on a rank, sent and received together.
    """

    name: ClassVar[str] = "direct"

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        model: ModelConfig,
        groups: Groups,
        engine: Receiver,
        *,
        engine_ranks: int,
        bucket_bytes: int = BUCKET_BYTES,
    ):
        """Makes the plan; pushes of these parameters to this engine only carry it out. Collective over all ranks."""
        self._groups = groups
        self._engine = engine
        self._some_parameter = next(chunks[0].parameters())
        self._mine = {(p.chunk, p.megatron): mine for p, mine in bind(chunks, model, groups) if mine is not None}
        self._stays: list[_Part] = []
        self._buckets: list[_Bucket] = []
        self._padding: list[tuple[str, int]] = []
        plan = Plan(model=model, layout=groups.layout, engine_ranks=engine_ranks)
        for bucket in _buckets(plan, bucket_bytes // self._some_parameter.element_size()):
            self._buckets.append(_Bucket({}, {}))
            for step, portion, num_portions in bucket:
                self._add(step, portion, num_portions)
                if step.parameter.row.split is Split.ROWS and portion == 0:
                    held = engine_slices(step.parameter.row, rank=groups.rank % engine_ranks, num_ranks=engine_ranks)
                    self._padding.append((engine_name(step.parameter)[0], sum(map(len, held))))
        # To NCCL a group's first call is one of all its ranks, and not every rank has a part in every bucket.
        dist.all_reduce(self._some_parameter.new_zeros(1, requires_grad=False), group=groups.world)

    @torch.no_grad()
    def push(self, version: int) -> TransferStats:
        """See WeightSync. Expects an engine that keeps the parameters of the plan (see `choose`)."""
        meter = TransferStats()
        with self._engine.rewriting(version) as parameters:
            for name, num_rows in self._padding:
                parameters[name][num_rows:].zero_()
            for part in self._stays:
                part.write(parameters, part.read())
            for bucket in self._buckets:
                self._exchange(bucket, parameters, meter)
        return meter

    def _exchange(self, bucket: _Bucket, parameters: Mapping[str, Tensor], meter: TransferStats) -> None:
        outgoing = {peer: self._staged(parts) for peer, parts in bucket.sends.items()}
        incoming = {peer: self._staged(parts) for peer, parts in bucket.receives.items()}
        for peer, parts in bucket.sends.items():
            for part, values in _views(parts, outgoing[peer]):
                values.copy_(part.read())
        world = self._groups.world
        operations = [dist.P2POp(dist.isend, flat, peer, world) for peer, flat in outgoing.items()]
        operations += [dist.P2POp(dist.irecv, flat, peer, world) for peer, flat in incoming.items()]
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()
        for peer, parts in bucket.receives.items():
            for part, values in _views(parts, incoming[peer]):
                part.write(parameters, values)
        received = sum(flat.nbytes for flat in incoming.values())
        meter.received += received
        meter.staged = max(meter.staged, received + sum(flat.nbytes for flat in outgoing.values()))

    def _staged(self, parts: Sequence[_Part]) -> Tensor:
        return self._some_parameter.new_empty(sum(prod(part.shape) for part in parts), requires_grad=False)

    def _add(self, step: Step, portion: int, num_portions: int) -> None:
        """File this rank's share of a step; what stays in the process is no matter of portions."""
        rank, bucket = self._groups.rank, self._buckets[-1]
        places = [place for place in (step.parameter, step.copy) if place]
        keys = [(place.chunk, place.megatron) for place in places if place.stage == self._groups.pipeline_rank]
        shard = self._mine.get(keys[0]) if keys else None
        name, expert = engine_name(step.parameter)
        for move in step.moves:
            stays = move.source == move.target
            if rank not in (move.source, move.target) or (stays and portion > 0):
                continue
            pieces = move.pieces if stays else [_portion(piece, portion, num_portions) for piece in move.pieces]
            is_source = move.source == rank
            parts = [
                _Part(
                    row=step.parameter.row, piece=piece, shard=shard if is_source else None, target=name, expert=expert
                )
                for piece in pieces
                if len(piece)
            ]
            if stays:
                self._stays += parts
            elif is_source:
                bucket.sends.setdefault(move.target, []).extend(parts)
            else:
                bucket.receives.setdefault(move.source, []).extend(parts)


def choose(
    chunks: Sequence[nn.Module],
    model: ModelConfig,
    groups: Groups,
    engine: Receiver,
    *,
    engine_ranks: int,
    bucket_bytes: int = BUCKET_BYTES,
) -> tuple[WeightSync, str | None]:
    """ReshardSync where every rank's engine can be written into, else gather and why. Collective over all ranks."""
    problems = gather_objects(_problem(engine, model, engine_ranks), groups)
    found = [f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem]
    if found:
        gather = FullTensorSync(chunks=chunks, model=model, groups=groups, engine=engine, bucket_bytes=bucket_bytes)
        return gather, found[0] if len(set(problems)) > 1 else problems[0]
    return ReshardSync(chunks, model, groups, engine, engine_ranks=engine_ranks, bucket_bytes=bucket_bytes), None


def why_gather(model: ModelConfig, *, packed: bool) -> str | None:
    """Why an engine of this model can't be written into, as far as that is known without one; None: it can.

    packed: it keeps its weights otherwise than its loaders leave them
    """
    if model.experts is not None:
        return "some of vLLM's kernels rearrange experts after loading"
    return "the engine keeps its weights packed or quantised" if packed else None


def _problem(engine: Receiver, model: ModelConfig, engine_ranks: int) -> str | None:
    if model.experts is not None:
        return why_gather(model, packed=False)
    parameters, shapes = engine.parameters(), engine_shapes(model, engine_ranks)
    if parameters is None:
        return why_gather(model, packed=True)
    for name in sorted(set(parameters) ^ set(shapes)):
        return f"{name}: only {'the engine' if name in parameters else 'the plan'} has it"
    for name, shape in shapes.items():
        tensor = parameters[name]
        if tuple(tensor.shape) != shape or tensor.dtype not in (torch.float32, torch.bfloat16):
            return f"{name}: the engine has {tuple(tensor.shape)} in {tensor.dtype}, the plan {shape} in bf16 or fp32"
    return None


def _buckets(plan: Plan, most_elements: int) -> Iterator[list[tuple[Step, int, int]]]:
    """The steps, each cut into portions (step, number, how many) that fit a bucket; the same on every rank."""
    bucket: list[tuple[Step, int, int]] = []
    staged = [0] * plan.layout.world_size
    for step in plan.steps():
        elements = [0] * plan.layout.world_size
        for move in step.moves:
            if move.source != move.target:
                elements[move.source] += step.elements(move)
                elements[move.target] += step.elements(move)
        num_portions = max(1, -(-max(elements) // most_elements))
        share = [-(-each // num_portions) for each in elements]
        for portion in range(num_portions):
            if bucket and max(map(sum, zip(staged, share, strict=True))) > most_elements:
                yield bucket
                bucket, staged = [], [0] * plan.layout.world_size
            bucket.append((step, portion, num_portions))
            staged = list(map(sum, zip(staged, share, strict=True)))
    yield bucket


def _portion(piece: Piece, number: int, num_portions: int) -> Piece:
    begin, end = (len(piece) * each // num_portions for each in (number, number + 1))
    return Piece(
        tensor=piece.tensor,
        start=piece.start + begin,
        stop=piece.start + end,
        source_start=piece.source_start + begin,
        target_start=piece.target_start + begin,
    )


def _views(parts: Sequence[_Part], flat: Tensor) -> Iterator[tuple[_Part, Tensor]]:
    """Every part with its place in a message."""
    for part, values in zip(parts, flat.split([prod(part.shape) for part in parts]), strict=True):
        yield part, values.view(part.shape)
