"""Build each data-parallel rank's share of a batch from scored groups.

Every rank knows the outlines of all rollouts and divides them by the same rule, without communication; then it needs
the tokens and log-probs of its own share alone.
Shape legend: see megatron_mcpo.types.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_mcpo.types import Completion, RolloutGroup, RolloutLabels, TrainBatch


@dataclass(frozen=True, kw_only=True)
class Division:
    """Say which data-parallel rank gets which rollouts of a batch; the fields are those of a TrainBatch."""

    labels: RolloutLabels
    prompt_lens_M: tuple[int, ...]
    response_lens_M: tuple[int, ...]
    rank_rows: tuple[tuple[int, ...], ...]
    shared_prompts: bool


def partition(lengths: Sequence[int], *, num_parts: int) -> list[list[int]]:
    """Deal items into `num_parts` parts of nearly equal total length (longest first, to the lightest part).

    Every part is in ascending order. The result depends on the arguments alone, so every rank finds the same one.
    """
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    loads = [0] * num_parts
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        lightest = min(range(num_parts), key=lambda p: (loads[p], p))
        parts[lightest].append(item)
        loads[lightest] += lengths[item]
    return [sorted(part) for part in parts]


def minibatches(groups: Sequence[RolloutGroup], count: int) -> list[list[RolloutGroup]]:
    """Return the groups of each of at most `count` optimizer steps, without those whose verifier failed.

    Every domain is spread over all of them: the cross-domain term needs two domains in a step.
    """
    usable = [group for group in groups if group.error is None]
    by_domain = sorted(range(len(usable)), key=lambda place: usable[place].prompt.domain)
    parts = [sorted(by_domain[number::count]) for number in range(count)]
    return [[usable[place] for place in part] for part in parts if part]


def divide(groups: Sequence[RolloutGroup], *, num_data_ranks: int, share_prompts: bool) -> Division:
    """Divide the rollouts of one optimizer step, ordered by group, then sample, over the data-parallel ranks.

    Where prompts are shared, a group stays on one rank; otherwise rollouts are dealt out one by one, which balances
    better. Groups may differ in size.
    """
    prompt_lens = tuple(len(group.prompt.token_ids) for group in groups for _ in group.outlines)
    response_lens = tuple(outline.num_tokens for group in groups for outline in group.outlines)
    labels = _labels(groups)
    if share_prompts:
        units = [list(rows) for _, rows in groupby(range(len(labels)), key=labels.prompt_M.tolist().__getitem__)]
    else:
        units = [[row] for row in range(len(labels))]
    costs = [prompt_lens[rows[0]] + sum(response_lens[row] for row in rows) for rows in units]
    rank_rows = tuple(
        tuple(row for unit in part for row in units[unit]) for part in partition(costs, num_parts=num_data_ranks)
    )
    return Division(
        labels=labels,
        prompt_lens_M=prompt_lens,
        response_lens_M=response_lens,
        rank_rows=rank_rows,
        shared_prompts=share_prompts,
    )


def contents(completions: Sequence[Completion]) -> tuple[Tensor, Tensor]:
    """Return tokens [R], int32, and the engine's log-probs [R], fp32, of some completions."""
    tokens, logprobs = array("i"), array("f")
    for completion in completions:
        tokens.extend(completion.token_ids)
        logprobs.extend(completion.logprobs)
    if not tokens:  # torch makes no tensor of an empty buffer
        return torch.zeros(0, dtype=torch.int32), torch.zeros(0)
    return torch.frombuffer(tokens, dtype=torch.int32), torch.frombuffer(logprobs, dtype=torch.float32)


def assemble(
    groups: Sequence[RolloutGroup],
    division: Division,
    *,
    data_rank: int,
    response_R: Tensor,
    engine_logp_R: Tensor,
    experts_N: Sequence[Tensor] | None,
) -> TrainBatch:
    """Return the share of `data_rank`.

    response_R, engine_logp_R: the response tokens of its rollouts and the engine's log-probs of them
    experts_N: of each of its rollouts, as a Completion has them; None: they are not replayed
    """
    rows = division.rank_rows[data_rank]
    response_lens_N = torch.tensor([division.response_lens_M[row] for row in rows], dtype=torch.int64)
    prompts = [torch.tensor(group.prompt.token_ids, dtype=torch.int64) for group in groups]
    responses = response_R.long().split(response_lens_N.tolist())
    prompt_N = division.labels.prompt_M[list(rows)].tolist()
    pairs = [(prompts[prompt], response) for prompt, response in zip(prompt_N, responses, strict=True)]
    pieces = [piece for pair in pairs for piece in pair]
    batch = TrainBatch(
        tokens_T=torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64),
        prompt_lens_N=torch.tensor([division.prompt_lens_M[row] for row in rows], dtype=torch.int64),
        response_lens_N=response_lens_N,
        rows_N=torch.tensor(rows, dtype=torch.int64),
        engine_logp_R=engine_logp_R,
        labels=division.labels,
        num_response_tokens=sum(division.response_lens_M),
        prompt_lens_M=division.prompt_lens_M,
        response_lens_M=division.response_lens_M,
        rank_rows=division.rank_rows,
        shared_prompts=division.shared_prompts,
        experts_TXK=_experts(experts_N) if experts_N else None,
    )
    batch.check()
    return batch


def make_batch(
    groups: Sequence[RolloutGroup], *, num_data_ranks: int, data_rank: int, share_prompts: bool
) -> TrainBatch:
    """Return the share of `data_rank` in groups whose completions are all on this rank."""
    division = divide(groups, num_data_ranks=num_data_ranks, share_prompts=share_prompts)
    completions = [completion for group in groups for completion in group.completions]
    mine = [completions[row] for row in division.rank_rows[data_rank]]
    response_R, logp_R = contents(mine)
    experts = [completion.experts for completion in mine if completion.experts is not None]
    return assemble(
        groups,
        division,
        data_rank=data_rank,
        response_R=response_R,
        engine_logp_R=logp_R,
        experts_N=experts if len(experts) == len(mine) else None,
    )


def rewards_of(groups: Sequence[RolloutGroup]) -> Tensor:
    """Return the rewards [M] of scored groups, ordered by group, then sample."""
    return torch.tensor([reward for group in groups for reward in group.rewards], dtype=torch.float32)


def _experts(experts_N: Sequence[Tensor]) -> Tensor:
    """Return the experts of all tokens, int16, -1 for the last token of each rollout."""
    return torch.cat([F.pad(experts_txk.short(), (0, 0, 0, 0, 0, 1), value=-1) for experts_txk in experts_N])


def _labels(groups: Sequence[RolloutGroup]) -> RolloutLabels:
    return RolloutLabels(
        domain_M=torch.tensor([group.prompt.domain for group in groups for _ in group.outlines]),
        prompt_M=torch.tensor([number for number, group in enumerate(groups) for _ in group.outlines]),
        correct_M=torch.tensor([correct for group in groups for correct in group.correct]),
    )
