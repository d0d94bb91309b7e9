"""Compute the domains' shares of a step from their weights, sizes and recent pass rates."""

import math
from collections.abc import Sequence

from megatron_mcpo.config.domain_schema import DataConfig

LEARNABLE = (0.2, 0.8)
"""Pass rates between which a domain has its whole weight under `curriculum`: the rewards of most groups then differ."""

LEAST = 0.01
"""No factor is smaller than this part of the largest: a domain that is never sampled would keep its pass rate."""


def mixing_shares(
    data: DataConfig, *, weights: Sequence[float], sizes: Sequence[int], pass_rates: Sequence[float | None]
) -> list[float]:
    """Return the share of each domain; they sum to 1. All lists have one element per domain.

    sizes: training items; pass_rates: recent ones, None where none is known yet: such a domain has its whole weight.
    temperature: w n^(1/T) (Aharoni et al., arXiv 1907.00091, section 5, up to its normalisation). worst: w
    exp(-p / T), as MT-GRPO's (arXiv 2602.05547) softmax over domains, computed from pass rates instead of learned.
    """
    if data.mixing == "temperature":
        logs = [math.log(size) / data.mixing_temperature for size in sizes]
        factors = [math.exp(log - max(logs)) for log in logs]
    elif data.mixing == "curriculum":
        factors = _floored([1.0 if rate is None else nearness(rate) for rate in pass_rates])
    elif data.mixing == "worst":
        rates = [rate or 0.0 for rate in pass_rates]
        factors = _floored([math.exp((min(rates) - rate) / data.worst_temperature) for rate in rates])
    else:
        factors = [1.0] * len(weights)
    products = [weight * factor for weight, factor in zip(weights, factors, strict=True)]
    return [product / sum(products) for product in products]


def nearness(pass_rate: float) -> float:
    """Return 1 within LEARNABLE; outside it falls linearly, to 0 at pass rates of 0 and 1."""
    low, high = LEARNABLE
    return min(1.0, pass_rate / low, (1 - pass_rate) / (1 - high))


def capped(shares: Sequence[float], num: int) -> list[float]:
    """Return the shares of `num` prompts, none above (num - 1) / num where there is a second domain."""
    cap = (num - 1) / num
    top = max(range(len(shares)), key=shares.__getitem__)
    if num < 2 or len(shares) < 2 or shares[top] <= cap:
        return list(shares)
    others = [0.0 if i == top else share for i, share in enumerate(shares)]
    if sum(others) == 0:  # the one with all the weight is so far ahead that floats don't hold the rest
        others = [0.0 if i == top else 1.0 for i in range(len(shares))]
    return [cap if i == top else (1 - cap) * share / sum(others) for i, share in enumerate(others)]


def _floored(factors: Sequence[float]) -> list[float]:
    """Return the factors, none below LEAST of the largest; where all are zero, all are equal."""
    largest = max(factors)
    return [max(factor, LEAST * largest) for factor in factors] if largest > 0 else [1.0] * len(factors)
