"""Replace groups whose advantages are all zero before they are learned from (DAPO's dynamic sampling).

Source: arXiv 2503.14476.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_mcpo.data.stream import PromptStream
from megatron_mcpo.trainer.collector import Collector, Sampling
from megatron_mcpo.types import RolloutGroup


@dataclass(frozen=True, kw_only=True)
class Collected:
    """A step's groups. groups: to be trained on; replaced: those that were dropped for them; rounds: of replacement."""

    groups: tuple[RolloutGroup, ...]
    replaced: tuple[RolloutGroup, ...] = ()
    rounds: int = 0

    @property
    def sampled(self) -> tuple[RolloutGroup, ...]:
        """Return all groups that were sampled, from which pass rates and error rates are computed."""
        return self.groups + self.replaced

    @property
    def metrics(self) -> dict[str, float]:
        """Return the metrics of dynamic sampling, which reporting/metric_table.py describes."""
        return {
            "resample/rounds": float(self.rounds),
            "resample/replaced": float(len(self.replaced)),
            "resample/prompts": float(len(self.sampled)),
        }


def with_nonzero_advantage(
    groups: Sequence[RolloutGroup], collector: Collector, stream: PromptStream, sampling: Sampling, *, rounds: int
) -> Collected:
    """Replace up to `rounds` times those of a step's groups whose rewards are all equal.

    A replacement is the next prompt of the same domain, in the same place of the step. Groups whose rewards are still
    equal after the last round stay. No two completions share a seed: see `num_seeds`. All ranks call it together.
    """
    collected = Collected(groups=tuple(groups))
    for number in range(1, rounds + 1):
        places = [place for place, group in enumerate(collected.groups) if not group.has_nonzero_advantage]
        if not places:
            break
        fresh = stream.replacements([collected.groups[place].prompt.domain for place in places])
        shifted = replace(sampling, seed=sampling.seed + number * num_seeds(len(groups), sampling.num_samples))
        collected = _replace_groups(collected, places, collector.collect(fresh, shifted))
    return collected


def num_seeds(num_prompts: int, num_samples: Sequence[int], *, rounds: int = 0) -> int:
    """Return how many seeds a step may use: `num_samples` of each domain, with `rounds` of replacement."""
    return (1 + rounds) * num_prompts * max(num_samples)


def _replace_groups(collected: Collected, places: Sequence[int], groups: Sequence[RolloutGroup]) -> Collected:
    new = dict(zip(places, groups, strict=True))
    return Collected(
        groups=tuple(new.get(place, group) for place, group in enumerate(collected.groups)),
        replaced=collected.replaced + tuple(collected.groups[place] for place in places),
        rounds=collected.rounds + 1,
    )
