"""Dynamic sampling (DAPO, arXiv 2503.14476): groups without signal are replaced before they are learned from."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_mcpo.data.stream import PromptStream
from megatron_mcpo.trainer.collector import Collector, Sampling
from megatron_mcpo.types import Prompt, RolloutGroup


@dataclass(frozen=True, kw_only=True)
class Collected:
    """A step's groups. groups: to be trained on; passed_over: those that they replace; rounds: of replacement."""

    groups: tuple[RolloutGroup, ...]
    passed_over: tuple[RolloutGroup, ...] = ()
    rounds: int = 0

    @property
    def sampled(self) -> tuple[RolloutGroup, ...]:
        """All groups that were sampled: what pass rates and error rates are to be judged by."""
        return self.groups + self.passed_over

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of dynamic sampling, which reporting/metric_table.py describes."""
        return {
            "resample/rounds": float(self.rounds),
            "resample/replaced": float(len(self.passed_over)),
            "resample/prompts": float(len(self.sampled)),
        }


def collect_with_nonzero_advantage(
    collector: Collector, stream: PromptStream, prompts: Sequence[Prompt], sampling: Sampling, *, rounds: int
) -> Collected:
    """Complete and score the prompts, then up to `rounds` times those that replace groups without signal.

    A replacement is the next prompt of the same domain, in the same place of the step. What has no signal after the
    last round stays. No two completions have a seed in common: see `num_seeds`. All ranks call it together.
    """
    collected = Collected(groups=tuple(collector.collect(prompts, sampling)))
    for number in range(1, rounds + 1):
        places = [place for place, group in enumerate(collected.groups) if not group.has_nonzero_advantage]
        if not places:
            break
        fresh = stream.replacements([collected.groups[place].prompt.domain for place in places])
        shifted = replace(sampling, seed=sampling.seed + number * num_seeds(len(prompts), sampling.num_samples))
        collected = _replaced(collected, places, collector.collect(fresh, shifted))
    return collected


def num_seeds(num_prompts: int, num_samples: Sequence[int], *, rounds: int = 0) -> int:
    """How many seeds a step may use: `num_samples` of each domain, after `rounds` of replacement."""
    return (1 + rounds) * num_prompts * max(num_samples)


def _replaced(collected: Collected, places: Sequence[int], groups: Sequence[RolloutGroup]) -> Collected:
    new = dict(zip(places, groups, strict=True))
    return Collected(
        groups=tuple(new.get(place, group) for place, group in enumerate(collected.groups)),
        passed_over=collected.passed_over + tuple(collected.groups[place] for place in places),
        rounds=collected.rounds + 1,
    )
