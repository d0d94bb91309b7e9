"""Rank correct against incorrect rollouts across domains: do representations tell them apart better than chance?

Shape legend: types.py; A: anchors of a tile, P: positives, Q: negatives.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mcpo.algo.contrastive import TILE_ELEMENTS
from megatron_mcpo.types import RolloutLabels


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Per anchor, the probability that a correct rollout of another domain is more similar than an incorrect rollout.

    All [M], fp32; 0.5 is the chance level; NaN where a rollout is incorrect or has no such pair. The incorrect rollouts
    are those of all domains (auc_M), of the other domains (auc_other_domains_M), or of its prompt (auc_own_prompt_M).
    """

    auc_M: Tensor
    auc_other_domains_M: Tensor
    auc_own_prompt_M: Tensor


@torch.no_grad()
def cross_domain_ranking(
    z_MD: Tensor, labels: RolloutLabels, used_M: Tensor, *, tile_elements: int = TILE_ELEMENTS
) -> Ranking:
    """Return P(z_i z_j > z_i z_n) + P(z_i z_j = z_i z_n) / 2 over correct j of other domains and incorrect n.

    It is the area under the ROC curve of anchor i's similarities, which neither the temperature nor the choice of
    positives changes. used_M: bool, the rollouts that take part; the others are NaN. tile_elements: anchors x rollouts
    that are compared at a time
    """
    domain_M, prompt_M = labels.domain_M, labels.prompt_M
    correct_M, incorrect_M = labels.correct_M & used_M, ~labels.correct_M & used_M
    auc_M, others_M, prompt_auc_M = (z_MD.new_full((len(labels),), torch.nan, dtype=torch.float32) for _ in range(3))
    for domain in domain_M[correct_M].unique().tolist():
        inside_M = domain_M == domain
        positives_P = (correct_M & ~inside_M).nonzero()[:, 0]
        for anchors_A in _tiles(correct_M & inside_M, tile_elements):
            similarity_AM = z_MD[anchors_A] @ z_MD.T
            similarity_AP = similarity_AM[:, positives_P]
            auc_M[anchors_A] = _auc(similarity_AP, similarity_AM[:, incorrect_M])
            others_M[anchors_A] = _auc(similarity_AP, similarity_AM[:, incorrect_M & ~inside_M])
            for prompt in prompt_M[anchors_A].unique().tolist():
                mine_A = prompt_M[anchors_A] == prompt
                similarity_AQ = similarity_AM[mine_A][:, incorrect_M & (prompt_M == prompt)]
                prompt_auc_M[anchors_A[mine_A]] = _auc(similarity_AP[mine_A], similarity_AQ)
    return Ranking(auc_M=auc_M, auc_other_domains_M=others_M, auc_own_prompt_M=prompt_auc_M)


def _tiles(anchors_M: Tensor, tile_elements: int) -> Iterator[Tensor]:
    """Yield the positions of anchors, so many at a time that a tile of similarities stays small."""
    yield from anchors_M.nonzero()[:, 0].split(max(1, tile_elements // max(1, len(anchors_M))))


def _auc(positives_AP: Tensor, negatives_AQ: Tensor) -> Tensor:
    """Return the share of pairs of each row whose positive is larger; a tie counts half; NaN without a pair: [A]."""
    if not positives_AP.numel() or not negatives_AQ.numel():
        return positives_AP.new_full((len(positives_AP),), torch.nan, dtype=torch.float32)
    ordered_AQ = negatives_AQ.sort(dim=1).values
    positives_AP = positives_AP.contiguous()
    below_AP, up_to_AP = (torch.searchsorted(ordered_AQ, positives_AP, right=right) for right in (False, True))
    return (below_AP + up_to_AP).double().mean(dim=1).div(2 * negatives_AQ.shape[1]).float()
