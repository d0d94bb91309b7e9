r"""Compare responses with the item's answer as expressions, by math-verify. Imported by worker processes only.

math-verify's own time limits are off: they are SIGALRM's, which the worker needs, and they would make an answer that
takes too long incorrect. The worker's deadline takes their place. It never evaluates text: what is not LaTeX is
handed to sympy's parser only if it consists of digits and operators.
"""

from functools import lru_cache
from typing import Any

from math_verify import parse, verify

from megatron_mcpo.rewards.answers import correct_answer
from megatron_mcpo.rewards.boxes import after_hashes, last_boxed

_LONGEST_END = 2000
"""Characters at the end of a response without a box that are searched: its patterns take quadratic time."""


def score(entry: dict[str, Any], response: str) -> float:
    r"""Return 1.0 where the last \boxed{...}, or else the last expression near the end, equals the item's answer.

    What can't be read as an expression, or not be compared, is not equal. An item's answer may be LaTeX, a plain
    number or GSM8K's "... #### 42". Raises ValueError where it can't be read or is not equal to itself.
    """
    correct = _expressions_of(correct_answer(entry))
    boxed = last_boxed(response)
    stated = f"\\boxed{{{boxed[1]}}}" if boxed else after_hashes(response)[-_LONGEST_END:]
    return float(verify(correct, parse(stated, parsing_timeout=None), timeout_seconds=None))


@lru_cache(maxsize=1024)
def _expressions_of(answer: str) -> list[Any]:
    """Read the item's answer. Raises ValueError where that can't be done."""
    boxed = last_boxed(answer)
    content = boxed[1] if boxed else after_hashes(answer).strip("$")
    expressions = parse(f"\\boxed{{{content}}}", parsing_timeout=None)
    if not verify(expressions, expressions, timeout_seconds=None):
        raise ValueError(f"the item's answer, {answer[:100]!r}, can't be read as an expression")
    return list(expressions)
