"""Compute group-relative advantages. Shape legend: types.py.

To add an estimator, add its name to AdvantageKind (config/schema.py), and a function with that name to ESTIMATORS.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from megatron_mcpo.algo.groups import group_sums
from megatron_mcpo.config.schema import AdvantageKind

_STD_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class CentredRewards:
    """Rewards minus the mean of their prompt's group; exactly 0 in a group of equal rewards.

    size_M: number of rollouts in each rollout's group; prompt_M, domain_M: int64, of each rollout
    """

    centred_M: Tensor
    size_M: Tensor
    prompt_M: Tensor
    domain_M: Tensor


def grpo(rewards: CentredRewards) -> Tensor:
    """Return (r - mean) / (std + 1e-6).

    DeepSeekMath (arXiv 2402.03300, section 4.1) doesn't say which standard deviation it means. This is the sample one
    (divisor G - 1), as in TRL and verl, so that learning rates carry over.
    """
    squares_M = group_sums(rewards.centred_M.square(), rewards.prompt_M)
    return rewards.centred_M / ((squares_M / (rewards.size_M - 1)).sqrt() + _STD_EPSILON)


def dr_grpo(rewards: CentredRewards) -> Tensor:
    """Return r - mean (arXiv 2503.20783: the division favours prompts that are nearly mastered or nearly hopeless)."""
    return rewards.centred_M


def rloo(rewards: CentredRewards) -> Tensor:
    """Return r - mean of the group's OTHER rewards (arXiv 2402.14740), which is (r - mean) G / (G - 1)."""
    return rewards.centred_M * (rewards.size_M / (rewards.size_M - 1))


def per_domain(rewards: CentredRewards) -> Tensor:
    """Return (r - mean), divided by its root mean square over all rollouts of the domain.

    So a domain of continuous rewards counts like one of binary ones.
    """
    squares_M = group_sums(rewards.centred_M.square(), rewards.domain_M)
    count_M = group_sums(torch.ones_like(rewards.centred_M), rewards.domain_M)
    return rewards.centred_M / ((squares_M / count_M).sqrt() + _STD_EPSILON)


ESTIMATORS: dict[AdvantageKind, Callable[[CentredRewards], Tensor]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "per_domain": per_domain,
}
assert tuple(ESTIMATORS) == get_args(AdvantageKind), "config/schema.py must offer exactly these"


def group_advantages(rewards_M: Tensor, prompt_M: Tensor, domain_M: Tensor, *, kind: AdvantageKind = "grpo") -> Tensor:
    """Return the advantages [M], in the rewards' dtype, within each prompt's group of G > 1 rewards.

    A group of equal rewards gets exactly 0: in floating point its mean may miss the common value by a rounding
    error, and dividing that by 1e-6 would make a spurious advantage of it.

    Args:
        rewards_M: of each rollout.
        prompt_M: int64, the prompt of each rollout; groups may differ in size.
        domain_M: int64, the domain of each rollout.
        kind: one of ESTIMATORS.
    """
    assert rewards_M.shape == prompt_M.shape == domain_M.shape, (rewards_M.shape, prompt_M.shape, domain_M.shape)
    size_M = group_sums(torch.ones_like(rewards_M), prompt_M)
    assert bool((size_M > 1).all()), "a group of one has no mean to be compared with"
    centred_M = rewards_M - group_sums(rewards_M, prompt_M) / size_M
    centred_M = centred_M.where(has_nonzero_advantage(rewards_M, prompt_M), 0.0)
    return ESTIMATORS[kind](CentredRewards(centred_M=centred_M, size_M=size_M, prompt_M=prompt_M, domain_M=domain_M))


def has_nonzero_advantage(rewards_M: Tensor, prompt_M: Tensor) -> Tensor:
    """Return which rollouts belong to a group whose rewards differ, so that its advantages are not 0: bool [M]."""
    _, number_M = torch.unique(prompt_M, return_inverse=True)
    low_M, high_M = (
        rewards_M.scatter_reduce(0, number_M, rewards_M, reduce, include_self=False)[number_M]
        for reduce in ("amin", "amax")
    )
    return low_M != high_M
