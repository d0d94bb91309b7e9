"""Group-relative advantages. Shape legend: types.py."""

from typing import Literal

import torch
from torch import Tensor

from megatron_mcpo.algo.groups import group_sums

_STD_EPSILON = 1e-6


def group_advantages(
    rewards_M: Tensor,
    prompt_M: Tensor,
    domain_M: Tensor,
    *,
    kind: Literal["grpo", "dr_grpo", "rloo", "per_domain"] = "grpo",
) -> Tensor:
    """Advantages within each prompt's group of G > 1 rewards; returns [M] of the same dtype.

    grpo: (r - mean) / (std + 1e-6). DeepSeekMath (arXiv 2402.03300, section 4.1) doesn't say which standard deviation
        it means. This is the sample one (divisor G - 1), as in TRL and verl, so that learning rates carry over.
    dr_grpo: r - mean (arXiv 2503.20783: the division favours prompts that are nearly mastered or nearly hopeless).
    rloo: r - mean of the group's OTHER rewards (arXiv 2402.14740), which is (r - mean) G / (G - 1).
    per_domain: (r - mean), divided by its root mean square over all rollouts of the domain, so that a domain of
        continuous rewards counts like one of binary ones.

    prompt_M, domain_M: int64, of each rollout; groups may differ in size; only per_domain reads the domains
    A group of equal rewards gets exactly 0: in floating point its mean may miss the common value by a rounding
    error, and dividing that by 1e-6 would make a spurious advantage of it.
    """
    assert rewards_M.shape == prompt_M.shape == domain_M.shape, (rewards_M.shape, prompt_M.shape, domain_M.shape)
    ones_M = torch.ones_like(rewards_M)
    size_M = group_sums(ones_M, prompt_M)
    assert bool((size_M > 1).all()), "a group of one has no mean to be compared with"
    centred_M = rewards_M - group_sums(rewards_M, prompt_M) / size_M
    centred_M = centred_M.where(signal(rewards_M, prompt_M), 0.0)
    squares_M = centred_M.square()
    match kind:
        case "grpo":
            return centred_M / ((group_sums(squares_M, prompt_M) / (size_M - 1)).sqrt() + _STD_EPSILON)
        case "dr_grpo":
            return centred_M
        case "rloo":
            return centred_M * (size_M / (size_M - 1))
        case "per_domain":
            deviation_M = (group_sums(squares_M, domain_M) / group_sums(ones_M, domain_M)).sqrt()
            return centred_M / (deviation_M + _STD_EPSILON)


def signal(rewards_M: Tensor, prompt_M: Tensor) -> Tensor:
    """Whose group has mixed outcomes, hence advantages other than 0: bool [M]."""
    _, number_M = torch.unique(prompt_M, return_inverse=True)
    low_M, high_M = (
        rewards_M.scatter_reduce(0, number_M, rewards_M, reduce, include_self=False)[number_M]
        for reduce in ("amin", "amax")
    )
    return low_M != high_M
