"""Describe the representations of a step in a few numbers. Shape legend: types.py; K: domains."""

import math

import torch
from torch import Tensor

from megatron_mcpo.types import RolloutLabels

_UNIFORMITY_ROWS = 2048


def domain_similarity(z_MD: Tensor, labels: RolloutLabels, *, num_domains: int) -> Tensor:
    """Return the mean similarity of two different correct rollouts by their domains: fp64 [K, K]; NaN without a pair.

    The mean over all pairs of two domains is the product of their sums, so no pair is formed.
    """
    sums_KD, squares_K, counts_K = _domain_sums(z_MD, labels, num_domains)
    pairs_KK = counts_K[:, None] * counts_K - counts_K.diag()
    # Without a pair the numerator is 0 but for rounding, and a rounding error over 0 would be infinite.
    return ((sums_KD @ sums_KD.T - squares_K.diag()) / pairs_KK).where(pairs_KK > 0, torch.nan)


def alignment(z_MD: Tensor, labels: RolloutLabels) -> float:
    """Return the mean squared distance of two correct rollouts of a domain (Wang & Isola, arXiv 2005.10242, alpha = 2).

    0: they coincide; 2: they are as far apart as by chance. NaN without such a pair.
    """
    num_domains = int(labels.domain_M.max()) + 1 if len(labels) else 1
    sums_KD, squares_K, counts_K = _domain_sums(z_MD, labels, num_domains)
    distance = 2 * (counts_K * squares_K - sums_KD.square().sum(dim=1)).sum()
    pairs = (counts_K * (counts_K - 1)).sum()
    return float(distance.clamp(min=0) / pairs) if pairs else math.nan


def uniformity(z_MD: Tensor) -> float:
    """Return log of the mean of e^(-2 distance^2) over pairs of rollouts (Wang & Isola, arXiv 2005.10242, t = 2).

    0: all coincide; -4 and less: spread over the sphere. Of more than 2048 rollouts every n-th is taken. NaN without
    a pair.
    """
    step = -(-len(z_MD) // _UNIFORMITY_ROWS) or 1
    z_MD = z_MD[::step].double()
    squares_M = z_MD.square().sum(dim=1)
    distance_MM = squares_M[:, None] + squares_M - 2 * z_MD @ z_MD.T
    num = len(z_MD)
    if num < 2:
        return math.nan
    potential = (torch.exp(-2 * distance_MM).sum() - num) / (num * (num - 1))
    return float(potential.log())


def _domain_sums(z_MD: Tensor, labels: RolloutLabels, num_domains: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return, of each domain's correct rollouts, the sum of z [K, D], the sum of |z|^2 [K], the number [K]; fp64."""
    z_CD, domain_C = z_MD[labels.correct_M].double(), labels.domain_M[labels.correct_M]
    sums_KD = z_CD.new_zeros(num_domains, z_MD.shape[1]).index_add(0, domain_C, z_CD)
    squares_K = z_CD.new_zeros(num_domains).index_add(0, domain_C, z_CD.square().sum(dim=1))
    counts_K = z_CD.new_zeros(num_domains).index_add(0, domain_C, torch.ones_like(z_CD[:, 0]))
    return sums_KD, squares_K, counts_K
