r"""Score a response with the reasoning-gym scorer of its item. Imported by worker processes only (it takes seconds).

The scorers compare the text of an answer; most give full marks to the bare answer alone.
"""

from functools import cache
from typing import Any

import reasoning_gym

from megatron_mcpo.rewards.allowlist import ALLOWED
from megatron_mcpo.rewards.boxes import bare_forms


def score(entry: dict[str, Any], response: str) -> float:
    r"""Return reasoning-gym's score, from 0 to 1, of the last \boxed{...}, else of the whole response.

    Markup around it and a full stop behind it do not count. Raises ValueError for an item of a generator that isn't
    allowed.
    """
    generator = entry["metadata"]["source_dataset"]
    if generator not in ALLOWED:
        raise ValueError(f"generator {generator!r} is not allowed (megatron_mcpo.rewards.allowlist)")
    scorer = _scorer(generator)
    return max(scorer(form, entry) for form in bare_forms(response))


@cache
def _scorer(generator: str) -> Any:
    return reasoning_gym.get_score_answer_fn(generator)
