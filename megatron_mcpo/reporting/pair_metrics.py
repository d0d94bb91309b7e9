"""Compute the metrics of one optimizer step's representations and pairs, which metric_table.py describes.

Shape legend: megatron_mcpo.types; K: domains.
"""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from megatron_mcpo.algo.contrastive import Contrast
from megatron_mcpo.algo.geometry import alignment, domain_similarity, uniformity
from megatron_mcpo.algo.ranking import cross_domain_ranking
from megatron_mcpo.types import RolloutLabels


def pair_metrics(
    z_MD: Tensor, labels: RolloutLabels, contrast: Contrast, domain_names: Sequence[str]
) -> dict[str, float]:
    """Return the metrics of all pairs, by domain and by pairs of domains; NaN where there is no pair.

    Args:
        z_MD: the representations that the pairs are made of
        labels: of the same rollouts, on the same device
        contrast: the terms of these rollouts
        domain_names: in the order of the labels' domain numbers
    """
    return (
        _distances(z_MD[contrast.used_M], labels.select(contrast.used_M), domain_names)
        | _losses(contrast)
        | _counts(labels, contrast, domain_names)
        | _by_domain(_effects(z_MD, labels, contrast), labels, domain_names)
    )


def _effects(z_MD: Tensor, labels: RolloutLabels, contrast: Contrast) -> dict[str, Tensor]:
    """Return what shows of every anchor whether the mechanism acts: [M], NaN for all other rollouts."""
    ranking = cross_domain_ranking(z_MD, labels, contrast.used_M)
    return {
        "contrast/gain_cross_domain": contrast.gain_cross_domain_M.where(contrast.valid_cross_domain_M, math.nan),
        "contrast/gain_in_domain": contrast.gain_in_domain_M.where(contrast.valid_in_domain_M, math.nan),
        "contrast/auc_cross_domain": ranking.auc_M,
        "contrast/auc_other_domains": ranking.auc_other_domains_M,
        "contrast/auc_own_prompt": ranking.auc_own_prompt_M,
    }


def _by_domain(values: Mapping[str, Tensor], labels: RolloutLabels, domain_names: Sequence[str]) -> dict[str, float]:
    """Return the mean of each figure over all rollouts that have one, and over those of each domain."""
    metrics = {}
    for key, value_M in values.items():
        value_M = value_M.double()
        metrics[key] = value_M.nanmean().item()
        for domain in labels.domain_M.unique().tolist():
            metrics[f"{key}/{domain_names[domain]}"] = value_M[labels.domain_M == domain].nanmean().item()
    return metrics


def _distances(z_MD: Tensor, labels: RolloutLabels, domain_names: Sequence[str]) -> dict[str, float]:
    """Measure how representations lie to each other."""
    metrics = {"contrast/alignment": alignment(z_MD, labels), "contrast/uniformity": uniformity(z_MD)}
    similarity = domain_similarity(z_MD, labels, num_domains=len(domain_names)).tolist()
    present = labels.domain_M.unique().tolist()
    for a in present:
        for b in (other for other in present if other >= a):
            metrics[f"contrast/similarity/{domain_names[a]}/{domain_names[b]}"] = similarity[a][b]
    return metrics


def _losses(contrast: Contrast) -> dict[str, float]:
    return {
        "loss/cross_domain": contrast.loss_cross_domain if contrast.anchors_cross_domain else math.nan,
        "loss/in_domain": contrast.loss_in_domain if contrast.anchors_in_domain else math.nan,
    }


def _counts(labels: RolloutLabels, contrast: Contrast, domain_names: Sequence[str]) -> dict[str, float]:
    """Count positives and negatives per anchor."""
    anchors_M = contrast.valid_cross_domain_M | contrast.valid_in_domain_M
    metrics = {"contrast/negatives": contrast.negatives_M[anchors_M].double().mean().item()}
    present = labels.domain_M.unique().tolist()
    for a in present:
        positives_AK = contrast.positives_MK[contrast.valid_cross_domain_M & (labels.domain_M == a)].double()
        negatives_AK = contrast.negatives_MK[anchors_M & (labels.domain_M == a)].double()
        for b in present:
            names = f"{domain_names[a]}/{domain_names[b]}"
            metrics[f"contrast/negatives/{names}"] = negatives_AK[:, b].mean().item()
            if b != a:
                metrics[f"contrast/positives/{names}"] = positives_AK[:, b].mean().item()
    return metrics
