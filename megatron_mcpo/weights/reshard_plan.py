"""Plan a weight sync as pure data: which indices of which trainer rank's shard go where in which engine rank.

A trainer rank and the engine rank in the same process have the same number; `engine_ranks` neighbours form an engine.
An engine rank takes what its own process holds from there, and everything else once, from one of the ranks that hold
it, so that the fewest possible bytes travel.
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
from megatron_mcpo.weights.shards import TensorSlice, cut_shape, placed, shard_slices


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacedSlice(TensorSlice):
    """A slice with its places on both sides.

    source_start, target_start: where it begins along the cut dimension in the trainer's shard and in the engine's (of
    an expert: in its part of the engine's parameter)
    """

    source_start: int
    target_start: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """What rank `target` takes of one parameter from rank `source`; a message to the same rank does not travel."""

    source: int
    target: int
    slices: tuple[PlacedSlice, ...]


@dataclass(frozen=True, kw_only=True)
class Step:
    """All messages of one parameter, in order of target and source.

    copy: a tied output embedding, of which sources on its own stage take their shard
    """

    parameter: Parameter
    copy: Parameter | None
    messages: tuple[Message, ...]

    def elements(self, message: Message) -> int:
        """Return how many elements a message carries."""
        return num_elements(self.parameter.mapping, message.slices)


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Elements by rank: received from other ranks, sent to them, and taken from the rank's own shard."""

    received: tuple[int, ...]
    sent: tuple[int, ...]
    local: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class SyncPlan:
    """A weight sync of `model` from trainer ranks laid out as `layout` to engines of `engine_ranks` ranks each.

    whole_experts: the engines have vLLM's expert parallelism: a rank holds some experts, not a part of each
    Expects what config.model.layout_problems accepts.
    """

    model: ModelConfig
    layout: Layout
    engine_ranks: int
    whole_experts: bool = False

    def engine_name(self, parameter: Parameter) -> tuple[str, int | None]:
        """Return engine_layout.engine_name, with the index that the expert has on the rank that holds it."""
        name, expert = engine_name(parameter)
        return (name, expert) if expert is None or not self.whole_experts else (name, self._place(expert)[1])

    def _place(self, expert: int) -> tuple[int, int]:
        assert self.model.experts is not None
        return expert_place(expert, count=self.model.experts.count, num_ranks=self.engine_ranks)

    def _needed(self, parameter: Parameter, shard: int, target: int) -> tuple[PlacedSlice, ...]:
        """Return what rank `target` needs of a trainer's shard."""
        num_shards, engine_rank = parameter.mapping.num_shards(self.layout), target % self.engine_ranks
        expert = engine_name(parameter)[1]
        if expert is None or not self.whole_experts:
            return overlap(parameter.mapping, shard, num_shards, engine_rank, self.engine_ranks)
        return overlap(parameter.mapping, shard, num_shards, 0, 1) if self._place(expert)[0] == engine_rank else ()

    def steps(self) -> Iterator[Step]:
        """Yield a step per parameter in the order of export, the same on every rank.

        Of several holders the one that has sent least so far is the source.
        """
        assert self.layout.world_size % self.engine_ranks == 0, "layout_problems() refuses it"
        everything = list(parameters(self.model, self.layout))
        # Without a pipeline Megatron keeps one embedding for both ends.
        copies = [p for p in everything if p.mapping.tied and self.layout.pipeline > 1]
        sent = [0] * self.layout.world_size
        for parameter in everything:
            if not parameter.mapping.tied:
                copy = next((each for each in copies if each.hugging_face == parameter.hugging_face), None)
                yield self._step(parameter, copy, sent)

    def totals(self) -> Totals:
        """Return what every rank receives, sends and keeps in the whole sync."""
        received, sent, local = ([0] * self.layout.world_size for _ in range(3))
        for step in self.steps():
            for message in step.messages:
                elements = step.elements(message)
                if message.source == message.target:
                    local[message.target] += elements
                else:
                    received[message.target] += elements
                    sent[message.source] += elements
        return Totals(received=tuple(received), sent=tuple(sent), local=tuple(local))

    def _step(self, parameter: Parameter, copy: Parameter | None, sent: list[int]) -> Step:
        mapping = parameter.mapping
        shards = range(mapping.num_different(self.layout))
        places = [parameter] if copy is None else [parameter, copy]
        holders = [[rank for place in places for rank in _holders(place, self.layout, shard)] for shard in shards]
        owners = [set(ranks) for ranks in holders]
        step = Step(parameter=parameter, copy=copy, messages=())
        messages = []
        for target, shard in product(range(self.layout.world_size), shards):
            slices = self._needed(parameter, shard, target)
            if slices:
                local = target in owners[shard]
                source = target if local else min(holders[shard], key=lambda rank: (sent[rank], rank))
                messages.append(Message(source=source, target=target, slices=slices))
                sent[source] += 0 if local else step.elements(messages[-1])
        messages.sort(key=lambda message: (message.target, message.source))
        return Step(parameter=parameter, copy=copy, messages=tuple(messages))


def _holders(parameter: Parameter, layout: Layout, shard: int) -> range:
    """Return the ranks that hold a shard. Megatron numbers ranks by tensor, context, data, and last by pipeline stage.

    Where experts are divided, it numbers the ranks of a stage by expert rank first.
    """
    stage_ranks = layout.world_size // layout.pipeline
    first, stop = parameter.stage * stage_ranks, (parameter.stage + 1) * stage_ranks
    if parameter.expert_rank is not None:
        return range(first + parameter.expert_rank, stop, layout.expert)
    if parameter.mapping.split is Split.REPLICATED:
        return range(first, stop)
    return range(first + shard, stop, layout.tensor)


def num_elements(mapping: ParamMapping, slices: Sequence[TensorSlice]) -> int:
    """Return how many elements there are in slices of a parameter."""
    return prod(cut_shape(mapping, sum(map(len, slices))))


@cache
def overlap(
    mapping: ParamMapping, shard: int, num_shards: int, engine_rank: int, engine_ranks: int
) -> tuple[PlacedSlice, ...]:
    """Return what an engine rank needs of a trainer's shard, in the order in which the engine rank has it."""
    held = list(placed(shard_slices(mapping, rank=shard, num_ranks=num_shards)))
    needed = placed(engine_slices(mapping, rank=engine_rank, num_ranks=engine_ranks))
    found = []
    for (want, target), (have, source) in product(needed, held):
        start, stop = max(want.start, have.start), min(want.stop, have.stop)
        if want.tensor == have.tensor and start < stop:
            found.append(
                PlacedSlice(
                    tensor=want.tensor,
                    start=start,
                    stop=stop,
                    source_start=source + start - have.start,
                    target_start=target + start - want.start,
                )
            )
    return tuple(found)
