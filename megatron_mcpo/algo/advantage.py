"""Group-relative advantages of GRPO. Shape legend: types.py."""

import torch
from torch import Tensor

_STD_EPSILON = 1e-6


def group_advantages(rewards_PG: Tensor) -> Tensor:
    """A_i = (r_i - mean) / (std + 1e-6) within each prompt's group of G > 1 rewards; returns [P, G] of the same dtype.

    DeepSeekMath (arXiv 2402.03300, section 4.1) doesn't say which standard deviation it means. This is the sample
    one (divisor G - 1), as in TRL and verl, so that learning rates carry over.

    A group of equal rewards gets exactly 0: in floating point its mean may miss the common value by a rounding
    error, and dividing that by 1e-6 would make a spurious advantage of it.
    """
    assert rewards_PG.ndim == 2 and rewards_PG.shape[1] > 1, rewards_PG.shape
    centred_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    scaled_PG = centred_PG / (rewards_PG.std(dim=1, keepdim=True, correction=1) + _STD_EPSILON)
    return torch.where(signal(rewards_PG)[:, None], scaled_PG, torch.zeros_like(scaled_PG))


def signal(rewards_PG: Tensor) -> Tensor:
    """Which groups have mixed outcomes, hence advantages other than 0: bool [P]."""
    return (rewards_PG != rewards_PG[:, :1]).any(dim=1)
