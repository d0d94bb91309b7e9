"""The objective once more, plainly: dense matrices, autograd, one process. What the trainer is held against.

Shares no line with megatron_mcpo.algo. Memory is O(M^2). Shape legend: see megatron_mcpo.types.
"""

import torch
from torch import Tensor

from megatron_mcpo.sections import ContrastiveConfig
from megatron_mcpo.types import Keys


def contrastive_loss(z_MD: Tensor, keys: Keys, settings: ContrastiveConfig) -> Tensor:
    """share_weight * L_share + consolidate_weight * L_cons, with a graph to z."""
    share, _ = share_term(z_MD, keys, settings)
    consolidate, _ = consolidate_term(z_MD, keys, settings)
    return settings.share_weight * share + settings.consolidate_weight * consolidate


def share_term(z_MD: Tensor, keys: Keys, settings: ContrastiveConfig) -> tuple[Tensor, Tensor]:
    """L_share, and which rollouts are its anchors."""
    return _info_nce(z_MD, share_positives(z_MD, keys, settings), keys, settings)


def consolidate_term(z_MD: Tensor, keys: Keys, settings: ContrastiveConfig) -> tuple[Tensor, Tensor]:
    """L_cons, and which rollouts are its anchors."""
    same = _same(keys.domain_M if settings.consolidate == "domain" else keys.prompt_M)
    positives = same & _correct_pairs(keys)
    positives.fill_diagonal_(False)
    if settings.consolidation_loss == "infonce":
        return _info_nce(z_MD, positives, keys, settings)
    anchors = positives.any(1)
    distances = ((1 - z_MD @ z_MD.T) * positives).sum(1) / positives.sum(1).clamp(min=1)
    return distances.sum() / anchors.sum().clamp(min=1), anchors


def share_positives(z_MD: Tensor, keys: Keys, settings: ContrastiveConfig) -> Tensor:
    """C(i) as rows of a matrix [M, M]."""
    candidates = _correct_pairs(keys) & ~_same(keys.domain_M)
    similarity = (z_MD @ z_MD.T).detach()
    if settings.transfer == "all":
        return candidates
    if settings.transfer == "threshold":
        return candidates & (similarity >= settings.threshold)
    chosen = torch.zeros_like(candidates)
    for domain in keys.domain_M.unique():
        inside = candidates & (keys.domain_M == domain)
        ranking = similarity.masked_fill(~inside, -torch.inf).argsort(dim=1, descending=True, stable=True)
        chosen |= torch.zeros_like(candidates).scatter_(1, ranking[:, : settings.top_k], True) & inside
    return chosen


def negatives(keys: Keys, settings: ContrastiveConfig) -> Tensor:
    """M(i) as rows of a matrix [M, M]."""
    wrong = (~keys.correct_M).expand(len(keys), -1)
    if settings.negatives == "pool":
        return wrong
    return wrong & _same(keys.domain_M if settings.negatives == "domain" else keys.prompt_M)


def _info_nce(z_MD: Tensor, positives: Tensor, keys: Keys, settings: ContrastiveConfig) -> tuple[Tensor, Tensor]:
    logits = z_MD @ z_MD.T / settings.temperature
    against = negatives(keys, settings)
    if settings.denominator == "all":
        against = ~torch.eye(len(keys), dtype=torch.bool, device=z_MD.device)
    anchors = positives.any(1) & against.any(1)
    logits, positives, against = logits[anchors], positives[anchors], against[anchors]
    rivals = logits.masked_fill(~against, -torch.inf).logsumexp(1, keepdim=True)
    whole = torch.logaddexp(rivals.expand_as(logits), logits) if settings.denominator == "negatives" else rivals
    costs = torch.where(positives, whole - logits, 0.0).sum(1) / positives.sum(1)
    return costs.sum() / max(len(costs), 1), anchors


def _same(group_M: Tensor) -> Tensor:
    return group_M[:, None] == group_M


def _correct_pairs(keys: Keys) -> Tensor:
    return keys.correct_M[:, None] & keys.correct_M
