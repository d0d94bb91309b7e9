"""The two contrastive terms over all rollouts of a step, and their gradient. Shape legend: types.py; A anchors.

Evaluated on gathered representations, identically on every data-parallel rank: each takes its own rows of the gradient
and carries them into its backward passes (surrogate.py). So no collective needs a gradient.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_mcpo.algo.pairing import find_pairs
from megatron_mcpo.types import Keys


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """The contrastive terms of one step.

    loss_share, loss_consolidate: means over each term's valid anchors, without their weights; 0 where there is none
    grad_z_MD: gradient of share_weight * loss_share + consolidate_weight * loss_consolidate, in the dtype of z
    anchors_share, anchors_consolidate: number of valid anchors (those with a positive, given a negative exists)
    positives_share_M, positives_consolidate_M: int64, |C(i)| and |S(i)|
    share_MM: bool, row i holds the cross-domain positives of rollout i
    """

    loss_share: float
    loss_consolidate: float
    grad_z_MD: Tensor
    anchors_share: int
    anchors_consolidate: int
    positives_share_M: Tensor
    positives_consolidate_M: Tensor
    share_MM: Tensor


def contrastive(
    z_MD: Tensor,
    keys: Keys,
    *,
    share_weight: float,
    consolidate_weight: float,
    temperature: float,
    top_k: int,
) -> Contrast:
    """Both terms of MCPO (arXiv 2605.25443) on the representations of ALL rollouts of the step.

    z_MD: unit rows, fp32; a graph behind it is ignored. The gradient is that with respect to z itself: projecting out
    its radial part is the business of the head's own backward pass.
    """
    pairs = find_pairs(z_MD, keys, top_k=top_k)
    with torch.enable_grad():
        z_MD = z_MD.detach().requires_grad_()
        logits_MM = z_MD @ z_MD.T / temperature
        share, anchors_share = info_nce(logits_MM, pairs.share_MM, pairs.negatives_M)
        consolidate, anchors_consolidate = info_nce(logits_MM, pairs.consolidate_MM, pairs.negatives_M)
        total = share_weight * share + consolidate_weight * consolidate
        (grad_z_MD,) = torch.autograd.grad(total, z_MD)
    return Contrast(
        loss_share=share.item(),
        loss_consolidate=consolidate.item(),
        grad_z_MD=grad_z_MD,
        anchors_share=anchors_share,
        anchors_consolidate=anchors_consolidate,
        positives_share_M=pairs.share_MM.sum(dim=1),
        positives_consolidate_M=pairs.consolidate_MM.sum(dim=1),
        share_MM=pairs.share_MM,
    )


def info_nce(logits_MM: Tensor, positives_MM: Tensor, negatives_M: Tensor) -> tuple[Tensor, int]:
    """Mean over valid anchors i of the mean over positives j of -log(e^s_ij / (e^s_ij + sum_n e^s_in)); their number.

    Each positive stands alone against the negatives, so a pair costs softplus(logsumexp_n s_in - s_ij): nothing is
    exponentiated that could overflow. An anchor is valid if it has a positive and the pool has a negative; without
    any the result is a zero that is connected to `logits_MM`.
    """
    valid_M = positives_MM.any(dim=1) & negatives_M.any()
    positives_AM = positives_MM[valid_M]
    logits_AM = logits_MM[valid_M]
    against_A1 = logits_AM[:, negatives_M].logsumexp(dim=1, keepdim=True)
    cost_AM = -logsigmoid(logits_AM - against_A1)
    loss_A = torch.where(positives_AM, cost_AM, 0.0).sum(dim=1) / positives_AM.sum(dim=1)
    num_anchors = len(loss_A)
    return loss_A.sum() / max(num_anchors, 1), num_anchors
