"""Exchange rollouts between the ranks that sampled them and those that learn from them, in two phases.

First every rank is told of every rollout what decides about the step: length, reward, correctness. Tokens, log-probs
and texts stay with the rank that has them (RolloutGroup.holder). When the step is divided over the data-parallel ranks,
each gets the tokens and log-probs of its own share, as numbers of 32 bits, and the experts that the engine chose, where
they are replayed, as numbers of 8 bits (16, if a layer has more than 256). Shape legend: see megatron_mcpo.types.
"""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mcpo.data.batch import Division, assemble, contents, divide
from megatron_mcpo.data.routing import Routing
from megatron_mcpo.distributed.parallel import Groups
from megatron_mcpo.distributed.peers import Peers, gather_lists, gather_objects, gather_on_first
from megatron_mcpo.trainer.jobs import Key
from megatron_mcpo.types import Completion, Prompt, RolloutGroup, TrainBatch


def tell(made: Mapping[Key, RolloutGroup], prompts: Mapping[Key, Prompt], peers: Peers) -> dict[Key, RolloutGroup]:
    """Tell all ranks of the groups that each has made; return all groups. Collective.

    Those of other ranks have outlines instead of completions.

    Args:
        made: the groups of this rank.
        prompts: of all groups; every rank has them.
    """
    known = gather_lists([(key, told(group, peers.rank)) for key, group in made.items()], peers)
    groups = {key: RolloutGroup(prompt=prompts[key], **fields) for key, fields in known}
    return groups | {key: _kept(group, peers.rank) for key, group in made.items()}


def told(group: RolloutGroup, rank: int) -> dict[str, Any]:
    """Return what the other ranks are told of a group that `rank` has made: the fields of a RolloutGroup."""
    return {
        "told": group.outlines,
        "holder": rank,
        "rewards": group.rewards,
        "correct": group.correct,
        "error": group.error,
        "timed_out": group.timed_out,
    }


def rank_batch(
    groups: Sequence[RolloutGroup], ranks: Groups, *, share_prompts: bool, routing: Routing | None
) -> TrainBatch:
    """Return this rank's share of one optimizer step over these groups. Collective over all ranks.

    routing: the model's, where the completions have experts that the trainer replays
    """
    division = divide(groups, num_data_ranks=ranks.layout.data, share_prompts=share_prompts)
    exchange = _Exchange(groups, division, ranks)
    response_R, logp_R = exchange.contents()
    return assemble(
        groups,
        division,
        data_rank=ranks.data_rank,
        response_R=response_R,
        engine_logp_R=logp_R,
        experts_N=exchange.experts(routing) if routing else None,
    )


def texts_on_first(groups: Sequence[RolloutGroup], peers: Peers) -> list[list[str]]:
    """Return the texts of each group's completions on rank 0, and nothing on the others. Collective."""
    mine = {
        number: [completion.text for completion in group.completions]
        for number, group in enumerate(groups)
        if group.holder == peers.rank
    }
    found = {number: texts for part in gather_on_first(mine, peers) for number, texts in part.items()}
    return [found[number] for number in sorted(found)]


def _kept(group: RolloutGroup, rank: int) -> RolloutGroup:
    """Return a group of this rank, with its numbers in a sixth of the memory of Python's own."""
    completions = tuple(
        replace(
            completion,
            token_ids=array("i", completion.token_ids),
            logprobs=array("f", completion.logprobs),
            versions=array("i", completion.versions),
        )
        for completion in group.completions
    )
    return replace(group, completions=completions, told=group.outlines, holder=rank)


