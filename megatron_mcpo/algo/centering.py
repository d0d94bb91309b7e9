"""Compare rollouts of a prompt with each other before those of different prompts: representations less their mean.

Ours, beyond the paper (arXiv 2605.25443). Shape legend: see megatron_mcpo.types.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_mcpo.algo.contrastive import Contrast, contrastive
from megatron_mcpo.algo.groups import group_sums
from megatron_mcpo.config.schema import ContrastiveConfig
from megatron_mcpo.types import RolloutLabels


def centered(head_MD: Tensor, prompt_M: Tensor) -> Tensor:
    """Return (y_i - mean over the prompt's rollouts of y), scaled to length 1: [M, D], differentiable.

    head_MD: y, the head's output for all rollouts of the step; prompt_M: int64, the prompt of each
    """
    counts_M = group_sums(torch.ones_like(prompt_M), prompt_M)
    return F.normalize(head_MD - group_sums(head_MD, prompt_M) / counts_M[:, None], dim=-1)


def contrast(head_MD: Tensor, labels: RolloutLabels, settings: ContrastiveConfig) -> tuple[Tensor, Contrast]:
    """Return the representations [M, D] of the pairs, and the terms with the gradient on the head's output.

    A rollout's gradient includes what its prompt's other rollouts, on whichever rank, owe to their common mean.

    head_MD: the head's output for all rollouts, without gradient
    """
    if settings.center == "off":
        return head_MD, contrastive(head_MD, labels, settings)
    with torch.enable_grad():
        head_MD = head_MD.detach().requires_grad_()
        z_MD = centered(head_MD, labels.prompt_M)
    found = contrastive(z_MD.detach(), labels, settings)
    (grad_MD,) = torch.autograd.grad(z_MD, head_MD, found.grad_z_MD)
    return z_MD.detach(), replace(found, grad_z_MD=grad_MD)
