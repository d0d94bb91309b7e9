"""Group-relative advantages. Shape legend: types.py."""

from typing import Literal

import torch
from torch import Tensor

from megatron_mcpo.algo.groups import group_sums

_STD_EPSILON = 1e-6


def group_advantages(
    rewards_PG: Tensor, domain_P: Tensor, *, kind: Literal["grpo", "dr_grpo", "rloo", "per_domain"] = "grpo"
) -> Tensor:
    """Advantages within each prompt's group of G > 1 rewards; returns [P, G] of the same dtype.

    grpo: (r - mean) / (std + 1e-6). DeepSeekMath (arXiv 2402.03300, section 4.1) doesn't say which standard deviation
        it means. This is the sample one (divisor G - 1), as in TRL and verl, so that learning rates carry over.
    dr_grpo: r - mean (arXiv 2503.20783: the division favours prompts that are nearly mastered or nearly hopeless).
    rloo: r - mean of the group's OTHER rewards (arXiv 2402.14740), which is (r - mean) G / (G - 1).
    per_domain: (r - mean), divided by its root mean square over all rollouts of the domain, so that a domain of
        continuous rewards counts like one of binary ones.

    domain_P: int64, the domain of each prompt; only per_domain reads it
    A group of equal rewards gets exactly 0: in floating point its mean may miss the common value by a rounding
    error, and dividing that by 1e-6 would make a spurious advantage of it.
    """
    assert rewards_PG.ndim == 2 and rewards_PG.shape[1] > 1, rewards_PG.shape
    num_samples = rewards_PG.shape[1]
    centred_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    centred_PG = torch.where(signal(rewards_PG)[:, None], centred_PG, torch.zeros_like(centred_PG))
    match kind:
        case "grpo":
            return centred_PG / (rewards_PG.std(dim=1, keepdim=True, correction=1) + _STD_EPSILON)
        case "dr_grpo":
            return centred_PG
        case "rloo":
            return centred_PG * (num_samples / (num_samples - 1))
        case "per_domain":
            return centred_PG / (_domain_deviation(centred_PG, domain_P)[:, None] + _STD_EPSILON)


def signal(rewards_PG: Tensor) -> Tensor:
    """Which groups have mixed outcomes, hence advantages other than 0: bool [P]."""
    return (rewards_PG != rewards_PG[:, :1]).any(dim=1)


def _domain_deviation(centred_PG: Tensor, domain_P: Tensor) -> Tensor:
    """Root mean square of the centred rewards of each prompt's domain: [P]."""
    assert domain_P.shape == centred_PG.shape[:1], (domain_P.shape, centred_PG.shape)
    squares_P = centred_PG.square().mean(dim=1)
    return (group_sums(squares_P, domain_P) / group_sums(torch.ones_like(squares_P), domain_P)).sqrt()
