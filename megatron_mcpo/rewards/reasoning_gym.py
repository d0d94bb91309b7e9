r"""Score a response with the reasoning-gym scorer of its item. Imported by worker processes only (it takes seconds).

The scorers compare the text of an answer; most give full marks to the bare answer alone.
"""

import re
from functools import cache
from typing import Any

import reasoning_gym

from megatron_mcpo.rewards.allowlist import ALLOWED
from megatron_mcpo.rewards.boxes import last_boxed

_WRAPPED = re.compile(r"\\text\{([^{}]*)\}|\*\*([^*]+)\*\*|\$([^$]+)\$|`([^`]+)`")


def score(entry: dict[str, Any], response: str) -> float:
    r"""Return reasoning-gym's score, from 0 to 1, of the last \boxed{...}, else of the whole response.

    Markup around it and a full stop behind it do not count. Raises ValueError for an item of a generator that isn't
    allowed.
    """
    generator = entry["metadata"]["source_dataset"]
    if generator not in ALLOWED:
        raise ValueError(f"generator {generator!r} is not allowed (megatron_mcpo.rewards.allowlist)")
    scorer = _scorer(generator)
    return max(scorer(form, entry) for form in _forms(response))


def _forms(response: str) -> list[str]:
    """Return what a response may state, from the whole to the barest."""
    boxed = last_boxed(response)
    forms = [boxed[1].strip() if boxed else response]
    while wrapped := _WRAPPED.fullmatch(forms[-1].removesuffix(".")):
        forms.append(wrapped[wrapped.lastindex or 0].strip())
    if forms[-1].endswith("."):
        forms.append(forms[-1].removesuffix("."))
    return forms


@cache
def _scorer(generator: str) -> Any:
    return reasoning_gym.get_score_answer_fn(generator)
