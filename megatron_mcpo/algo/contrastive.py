"""The two contrastive terms over all rollouts of a step, and their gradient. Shape legend: types.py; A: anchors of a
tile, K: domains, L: positives that are listed.

Evaluated on gathered representations, identically on every data-parallel rank: each takes its own rows of the gradient
and carries them into its backward passes (surrogate.py). So no collective needs a gradient. The gradient is written
out, not left to autograd, so that a tile of anchors is dropped as soon as it is used: memory is O(M D), not O(M^2).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_mcpo.algo.pairing import find_pairs, members
from megatron_mcpo.sections import ContrastiveConfig
from megatron_mcpo.types import Keys

TILE_ELEMENTS = 2**24
"""Anchors x rollouts of a tile: 64 MiB a matrix in fp32, of which a tile has about eight."""

_LISTED = 64


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """The contrastive terms of one step.

    loss_share, loss_consolidate: means over each term's valid anchors, without their weights; 0 where there is none
    loss_share_M, loss_consolidate_M: the terms of every anchor, L_share(i) and L_cons(i); 0 for all others
    grad_z_MD: gradient of share_weight * loss_share + consolidate_weight * loss_consolidate, in the dtype of z
    valid_share_M, valid_consolidate_M: bool, the anchors of each term
    positives_MK: int64, |C(i)| by the positives' domain; positives_consolidate_M: int64, |S(i)|
    negatives_M: int64, |M(i)|; like the positives 0 for rollouts that are an anchor of neither term
    listed_ML: int64, positions of (the first 64 of) the cross-domain positives of every rollout, filled up with -1
    """

    loss_share: float
    loss_consolidate: float
    loss_share_M: Tensor
    loss_consolidate_M: Tensor
    grad_z_MD: Tensor
    valid_share_M: Tensor
    valid_consolidate_M: Tensor
    positives_MK: Tensor
    positives_consolidate_M: Tensor
    negatives_M: Tensor
    listed_ML: Tensor

    @property
    def positives_share_M(self) -> Tensor:
        """|C(i)|."""
        return self.positives_MK.sum(dim=1)

    @property
    def anchors_share(self) -> int:
        return int(self.valid_share_M.sum())

    @property
    def anchors_consolidate(self) -> int:
        return int(self.valid_consolidate_M.sum())


_MOST_PENALTY = 0.5


def reward_penalty(contrast: Contrast, settings: ContrastiveConfig) -> Tensor:
    """What `mode` "reward" adds to the reward of every rollout [M]: max(-weighted terms, -0.5), 0 for wrong ones.

    With in-prompt consolidation and negatives, and no sharing, this is the reward of CLIPO (arXiv 2603.10101).
    """
    terms_M = settings.share_weight * contrast.loss_share_M + settings.consolidate_weight * contrast.loss_consolidate_M
    return -terms_M.clamp(max=_MOST_PENALTY)


@torch.no_grad()
def contrastive(
    z_MD: Tensor, keys: Keys, settings: ContrastiveConfig, *, tile_elements: int = TILE_ELEMENTS
) -> Contrast:
    """Both terms of MCPO (arXiv 2605.25443) on the representations of ALL rollouts of the step.

    With s_ij = z_i z_j / tau, a positive j of anchor i costs -log(e^s_ij / (e^s_ij + sum_n e^s_in)), n over its
    negatives. An anchor's cost is the mean over its positives, a term the mean over its valid anchors: those with a
    positive and, where the form needs one, a negative. `settings.denominator` "all" puts every other rollout in the
    denominator, which makes a term SupCon's L_out (arXiv 2004.11362); `consolidation_loss` "align" replaces the cost by
    1 - z_i z_j, which needs no negatives.

    z_MD: unit rows; a graph behind it is ignored. The gradient is that with respect to z itself: projecting out its
    radial part is the business of the head's own backward pass.
    """
    assert z_MD.ndim == 2 and len(z_MD) == len(keys), (z_MD.shape, len(keys))
    z_MD = z_MD.detach()
    sums = _Sums(z_MD, keys, settings, tile_elements)
    for anchors_A in (sums.valid_share_M | sums.valid_consolidate_M).nonzero()[:, 0].split(sums.tile_rows):
        sums.add_tile(anchors_A)
    return sums.result()


class _Sums:
    """What tiles of anchors add up to."""

    def __init__(self, z_MD: Tensor, keys: Keys, settings: ContrastiveConfig, tile_elements: int):
        self.z_MD = z_MD
        self.keys = keys
        self.settings = settings
        self.tile_rows = max(1, tile_elements // max(1, len(keys)))
        num, device = len(keys), z_MD.device
        self.valid_share_M, self.valid_consolidate_M = _valid_anchors(z_MD, keys, settings, self.tile_rows)
        num_domains = int(keys.domain_M.max()) + 1 if num else 0
        self.in_domain_MK = torch.nn.functional.one_hot(keys.domain_M, max(num_domains, 1)).to(z_MD.dtype)
        self.grad_z_MD = torch.zeros_like(z_MD)
        self.loss_share_M, self.loss_consolidate_M = z_MD.new_zeros(num), z_MD.new_zeros(num)
        self.positives_MK = torch.zeros(num, max(num_domains, 1), dtype=torch.int64, device=device)
        self.positives_consolidate_M = torch.zeros(num, dtype=torch.int64, device=device)
        self.negatives_M = torch.zeros(num, dtype=torch.int64, device=device)
        self.listed_ML = torch.full((num, min(num, _LISTED)), -1, dtype=torch.int64, device=device)

    def add_tile(self, anchors_A: Tensor) -> None:
        """Add the costs of these anchors and their part of the gradient, which reaches all rollouts."""
        settings, z_AD = self.settings, self.z_MD[anchors_A]
        logits_AM = z_AD @ self.z_MD.T
        pairs = find_pairs(logits_AM, anchors_A, self.keys, settings)
        logits_AM /= settings.temperature
        against_AM = pairs.negatives_AM
        if settings.denominator == "all":
            against_AM = torch.ones_like(pairs.share_AM).scatter_(1, anchors_A[:, None], False)
        rivals = _Rivals(logits_AM, against_AM, own=settings.denominator == "negatives")
        grad_AM = torch.zeros_like(logits_AM)
        self.loss_share_M[anchors_A] = rivals.add_info_nce(
            grad_AM, pairs.share_AM, self._weights(settings.share_weight, self.valid_share_M)[anchors_A]
        )
        weights_A = self._weights(settings.consolidate_weight, self.valid_consolidate_M)[anchors_A]
        if settings.consolidation_loss == "infonce":
            costs_A = rivals.add_info_nce(grad_AM, pairs.consolidate_AM, weights_A)
        else:
            costs_A = _add_align(grad_AM, logits_AM, pairs.consolidate_AM, weights_A, settings.temperature)
        self.loss_consolidate_M[anchors_A] = costs_A
        rivals.finish(grad_AM)
        grad_AM /= settings.temperature
        self.grad_z_MD.index_add_(0, anchors_A, grad_AM @ self.z_MD)
        self.grad_z_MD.addmm_(grad_AM.T, z_AD)
        self.positives_MK[anchors_A] = (pairs.share_AM.to(self.in_domain_MK.dtype) @ self.in_domain_MK).round().long()
        self.positives_consolidate_M[anchors_A] = pairs.consolidate_AM.sum(dim=1)
        self.negatives_M[anchors_A] = pairs.negatives_AM.sum(dim=1)
        self.listed_ML[anchors_A] = _first_columns(pairs.share_AM, self.listed_ML.shape[1])

    def result(self) -> Contrast:
        loss_share_M = self.loss_share_M.where(self.valid_share_M, 0.0)
        loss_consolidate_M = self.loss_consolidate_M.where(self.valid_consolidate_M, 0.0)
        return Contrast(
            loss_share=(loss_share_M.sum() / self.valid_share_M.sum().clamp(min=1)).item(),
            loss_consolidate=(loss_consolidate_M.sum() / self.valid_consolidate_M.sum().clamp(min=1)).item(),
            loss_share_M=loss_share_M,
            loss_consolidate_M=loss_consolidate_M,
            grad_z_MD=self.grad_z_MD,
            valid_share_M=self.valid_share_M,
            valid_consolidate_M=self.valid_consolidate_M,
            positives_MK=self.positives_MK,
            positives_consolidate_M=self.positives_consolidate_M,
            negatives_M=self.negatives_M,
            listed_ML=self.listed_ML,
        )

    def _weights(self, weight: float, valid_M: Tensor) -> Tensor:
        """What an anchor's cost counts in the total: [M]."""
        return valid_M.to(self.z_MD.dtype) * (weight / max(1, int(valid_M.sum())))


