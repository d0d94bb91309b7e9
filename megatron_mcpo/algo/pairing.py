"""Who is a positive, who a negative, of whom. Shape legend: types.py; A: the anchors of a tile, K: domains.

Masks are made for a tile of anchors against all M rollouts at a time, so that no M x M matrix need exist.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mcpo.sections import ContrastiveConfig
from megatron_mcpo.types import Keys


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """C(i), S(i) and M(i) of a tile's anchors as bool masks [A, M]. `negatives_AM` may be a view of one row."""

    share_AM: Tensor
    consolidate_AM: Tensor
    negatives_AM: Tensor


def find_pairs(similarity_AM: Tensor, anchors_A: Tensor, keys: Keys, settings: ContrastiveConfig) -> Pairs:
    """The pairs of the rollouts `anchors_A` (int64, positions in the step's order), all of which are correct.

    C(i), the cross-domain positives: by `transfer` correct rollouts of OTHER domains; top_k takes the most similar ones
    of each domain, so that no domain crowds out the rest. S(i), the in-domain positives: by `consolidate` the other
    correct rollouts of the domain or the prompt. M(i), the negatives: by `negatives` incorrect rollouts.

    The choice carries no gradient. Of equally similar rollouts the first ones in step order are taken, so that every
    rank picks the same.
    """
    assert similarity_AM.shape == (len(anchors_A), len(keys)), (similarity_AM.shape, len(anchors_A), len(keys))
    same_domain_AM = keys.domain_M[anchors_A, None] == keys.domain_M
    # Prompts are numbered over all domains: a prompt's rollouts are of one domain.
    same_prompt_AM = keys.prompt_M[anchors_A, None] == keys.prompt_M
    inside_AM = same_domain_AM if settings.consolidate == "domain" else same_prompt_AM
    consolidate_AM = inside_AM & keys.correct_M
    consolidate_AM.scatter_(1, anchors_A[:, None], False)
    if settings.negatives == "pool":
        negatives_AM = (~keys.correct_M).expand_as(same_domain_AM)
    else:
        negatives_AM = (same_domain_AM if settings.negatives == "domain" else same_prompt_AM) & ~keys.correct_M
    return Pairs(
        share_AM=_transferable(similarity_AM.detach(), anchors_A, keys, same_domain_AM, settings),
        consolidate_AM=consolidate_AM,
        negatives_AM=negatives_AM,
    )


def members(group_M: Tensor, counted_M: Tensor) -> Tensor:
    """How many of the rollouts `counted_M` (bool) are in the same group as each rollout: int64 [M]."""
    _, number_M = torch.unique(group_M, return_inverse=True)
    counts = torch.zeros(len(group_M), dtype=torch.int64, device=group_M.device)
    return counts.index_add(0, number_M, counted_M.long())[number_M]


def _transferable(
    similarity_AM: Tensor, anchors_A: Tensor, keys: Keys, same_domain_AM: Tensor, settings: ContrastiveConfig
) -> Tensor:
    others_AM = ~same_domain_AM & keys.correct_M
    if settings.transfer == "all":
        return others_AM
    if settings.transfer == "threshold":
        return others_AM & (similarity_AM >= settings.threshold)
    chosen_AM = torch.zeros_like(others_AM)
    for domain in torch.unique(keys.domain_M[keys.correct_M]).tolist():
        rows = (keys.domain_M[anchors_A] != domain).nonzero()[:, 0]
        columns = (keys.correct_M & (keys.domain_M == domain)).nonzero()[:, 0]
        chosen_AM[rows[:, None], columns] = _largest(similarity_AM[rows[:, None], columns], settings.top_k)
    return chosen_AM


def _largest(values: Tensor, count: int) -> Tensor:
    """Bool mask of the `count` largest values of every row, the first ones among equals; all of a shorter row.

    `topk` promises nothing about ties, so it only tells the smallest value that is taken.
    """
    if values.shape[1] <= count:
        return torch.ones_like(values, dtype=torch.bool)
    least = values.topk(count, dim=1).values[:, -1:]
    taken = values >= least
    crowded = (taken.sum(dim=1) > count).nonzero()[:, 0]
    if len(crowded):
        above, equal = values[crowded] > least[crowded], values[crowded] == least[crowded]
        room = count - above.sum(dim=1, keepdim=True)
        taken[crowded] = above | (equal & (equal.cumsum(dim=1) <= room))
    return taken