class _Exchange:
    """Send each rank the share that it learns from, of what this one has.

    A message is made of rows of the batch in ascending order, and every rank knows the size of each.
    """

    def __init__(self, groups: Sequence[RolloutGroup], division: Division, ranks: Groups):
        """Find out who has what and who needs it. Collective."""
        self._ranks = ranks
        self._division = division
        holder_M = [group.holder for group in groups for _ in group.outlines]
        mine = _completions(groups, ranks.rank)
        shares = [division.rank_rows[data_rank] for data_rank in gather_objects(ranks.data_rank, ranks)]
        self._sent = [[mine[row] for row in share if row in mine] for share in shares]
        self._my_rows = division.rank_rows[ranks.data_rank]
        self._rows_from = [[row for row in self._my_rows if holder_M[row] == rank] for rank in range(ranks.world_size)]

    def contents(self) -> tuple[Tensor, Tensor]:
        """Return tokens and log-probs of this rank's share. A message is the tokens, then as many log-probs."""
        lengths_from = [[self._division.response_lens_M[row] for row in rows] for rows in self._rows_from]
        messages = [_message(completions) for completions in self._sent]
        parts = self._send(messages, [2 * sum(lengths) for lengths in lengths_from], torch.int32)
        tokens: dict[int, Tensor] = {}
        logprobs: dict[int, Tensor] = {}
        for part, rows, lengths in zip(parts, self._rows_from, lengths_from, strict=True):
            tokens_R, logp_R = part.chunk(2) if len(part) else (part, part)
            tokens |= zip(rows, tokens_R.split(lengths), strict=True)
            logprobs |= zip(rows, logp_R.view(torch.float32).split(lengths), strict=True)
        return _joined(tokens, self._my_rows, torch.int32), _joined(logprobs, self._my_rows, torch.float32)

    def experts(self, routing: Routing) -> list[Tensor]:
        """Return the experts of each rollout of this rank's share, as a Completion has them."""
        division = self._division
        num_tokens_M = [p + r - 1 for p, r in zip(division.prompt_lens_M, division.response_lens_M, strict=True)]
        of_token = (routing.num_layers, routing.per_token)
        messages = [_experts_message(completions) for completions in self._sent]
        lengths_from = [[num_tokens_M[row] for row in rows] for rows in self._rows_from]
        num_bytes = prod(of_token) * routing.dtype.itemsize
        parts = self._send(messages, [sum(lengths) * num_bytes for lengths in lengths_from], torch.uint8)
        by_row: dict[int, Tensor] = {}
        for part, rows, lengths in zip(parts, self._rows_from, lengths_from, strict=True):
            by_row |= zip(rows, part.view(routing.dtype).view(-1, *of_token).split(lengths), strict=True)
        return [by_row[row] for row in self._my_rows]

    def _send(self, messages: Sequence[Tensor], sizes: list[int], dtype: torch.dtype) -> Sequence[Tensor]:
        """Send a message to every rank; return the one from each, of known size. Collective."""
        received = torch.empty(sum(sizes), dtype=dtype)
        dist.all_to_all_single(
            received, torch.cat(list(messages)), sizes, [len(message) for message in messages], group=self._ranks.host
        )
        return received.split(sizes)


def _completions(groups: Sequence[RolloutGroup], rank: int) -> dict[int, Completion]:
    """Return those completions that a rank has, by row."""
    found: dict[int, Completion] = {}
    row = 0
    for group in groups:
        if group.holder == rank:
            found |= enumerate(group.completions, start=row)
        row += len(group.outlines)
    return found


def _message(completions: Sequence[Completion]) -> Tensor:
    tokens_R, logp_R = contents(completions)
    return torch.cat([tokens_R, logp_R.view(torch.int32)])


def _experts_message(completions: Sequence[Completion]) -> Tensor:
    """Return the experts of some completions as bytes: gloo (torch 2.11) knows no integers of 16 bits."""
    flat = [completion.experts.flatten() for completion in completions if completion.experts is not None]
    assert len(flat) == len(completions), "the engine was not asked for experts"
    return torch.cat(flat).view(torch.uint8) if flat else torch.zeros(0, dtype=torch.uint8)


def _joined(by_row: Mapping[int, Tensor], rows: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.cat([by_row[row] for row in rows]) if rows else torch.zeros(0, dtype=dtype)