class _Rivals:
    """What the positives of a tile's anchors compete with: sum over rivals of e^s, `own`: plus the positive's own e^s.

    Nothing is exponentiated that could overflow: a pair costs softplus(rivals - s_ij) with its own e^s in the
    denominator besides, rivals - s_ij where the rivals include it already, with rivals = logsumexp over them.
    """

    def __init__(self, logits_AM: Tensor, against_AM: Tensor, *, own: bool):
        self.logits_AM = logits_AM
        self.against_AM = against_AM
        self.own = own
        self.rivals_A1 = logits_AM.masked_fill(~against_AM, -torch.inf).logsumexp(dim=1, keepdim=True)
        self.pressure_A1 = torch.zeros_like(self.rivals_A1)

    def add_info_nce(self, grad_AM: Tensor, positives_AM: Tensor, weights_A: Tensor) -> Tensor:
        """Costs of the anchors [A]; adds weights_A times their gradient with respect to the positives' logits."""
        count_A1 = positives_AM.sum(dim=1, keepdim=True).clamp(min=1)
        margin_AM = (self.rivals_A1 - self.logits_AM).masked_fill(~positives_AM, -torch.inf)
        cost_AM = -logsigmoid(-margin_AM) if self.own else margin_AM.where(positives_AM, 0.0)
        # The derivative of the cost by the margin: how much of the pair's cost the rivals are to blame for.
        blame_AM = margin_AM.sigmoid_() if self.own else positives_AM.to(grad_AM.dtype)
        blame_AM = blame_AM * (weights_A[:, None] / count_A1)
        grad_AM -= blame_AM
        self.pressure_A1 += blame_AM.sum(dim=1, keepdim=True)
        return cost_AM.sum(dim=1) / count_A1[:, 0]

    def finish(self, grad_AM: Tensor) -> None:
        """Add what all pairs push the rivals away with: each by its share of the sum."""
        share_AM = (self.logits_AM - self.rivals_A1).exp_().masked_fill_(~self.against_AM, 0.0)
        grad_AM += share_AM.mul_(self.pressure_A1)


