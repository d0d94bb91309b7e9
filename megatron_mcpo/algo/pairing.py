"""Who is a positive, who a negative, of whom. Shape legend: types.py."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mcpo.types import Keys


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """The pairs of a step. Row i says what rollout i, as an anchor, is compared with; wrong rollouts have empty rows.

    share_MM: bool, C(i): correct rollouts of other domains that knowledge is shared with
    consolidate_MM: bool, S(i): the other correct rollouts of the same domain
    negatives_M: bool, M(i): the incorrect rollouts of the pool, the same for every anchor
    """

    share_MM: Tensor
    consolidate_MM: Tensor
    negatives_M: Tensor


def find_pairs(z_MD: Tensor, keys: Keys, *, top_k: int) -> Pairs:
    """Pairs of the step's rollouts; anchors are the correct ones.

    An anchor takes as cross-domain positives its `top_k` most similar correct rollouts of EACH other domain (fewer
    where a domain has fewer). The choice carries no gradient. Of equally similar rollouts the first ones in step order
    are taken, so that every rank picks the same.
    """
    assert z_MD.ndim == 2 and len(z_MD) == len(keys), (z_MD.shape, len(keys))
    assert top_k > 0
    correct_MM = keys.correct_M[:, None] & keys.correct_M[None, :]
    same_domain_MM = keys.domain_M[:, None] == keys.domain_M[None, :]
    itself_MM = torch.eye(len(keys), dtype=torch.bool, device=z_MD.device)
    return Pairs(
        share_MM=_most_similar(z_MD.detach(), keys, top_k),
        consolidate_MM=correct_MM & same_domain_MM & ~itself_MM,
        negatives_M=~keys.correct_M,
    )


def _most_similar(z_MD: Tensor, keys: Keys, top_k: int) -> Tensor:
    chosen_MM = torch.zeros(len(keys), len(keys), dtype=torch.bool, device=z_MD.device)
    for domain in torch.unique(keys.domain_M[keys.correct_M]):
        in_domain_M = keys.domain_M == domain
        anchors = (keys.correct_M & ~in_domain_M).nonzero()[:, 0]
        candidates = (keys.correct_M & in_domain_M).nonzero()[:, 0]
        similarity = z_MD[anchors] @ z_MD[candidates].T
        # A stable sort, since topk promises nothing about the order of ties.
        order = similarity.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
        chosen_MM[anchors[:, None], candidates[order]] = True
    return chosen_MM
