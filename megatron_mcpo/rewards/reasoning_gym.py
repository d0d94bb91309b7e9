"""Score an answer with the reasoning-gym scorer of its item. Imported by worker processes only (it takes seconds)."""

from functools import cache
from typing import Any

import reasoning_gym

from megatron_mcpo.rewards.allowlist import ALLOWED


def score(entry: dict[str, Any], answer: str) -> float:
    """reasoning-gym's score of `answer`, in [0, 1]. Raises ValueError for an item of a generator that isn't allowed."""
    generator = entry["metadata"]["source_dataset"]
    if generator not in ALLOWED:
        raise ValueError(f"generator {generator!r} is not allowed (megatron_mcpo.rewards.allowlist)")
    return _scorer(generator)(answer, entry)


@cache
def _scorer(generator: str) -> Any:
    return reasoning_gym.get_score_answer_fn(generator)