def _add_align(
    grad_AM: Tensor, logits_AM: Tensor, positives_AM: Tensor, weights_A: Tensor, temperature: float
) -> Tensor:
    """The mean of 1 - z_i z_j over an anchor's positives [A]; adds its gradient with respect to the logits."""
    count_A = positives_AM.sum(dim=1).clamp(min=1)
    grad_AM -= positives_AM * (weights_A * temperature / count_A)[:, None]
    distance_AM = (1 - logits_AM * temperature).where(positives_AM, 0.0)
    return distance_AM.sum(dim=1) / count_A


def _valid_anchors(z_MD: Tensor, keys: Keys, settings: ContrastiveConfig, tile_rows: int) -> tuple[Tensor, Tensor]:
    """Which rollouts are anchors of the sharing and of the consolidation term: bool [M] each."""
    everyone_M = torch.zeros_like(keys.domain_M)
    groups = {"pool": everyone_M, "domain": keys.domain_M, "prompt": keys.prompt_M}
    opposed_M = members(groups[settings.negatives], ~keys.correct_M) > 0
    if settings.denominator == "all":
        opposed_M = torch.ones_like(opposed_M)
    correct_M = keys.correct_M
    others_M = members(everyone_M, correct_M) - members(keys.domain_M, correct_M) > 0
    share_M = correct_M & opposed_M & others_M
    if settings.transfer == "threshold":
        for anchors_A in share_M.nonzero()[:, 0].split(tile_rows):
            pairs = find_pairs(z_MD[anchors_A] @ z_MD.T, anchors_A, keys, settings)
            share_M[anchors_A] = pairs.share_AM.any(dim=1)
    consolidate_M = correct_M & (members(groups[settings.consolidate], correct_M) > 1)
    if settings.consolidation_loss == "infonce":
        consolidate_M &= opposed_M
    return share_M, consolidate_M


def _first_columns(mask_AM: Tensor, num: int) -> Tensor:
    """Positions of the first `num` true columns of every row, ascending, filled up with -1: int64 [A, num]."""
    columns = torch.full((len(mask_AM), num), -1, dtype=torch.int64, device=mask_AM.device)
    row, column = mask_AM.nonzero(as_tuple=True)
    start = torch.searchsorted(row, torch.arange(len(mask_AM), device=row.device))
    place = torch.arange(len(row), device=row.device) - start[row]
    kept = place < num
    columns[row[kept], place[kept]] = column[kept]
    return columns
