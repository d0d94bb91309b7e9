"""Compute the two contrastive terms over all rollouts of a step, and their gradient.

Shape legend: types.py; A: anchors of a tile, K: domains, L: positives that are listed.

Evaluated on gathered representations, identically on every data-parallel rank: each takes its own rows of the gradient
and carries them into its backward passes (surrogate.py). So no collective needs a gradient. The gradient is written
out, not left to autograd, so that a tile of anchors is dropped as soon as it is used: memory is O(M D), not O(M^2).
"""

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot

from megatron_mcpo.algo.groups import group_sums
from megatron_mcpo.algo.pairing import Pairing, Scope, members, scope_of
from megatron_mcpo.config.schema import ContrastiveConfig
from megatron_mcpo.types import RolloutLabels

TILE_ELEMENTS = 2**24
"""Anchors x rollouts of a tile: 64 MiB in fp32, and enough rows for matrix products at full speed."""

_BLOCKS = 64
"""Number of blocks of rows that a CPU divides a tile into, so that elementwise results stay in its cache."""

_LISTED = 64
"""Most cross-domain positives of a rollout that are listed."""
_SCOPES: tuple[Scope, ...] = get_args(Scope)


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """The contrastive terms of one step.

    loss_cross_domain, loss_in_domain: means over each term's valid anchors, unweighted; 0 where there is none
    loss_cross_domain_M, loss_in_domain_M: the terms of every anchor; 0 for all other rollouts
    gain_cross_domain_M, gain_in_domain_M: how far each of them is below its chance level, that of equal similarities
        (log(1 + negatives); with `in_domain_loss` "align" that of similarity 0); 0 for all other rollouts
    grad_z_MD: in the dtype of z, the gradient of cross_domain_weight * loss_cross_domain + in_domain_weight *
        loss_in_domain
    valid_cross_domain_M, valid_in_domain_M: bool, the anchors of each term
    used_M: bool, the rollouts that take part: all, or with `center` "prompt" those of prompts with both outcomes
    positives_MK: int64, |C(i)| by the positives' domain; positives_in_domain_M: int64, |S(i)|
    negatives_MK: int64, |M(i)| by the negatives' domain; like the positives 0 for rollouts that are not an anchor
    listed_ML: int64, positions of (the first 64 of) the cross-domain positives of every rollout, filled up with -1
    """

    loss_cross_domain: float
    loss_in_domain: float
    loss_cross_domain_M: Tensor
    loss_in_domain_M: Tensor
    gain_cross_domain_M: Tensor
    gain_in_domain_M: Tensor
    grad_z_MD: Tensor
    valid_cross_domain_M: Tensor
    valid_in_domain_M: Tensor
    used_M: Tensor
    positives_MK: Tensor
    positives_in_domain_M: Tensor
    negatives_MK: Tensor
    listed_ML: Tensor

    @property
    def positives_cross_domain_M(self) -> Tensor:
        """Return the number of cross-domain positives of each rollout, |C(i)|."""
        return self.positives_MK.sum(dim=1)

    @property
    def negatives_M(self) -> Tensor:
        """Return the number of negatives of each rollout, |M(i)|."""
        return self.negatives_MK.sum(dim=1)

    @property
    def anchors_cross_domain(self) -> int:
        """Return the number of anchors of the cross-domain term."""
        return int(self.valid_cross_domain_M.sum())

    @property
    def anchors_in_domain(self) -> int:
        """Return the number of anchors of the in-domain term."""
        return int(self.valid_in_domain_M.sum())


_MOST_PENALTY = 0.5


def reward_penalty(contrast: Contrast, settings: ContrastiveConfig) -> Tensor:
    """Return what `mode` "reward" adds to each reward [M]: max(-weighted terms, -0.5), 0 for incorrect rollouts.

    With in-domain positives and negatives of the same prompt, and no cross-domain term, this is the reward of CLIPO
    (arXiv 2603.10101): of its paper with `denominator` "negatives", of its authors' program with "all". By default that
    program draws one positive per anchor; here it is the mean over all of them, which is the expectation (its loss type
    supcon_loss_out).
    """
    terms_M = (
        settings.cross_domain_weight * contrast.loss_cross_domain_M
        + settings.in_domain_weight * contrast.loss_in_domain_M
    )
    return -terms_M.clamp(max=_MOST_PENALTY)


@torch.no_grad()
def contrastive(
    z_MD: Tensor, labels: RolloutLabels, settings: ContrastiveConfig, *, tile_elements: int = TILE_ELEMENTS
) -> Contrast:
    """Compute both terms of MCPO (arXiv 2605.25443) on the representations of ALL rollouts of the step.

    With s_ij = z_i z_j / tau, a positive j of anchor i costs -log(e^s_ij / (e^s_ij + sum_n e^s_in)), n over its rivals
    but j: the negatives or, with `settings.denominator` "all", all other rollouts of the scope that `negatives`
    names (with the pool: SupCon's L_out, arXiv 2004.11362). An anchor's cost is the mean over its positives, a term the
    mean over its valid anchors: those with a positive, and with a rival that could not be one, or nothing would keep
    representations apart. `in_domain_loss` "align" replaces the cost by 1 - z_i z_j, which needs no rivals. With
    `center` "prompt" only the rollouts of prompts with both outcomes take part.

    z_MD: unit rows; a graph behind it is ignored. The gradient is that with respect to z itself: projecting out its
    radial part is left to the head's own backward pass.
    """
    assert z_MD.ndim == 2 and len(z_MD) == len(labels), (z_MD.shape, len(labels))
    sums = _Sums(z_MD, labels, settings, tile_elements)
    for anchors_A in sums.tiles:
        sums.add_tile(anchors_A)
    return sums.result()


