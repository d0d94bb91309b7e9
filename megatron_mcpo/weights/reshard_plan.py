"""The plan of a push: which indices of which trainer rank's shard go where in which engine rank's parameter. Pure data.

A trainer rank and the engine rank in the same process have the same number; `engine_ranks` neighbours form an engine.
An engine rank takes what its own process holds from there, and everything else once, from one of the ranks that hold
it: so what travels is the least that can.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import prod

from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.weights.engine_layout import engine_name, engine_slices, expert_place
from megatron_mcpo.weights.mapping import Parameter, ParamMapping, Split, parameters
from megatron_mcpo.weights.shards import cut_shape, placed, slices


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Indices start..stop-1, along the row's cut dimension, of its Hugging Face tensor number `tensor`.

    source_start, target_start: where they begin along that dimension in the trainer's shard and in the engine's (of an
    expert: in its part of the engine's parameter)
    """

    tensor: int
    start: int
    stop: int
    source_start: int
    target_start: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """What rank `target` takes of one parameter from rank `source`; where they are the same, nothing travels."""

    source: int
    target: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, kw_only=True)
class Step:
    """Everything that moves of one parameter, in order of target and source.

    copy: a tied output embedding, of which sources on its own stage take their shard
    """

    parameter: Parameter
    copy: Parameter | None
    moves: tuple[Move, ...]

    def elements(self, move: Move) -> int:
        """How many numbers a move carries."""
        return num_elements(self.parameter.row, move.pieces)


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Elements by rank: received from other ranks, sent to them, and taken from the rank's own shard."""

    received: tuple[int, ...]
    sent: tuple[int, ...]
    local: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A push of `model` from trainer ranks laid out as `layout` to engines of `engine_ranks` ranks each.

    whole_experts: the engines have vLLM's expert parallelism: a rank holds some experts, not a part of each
    Expects what model_config.layout_problems accepts.
    """

    model: ModelConfig
    layout: Layout
    engine_ranks: int
    whole_experts: bool = False

    def engine_name(self, parameter: Parameter) -> tuple[str, int | None]:
        """See engine_layout.engine_name; the index is that on the rank that holds the expert."""
        name, expert = engine_name(parameter)
        return (name, expert) if expert is None or not self.whole_experts else (name, self._place(expert)[1])

    def _place(self, expert: int) -> tuple[int, int]:
        assert self.model.experts is not None
        return expert_place(expert, count=self.model.experts.count, num_ranks=self.engine_ranks)

    def _needed(self, parameter: Parameter, shard: int, target: int) -> tuple[Piece, ...]:
        """What rank `target` needs of a trainer's shard."""
        num_shards, engine_rank = parameter.row.num_shards(self.layout), target % self.engine_ranks
        expert = engine_name(parameter)[1]
        if expert is None or not self.whole_experts:
            return overlap(parameter.row, shard, num_shards, engine_rank, self.engine_ranks)
        return overlap(parameter.row, shard, num_shards, 0, 1) if self._place(expert)[0] == engine_rank else ()

    def steps(self) -> Iterator[Step]:
        """In the order of export, the same on every rank. Of several holders the one that sent least is the source."""
        assert self.layout.world_size % self.engine_ranks == 0, "layout_problems() refuses it"
        everything = list(parameters(self.model, self.layout))
        # Without a pipeline Megatron keeps one embedding for both ends.
        copies = [p for p in everything if p.row.tied and self.layout.pipeline > 1]
        sent = [0] * self.layout.world_size
        for parameter in everything:
            if not parameter.row.tied:
                copy = next((each for each in copies if each.hugging_face == parameter.hugging_face), None)
                yield self._step(parameter, copy, sent)

    def totals(self) -> Totals:
        received, sent, local = ([0] * self.layout.world_size for _ in range(3))
        for step in self.steps():
            for move in step.moves:
                elements = step.elements(move)
                if move.source == move.target:
                    local[move.target] += elements
                else:
                    received[move.target] += elements
                    sent[move.source] += elements
        return Totals(received=tuple(received), sent=tuple(sent), local=tuple(local))

    def _step(self, parameter: Parameter, copy: Parameter | None, sent: list[int]) -> Step:
        row = parameter.row
        shards = range(row.num_different(self.layout))
        places = [parameter] if copy is None else [parameter, copy]
        holders = [[rank for place in places for rank in _holders(place, self.layout, shard)] for shard in shards]
        owners = [set(ranks) for ranks in holders]
        step = Step(parameter=parameter, copy=copy, moves=())
        moves = []
        for target, shard in product(range(self.layout.world_size), shards):
            pieces = self._needed(parameter, shard, target)
            if pieces:
                local = target in owners[shard]
                source = target if local else min(holders[shard], key=lambda rank: (sent[rank], rank))
                moves.append(Move(source=source, target=target, pieces=pieces))
                sent[source] += 0 if local else step.elements(moves[-1])
        moves.sort(key=lambda move: (move.target, move.source))
        return Step(parameter=parameter, copy=copy, moves=tuple(moves))


def _holders(parameter: Parameter, layout: Layout, shard: int) -> range:
    """The ranks that hold a shard. Megatron numbers ranks by tensor, context, data, and last by pipeline stage.

    Where experts are divided, it numbers the ranks of a stage by expert rank first.
    """
    stage_ranks = layout.world_size // layout.pipeline
    first, stop = parameter.stage * stage_ranks, (parameter.stage + 1) * stage_ranks
    if parameter.expert_rank is not None:
        return range(first + parameter.expert_rank, stop, layout.expert)
    if parameter.row.split is Split.REPLICATED:
        return range(first, stop)
    return range(first + shard, stop, layout.tensor)


def num_elements(row: ParamMapping, pieces: Sequence[Piece]) -> int:
    """How many numbers there are in pieces of a parameter."""
    return prod(cut_shape(row, sum(map(len, pieces))))


@cache
def overlap(row: ParamMapping, shard: int, num_shards: int, engine_rank: int, engine_ranks: int) -> tuple[Piece, ...]:
    """What an engine rank needs of a trainer's shard, in the order in which the engine rank has it."""
    held = list(placed(slices(row, rank=shard, num_ranks=num_shards)))
    needed = placed(engine_slices(row, rank=engine_rank, num_ranks=engine_ranks))
    found = []
    for (want, target), (have, source) in product(needed, held):
        start, stop = max(want.start, have.start), min(want.stop, have.stop)
        if want.tensor == have.tensor and start < stop:
            found.append(
                Piece(
                    tensor=want.tensor,
                    start=start,
                    stop=stop,
                    source_start=source + start - have.start,
                    target_start=target + start - want.start,
                )
            )
    return tuple(found)
