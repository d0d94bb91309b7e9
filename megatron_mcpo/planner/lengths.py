"""Describe how long the responses of a step are: all of the greatest length, or of uneven ones with a known mean.

Uneven lengths are taken as geometrically distributed and cut at the limit: every token is the last with the same
chance. Real ones depend on model and task; their mean, which every run's metrics show, says most of what a step loses.
"""

from dataclasses import dataclass
from functools import cached_property

from megatron_mcpo.config.config import ConfigError

_ROUNDS = 60
"""Halvings of an interval until a float can't be halved any more."""


@dataclass(frozen=True)
class Lengths:
    """The lengths of responses in tokens. limit: of the longest; mean: `limit` if all are equally long"""

    limit: int
    mean: float

    def __post_init__(self) -> None:
        """Raise ConfigError for a mean that such responses can't have."""
        if not 1 <= self.mean <= self.limit:
            raise ConfigError(
                [f"--mean-response {self.mean:g}: must be 1 .. rollout.max_response_tokens = {self.limit}"]
            )

    @cached_property
    def _goes_on(self) -> float:
        """Return the probability p that a response continues after a token: mean = 1 + p + ... + p^(limit - 1)."""
        low, high = 0.0, 1.0
        for _ in range(_ROUNDS):
            middle = (low + high) / 2
            mean = (1 - middle**self.limit) / (1 - middle) if middle < 1 else self.limit
            low, high = (middle, high) if mean < self.mean else (low, middle)
        return high

    def share_longer(self, tokens: float) -> float:
        """Return the share of responses that have more than so many tokens."""
        return self._goes_on**tokens if tokens < self.limit else 0.0

    def any_longer(self, tokens: float, responses: int) -> float:
        """Return the chance that one of so many responses has more than so many tokens."""
        return 1 - (1 - self.share_longer(tokens)) ** responses