class _Sums:
    """The sums over all tiles of anchors."""

    def __init__(self, z_MD: Tensor, labels: RolloutLabels, settings: ContrastiveConfig, tile_elements: int):
        self.z_MD = z_MD
        self.labels = labels
        self.settings = settings
        self.pairing = Pairing(labels, settings)
        num, device = len(labels), z_MD.device
        tile_rows = max(1, tile_elements // max(1, num))
        self.block_rows = -(-tile_rows // _BLOCKS) if device.type == "cpu" else tile_rows
        num_domains = int(labels.domain_M.max()) + 1 if num else 1
        wrong_MK = one_hot(labels.domain_M, num_domains) * self.pairing.incorrect_M[:, None]
        self.negatives_MK = group_sums(wrong_MK, scope_of(labels, settings.negatives))
        self._find_anchors(tile_rows)
        self.grad_z_MD = torch.zeros_like(z_MD)
        self.loss_cross_domain_M, self.loss_in_domain_M = z_MD.new_zeros(num), z_MD.new_zeros(num)
        self.positives_MK = torch.zeros(num, num_domains, dtype=torch.int64, device=device)
        self.listed_ML = torch.full((num, min(num, _LISTED)), -1, dtype=torch.int64, device=device)

    def _find_anchors(self, tile_rows: int) -> None:
        """Find the anchors of each term, the weight of each in the total, and the tiles they are taken in."""
        settings, correct_M = self.settings, self.pairing.correct_M
        correct = {scope: members(scope_of(self.labels, scope), correct_M) for scope in _SCOPES}
        self.positives_in_domain_M = correct[settings.in_domain_scope] - 1
        opposed_cross_domain_M = opposed_in_domain_M = self.negatives_MK.any(dim=1)
        if settings.denominator == "all":
            # Correct rollouts of the rivals' scope: of the anchor's domain, or outside its in-domain scope.
            scope = settings.negatives
            opposed_cross_domain_M = opposed_cross_domain_M | (correct[_narrower(scope, "domain")] > 1)
            opposed_in_domain_M = opposed_in_domain_M | (
                correct[scope] > correct[_narrower(scope, settings.in_domain_scope)]
            )
        self.valid_cross_domain_M = correct_M & opposed_cross_domain_M & (correct["pool"] > correct["domain"])
        self.valid_in_domain_M = correct_M & (self.positives_in_domain_M > 0)
        if settings.in_domain_loss == "infonce":
            self.valid_in_domain_M &= opposed_in_domain_M
        anchors_A = (self.valid_cross_domain_M | self.valid_in_domain_M).nonzero()[:, 0]
        self.tiles = anchors_A.split(tile_rows) if len(anchors_A) else ()
        if settings.transfer == "threshold":
            # In the same tiles as later: a product of another shape might round to the other side of the threshold.
            for anchors_A in self.tiles:
                similarity_AM = self.z_MD[anchors_A] @ self.z_MD.T
                self.valid_cross_domain_M[anchors_A] &= self.pairing.transferable(similarity_AM, anchors_A).any(dim=1)
        self.weight_cross_domain = settings.cross_domain_weight / max(1, int(self.valid_cross_domain_M.sum()))
        self.weight_in_domain = settings.in_domain_weight / max(1, int(self.valid_in_domain_M.sum()))

    def add_tile(self, anchors_A: Tensor) -> None:
        """Add the costs of these anchors and their part of the gradient, which reaches all rollouts."""
        z_AD = self.z_MD[anchors_A]
        tile_AM = z_AD @ self.z_MD.T
        for block_A, block_AM in zip(anchors_A.split(self.block_rows), tile_AM.split(self.block_rows), strict=True):
            self._differentiate(block_AM, block_A)
        self.grad_z_MD.index_add_(0, anchors_A, tile_AM @ self.z_MD)
        self.grad_z_MD.addmm_(tile_AM.T, z_AD)

    def _differentiate(self, similarity_AM: Tensor, anchors_A: Tensor) -> None:
        """Record the costs of these anchors, and overwrite their similarities by the gradient with respect to them.

        With R the logsumexp over the rivals, a positive costs R - s_ij where it is one of them, and softplus(R - s_ij)
        where it joins them in its own denominator. Nothing is exponentiated that could overflow.
        """
        settings, pairs, dtype = self.settings, self.pairing.find(similarity_AM, anchors_A), similarity_AM.dtype
        # As factors, masks of numbers are much faster than masks of bools.
        cross_domain_AM, in_domain_AM = pairs.cross_domain_AM.to(dtype), pairs.in_domain_AM.to(dtype)
        part_cross_domain_A = self.valid_cross_domain_M[anchors_A] / cross_domain_AM.sum(dim=1).clamp(min=1)
        part_in_domain_A = self.valid_in_domain_M[anchors_A] / in_domain_AM.sum(dim=1).clamp(min=1)
        self._count(pairs.cross_domain_AM, anchors_A)
        logits_AM = similarity_AM / settings.temperature
        nothing = torch.finfo(dtype).min  # and not -inf, which would make NaN of an anchor without a rival
        rivals_AM = logits_AM.masked_fill(~pairs.rivals_AM, nothing)
        push_AM = rivals_AM.softmax(dim=1)  # each rival by its share of the sum
        total_A1 = rivals_AM.amax(dim=1, keepdim=True) - push_AM.amax(dim=1, keepdim=True).log()
        logp_AM = logits_AM.sub_(total_A1)
        logp_AM = torch.where(pairs.rivals_AM, logp_AM, logsigmoid(logp_AM))
        self.loss_cross_domain_M[anchors_A] = -part_cross_domain_A * torch.linalg.vecdot(logp_AM, cross_domain_AM)
        pull_AM = cross_domain_AM * (self.weight_cross_domain * part_cross_domain_A)[:, None]
        spread_AM = in_domain_AM * (self.weight_in_domain * part_in_domain_A)[:, None]
        if settings.in_domain_loss == "infonce":
            self.loss_in_domain_M[anchors_A] = -part_in_domain_A * torch.linalg.vecdot(logp_AM, in_domain_AM)
            pull_AM += spread_AM
        else:
            self.loss_in_domain_M[anchors_A] = part_in_domain_A * torch.linalg.vecdot(1 - similarity_AM, in_domain_AM)
        # The part of a pair's cost that is due to the rivals: all of it where the positive is one of them.
        pull_AM *= logp_AM.expm1_().neg_().masked_fill_(pairs.rivals_AM, 1.0)
        torch.sub(push_AM.mul_(pull_AM.sum(dim=1, keepdim=True)), pull_AM, out=similarity_AM)
        similarity_AM /= settings.temperature
        if settings.in_domain_loss == "align":
            similarity_AM -= spread_AM

    def _count(self, cross_domain_AM: Tensor, anchors_A: Tensor) -> None:
        """Record how many cross-domain positives these anchors have in each domain, and the first of them."""
        num_anchors, num_domains = len(anchors_A), self.positives_MK.shape[1]
        row, column = cross_domain_AM.nonzero(as_tuple=True)
        by_domain = torch.bincount(
            row * num_domains + self.labels.domain_M[column], minlength=num_anchors * num_domains
        )
        by_domain = by_domain.view(num_anchors, num_domains)
        self.positives_MK[anchors_A] = by_domain
        count_A = by_domain.sum(dim=1)
        place = torch.arange(len(row), device=row.device) - (count_A.cumsum(0) - count_A)[row]
        kept = place < self.listed_ML.shape[1]
        self.listed_ML[anchors_A[row[kept]], place[kept]] = column[kept]

    def _chance(self) -> Tensor:
        """Return what a positive costs each rollout if all similarities are equal: [M]."""
        if self.settings.denominator == "negatives":
            return self.negatives_MK.sum(dim=1).to(self.z_MD.dtype).log1p()
        rivals_M = members(scope_of(self.labels, self.settings.negatives), self.pairing.used_M) - 1
        return rivals_M.clamp(min=1).to(self.z_MD.dtype).log()

    def result(self) -> Contrast:
        """Return the terms after all tiles were added."""
        anchor_M = self.valid_cross_domain_M | self.valid_in_domain_M
        chance_M = self._chance()
        aligned = self.settings.in_domain_loss == "align"
        chance_in_domain_M = torch.ones_like(chance_M) if aligned else chance_M
        return Contrast(
            loss_cross_domain=(self.loss_cross_domain_M.sum() / self.valid_cross_domain_M.sum().clamp(min=1)).item(),
            loss_in_domain=(self.loss_in_domain_M.sum() / self.valid_in_domain_M.sum().clamp(min=1)).item(),
            loss_cross_domain_M=self.loss_cross_domain_M,
            loss_in_domain_M=self.loss_in_domain_M,
            gain_cross_domain_M=(chance_M - self.loss_cross_domain_M) * self.valid_cross_domain_M,
            gain_in_domain_M=(chance_in_domain_M - self.loss_in_domain_M) * self.valid_in_domain_M,
            grad_z_MD=self.grad_z_MD,
            valid_cross_domain_M=self.valid_cross_domain_M,
            valid_in_domain_M=self.valid_in_domain_M,
            used_M=self.pairing.used_M,
            positives_MK=self.positives_MK,
            positives_in_domain_M=self.positives_in_domain_M.where(anchor_M, 0),
            negatives_MK=self.negatives_MK * anchor_M[:, None],
            listed_ML=self.listed_ML,
        )


def _narrower(one: Scope, other: Scope) -> Scope:
    return max(one, other, key=_SCOPES.index)
