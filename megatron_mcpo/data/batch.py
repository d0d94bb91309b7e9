"""Build each data-parallel rank's share of a batch from scored groups.

Every rank sees all groups of a step and divides them by the same rule, without communication.
Shape legend: see megatron_mcpo.types.
"""

from collections.abc import Iterable, Sequence
from itertools import chain, groupby

import torch
from torch import Tensor

from megatron_mcpo.types import Completion, RolloutGroup, RolloutLabels, TrainBatch


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


def make_batch(
    groups: Sequence[RolloutGroup],
    *,
    num_data_ranks: int,
    data_rank: int,
    share_prompts: bool,
) -> TrainBatch:
    """Return the share of `data_rank` in one optimizer step over these groups (rollouts ordered by group, then sample).

    Where prompts are shared, a group stays on one rank; otherwise rollouts are dealt out one by one, which balances
    better. Groups may differ in size.
    """
    rollouts = [(group, completion) for group in groups for completion in group.completions]
    prompt_lens = tuple(len(group.prompt.token_ids) for group, _ in rollouts)
    response_lens = tuple(len(completion.token_ids) for _, completion in rollouts)
    labels = _labels(groups)
    if share_prompts:
        units = [list(rows) for _, rows in groupby(range(len(rollouts)), key=labels.prompt_M.tolist().__getitem__)]
    else:
        units = [[row] for row in range(len(rollouts))]
    costs = [prompt_lens[rows[0]] + sum(response_lens[row] for row in rows) for rows in units]
    rank_rows = tuple(
        tuple(row for unit in part for row in units[unit]) for part in partition(costs, num_parts=num_data_ranks)
    )
    mine = [rollouts[row] for row in rank_rows[data_rank]]
    rows_N = torch.tensor(rank_rows[data_rank], dtype=torch.int64)
    batch = TrainBatch(
        tokens_T=_concatenate(group.prompt.token_ids + completion.token_ids for group, completion in mine),
        prompt_lens_N=torch.tensor([prompt_lens[row] for row in rank_rows[data_rank]], dtype=torch.int64),
        response_lens_N=torch.tensor([response_lens[row] for row in rank_rows[data_rank]], dtype=torch.int64),
        rows_N=rows_N,
        engine_logp_R=_engine_logprobs([completion for _, completion in mine]),
        labels=labels,
        num_response_tokens=sum(response_lens),
        prompt_lens_M=prompt_lens,
        response_lens_M=response_lens,
        rank_rows=rank_rows,
        shared_prompts=share_prompts,
    )
    batch.check()
    return batch


def rewards_of(groups: Sequence[RolloutGroup]) -> Tensor:
    """Return the rewards [M] of scored groups, ordered by group, then sample."""
    return torch.tensor([reward for group in groups for reward in group.rewards], dtype=torch.float32)


def _labels(groups: Sequence[RolloutGroup]) -> RolloutLabels:
    return RolloutLabels(
        domain_M=torch.tensor([group.prompt.domain for group in groups for _ in group.completions]),
        prompt_M=torch.tensor([number for number, group in enumerate(groups) for _ in group.completions]),
        correct_M=torch.tensor([correct for group in groups for correct in group.correct]),
    )


def _concatenate(sequences: Iterable[Sequence[int]]) -> Tensor:
    return torch.tensor(list(chain.from_iterable(sequences)), dtype=torch.int64)


def _engine_logprobs(completions: Sequence[Completion]) -> Tensor:
    return torch.tensor([logp for completion in completions for logp in completion.logprobs], dtype=torch.float32)
