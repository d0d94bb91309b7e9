"""Select the rollouts of a step, or of one domain in it, that a metric is computed from.

Shape legend: megatron_mcpo.types; K = len(COLUMNS).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_mcpo.types import Outline, RolloutGroup

COLUMNS = ("entropy", "kl", "engine/logprob_diff", "engine/logprob_diff_max")
"""Statistics of one rollout: three sums over its response tokens, and a maximum."""

NAN = float("nan")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The rollouts of a whole step, or of one domain in it.

    sampled: all groups, also those that dynamic sampling replaced
    stats_MK: COLUMNS of the rollouts that were trained on; num_tokens: their response tokens
    cross_domain_M, in_domain_M: positives that each of them has in each contrastive term, 0 where it is not an anchor;
        None where the contrastive terms are off
    num_updates: optimizer steps that have contrastive terms
    """

    sampled: Sequence[RolloutGroup]
    stats_MK: Tensor
    num_tokens: int
    cross_domain_M: Tensor | None
    in_domain_M: Tensor | None
    num_updates: int

    @property
    def scored(self) -> list[RolloutGroup]:
        """Return the sampled groups whose verifier did not fail."""
        return [group for group in self.sampled if group.error is None]

    @property
    def outlines(self) -> list[Outline]:
        """Return what is known of the completions of the scored groups."""
        return [outline for group in self.scored for outline in group.outlines]

    def token_mean(self, column: int) -> float:
        """Return the mean over response tokens of a column of stats_MK; NaN without a token."""
        return float(self.stats_MK[:, column].double().sum() / self.num_tokens)


def mean(values: Sequence[float], *, empty: float = NAN) -> float:
    """Return the arithmetic mean, `empty` without a value."""
    return sum(values) / len(values) if values else empty


def domain_mean_reward(rollouts: Selection) -> float:
    """Return the mean of the domains' mean rewards; NaN when one of these is."""
    domains = sorted({group.prompt.domain for group in rollouts.sampled})
    by_domain = [[r for g in rollouts.scored if g.prompt.domain == domain for r in g.rewards] for domain in domains]
    return mean([mean(rewards) for rewards in by_domain])


def largest_mismatch(rollouts: Selection) -> float:
    """Return the largest mismatch of trainer and engine in a token's log-prob; NaN without a token."""
    return rollouts.stats_MK[:, 3].max().item() if rollouts.num_tokens else NAN


def mean_positives(positives_M: Tensor | None) -> float | None:
    """Return the positives per anchor: 0 without an anchor, None where the terms are off."""
    return None if positives_M is None else mean(positives_M[positives_M > 0].tolist(), empty=0.0)


def anchors(rollouts: Selection) -> float | None:
    """Return the number of anchors of either term per optimizer step, None where the terms are off."""
    if rollouts.cross_domain_M is None or rollouts.in_domain_M is None:
        return None
    return ((rollouts.cross_domain_M > 0) | (rollouts.in_domain_M > 0)).sum().item() / rollouts.num_updates
