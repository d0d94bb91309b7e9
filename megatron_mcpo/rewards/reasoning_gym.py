"""Score a response with the reasoning-gym scorer of its item. Imported by worker processes only (it takes seconds)."""

from functools import cache
from typing import Any

import reasoning_gym

from megatron_mcpo.rewards.allowlist import ALLOWED


def score(entry: dict[str, Any], response: str) -> float:
    """Return reasoning-gym's score, from 0 to 1. Raises ValueError for an item of a generator that isn't allowed."""
    generator = entry["metadata"]["source_dataset"]
    if generator not in ALLOWED:
        raise ValueError(f"generator {generator!r} is not allowed (megatron_mcpo.rewards.allowlist)")
    return _scorer(generator)(response, entry)


@cache
def _scorer(generator: str) -> Any:
    return reasoning_gym.get_score_answer_fn(generator)
