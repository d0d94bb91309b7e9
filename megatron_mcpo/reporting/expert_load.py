"""Measure how evenly the tokens of a step were divided over experts. Shape legend: see megatron_mcpo.types."""

from math import log

from torch import Tensor


def expert_load(load_XE: Tensor) -> dict[str, float]:
    """Return the metrics of how many tokens each expert was given, averaged over layers.

    moe/load_max_over_mean: tokens of the fullest expert over the mean; 1: evenly divided, E / K: always the same
    moe/load_entropy: entropy of the experts' shares over its largest value, log E; 1: evenly divided
    moe/unused_experts: share of the experts of all layers that no token was given
    """
    share_XE = load_XE.double() / load_XE.sum(1, keepdim=True).clamp(min=1)
    num_experts = load_XE.shape[1]
    entropy_X = -(share_XE * share_XE.clamp(min=1e-30).log()).sum(1)
    return {
        "moe/load_max_over_mean": (share_XE.max(1).values * num_experts).mean().item(),
        "moe/load_entropy": entropy_X.mean().item() / log(num_experts) if num_experts > 1 else 1.0,
        "moe/unused_experts": (load_XE == 0).double().mean().item(),
    }
