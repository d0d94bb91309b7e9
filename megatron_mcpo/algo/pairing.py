"""Decide which rollouts are positives and negatives of which. Shape legend: types.py; A: anchors of a tile, K: domains.

Masks are made for a tile of anchors against all M rollouts at a time, so that no M x M matrix is needed.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_mcpo.algo.groups import group_sums
from megatron_mcpo.config.schema import ContrastiveConfig
from megatron_mcpo.types import RolloutLabels

Scope = Literal["pool", "domain", "prompt"]
"""The rollouts of the step, of a domain, of a prompt; each scope contains the next."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """C(i), S(i) and the rivals of a tile's anchors as bool masks [A, M]. `rivals_AM` may be a view of one row."""

    cross_domain_AM: Tensor
    in_domain_AM: Tensor
    rivals_AM: Tensor


class Pairing:
    """The pairs of a step.

    C(i), the cross-domain positives: by `transfer` correct rollouts of OTHER domains; top_k takes the most similar ones
    of each domain, so that no domain crowds out the rest. S(i), the in-domain positives: by `in_domain_scope` the
    other correct rollouts of the domain or the prompt. M(i), the negatives: incorrect rollouts of the scope that
    `negatives` names. The rivals, which a positive competes with: by `denominator` the negatives, or all other
    rollouts of that scope.

    Of equally similar rollouts the first ones in step order are taken, so that every rank picks the same. With `center`
    "prompt" only the rollouts of prompts with both outcomes take part.
    """

    def __init__(self, labels: RolloutLabels, settings: ContrastiveConfig):
        self.labels = labels
        self.settings = settings
        self.used_M = used(labels, settings)
        """Which rollouts take part."""
        self.correct_M = labels.correct_M & self.used_M
        self.incorrect_M = ~labels.correct_M & self.used_M
        domains = torch.unique(labels.domain_M[self.correct_M]).tolist()
        self.correct_by_domain = {
            domain: (self.correct_M & (labels.domain_M == domain)).nonzero()[:, 0] for domain in domains
        }
        """Positions of the correct rollouts by domain, ascending."""

    def find(self, similarity_AM: Tensor, anchors_A: Tensor) -> Pairs:
        """Return the pairs of `anchors_A` (int64, positions in the step's order), all of which are correct."""
        assert similarity_AM.shape == (len(anchors_A), len(self.labels)), (similarity_AM.shape, anchors_A.shape)
        in_domain_AM = self._same(self.settings.in_domain_scope, anchors_A) & self.correct_M
        return Pairs(
            cross_domain_AM=self.transferable(similarity_AM, anchors_A),
            in_domain_AM=in_domain_AM.scatter_(1, anchors_A[:, None], False),
            rivals_AM=self._rivals(anchors_A),
        )

    def transferable(self, similarity_AM: Tensor, anchors_A: Tensor) -> Tensor:
        """Return C(i) alone: bool [A, M]."""
        if self.settings.transfer == "top_k":
            return self._most_similar(similarity_AM, anchors_A)
        others_AM = ~self._same("domain", anchors_A) & self.correct_M
        if self.settings.transfer == "threshold":
            others_AM &= similarity_AM >= self.settings.threshold
        return others_AM

    def _rivals(self, anchors_A: Tensor) -> Tensor:
        if self.settings.denominator == "all":
            others_AM = self._same(self.settings.negatives, anchors_A) & self.used_M
            return others_AM.scatter_(1, anchors_A[:, None], False)
        if self.settings.negatives == "pool":
            return self.incorrect_M.expand(len(anchors_A), -1)
        return self._same(self.settings.negatives, anchors_A) & self.incorrect_M

    def _same(self, scope: Scope, anchors_A: Tensor) -> Tensor:
        group_M = scope_of(self.labels, scope)
        return group_M[anchors_A, None] == group_M

    def _most_similar(self, similarity_AM: Tensor, anchors_A: Tensor) -> Tensor:
        chosen_AM = torch.zeros_like(similarity_AM, dtype=torch.bool)
        domain_A1 = self.labels.domain_M[anchors_A, None]
        for domain, columns in self.correct_by_domain.items():
            nearest = _largest(similarity_AM.index_select(1, columns), self.settings.top_k)
            chosen_AM.index_copy_(1, columns, nearest & (domain_A1 != domain))
        return chosen_AM


def used(labels: RolloutLabels, settings: ContrastiveConfig) -> Tensor:
    """Return which rollouts the terms are taken over, bool [M]: all, or with centred ones those that can differ."""
    if settings.center == "off":
        return torch.ones_like(labels.correct_M)
    correct_M = members(labels.prompt_M, labels.correct_M)
    return (correct_M > 0) & (correct_M < members(labels.prompt_M, torch.ones_like(labels.correct_M)))


def scope_of(labels: RolloutLabels, scope: Scope) -> Tensor:
    """Return a number for every rollout, the same within a scope: int64 [M]. Prompts are numbered over all domains."""
    match scope:
        case "pool":
            return torch.zeros_like(labels.domain_M)
        case "domain":
            return labels.domain_M
        case "prompt":
            return labels.prompt_M


def members(group_M: Tensor, counted_M: Tensor) -> Tensor:
    """Return how many of the rollouts `counted_M` (bool) are in the group of each rollout: int64 [M]."""
    return group_sums(counted_M.long(), group_M)


def _largest(values: Tensor, count: int) -> Tensor:
    """Return a bool mask of the `count` largest values of every row, the first ones among equals; all of a shorter row.

    The order of ties in `topk` is not defined, so only the smallest value that is taken comes from it.
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
