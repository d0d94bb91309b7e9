r"""Is a response equal to the item's answer as an expression? By math-verify. Imported by worker processes only.

math-verify's own time limits are off: they are SIGALRM's, which the worker needs, and they would turn an answer that
takes too long into a wrong one. The worker's deadline takes their place. It never evaluates text: what is not LaTeX is
handed to sympy's parser only if it consists of digits and operators.
"""

from functools import lru_cache
from typing import Any

from math_verify import parse, verify

from megatron_mcpo.rewards.answers import right_answer
from megatron_mcpo.rewards.boxes import after_hashes, last_boxed

_LONGEST_END = 2000
"""Characters at the end of a response without a box that are searched: its patterns take quadratic time."""


def score(entry: dict[str, Any], answer: str) -> float:
    r"""1.0 where the last \boxed{...}, or without one the last expression near the end, equals the item's answer.

    What can't be read as an expression, or not be compared, is not equal. An item's answer may be LaTeX, a plain
    number or GSM8K's "... #### 42". Raises ValueError where it can't be read or is not equal to itself.
    """
    right = _right_expressions(right_answer(entry))
    boxed = last_boxed(answer)
    stated = f"\\boxed{{{boxed[1]}}}" if boxed else after_hashes(answer)[-_LONGEST_END:]
    return float(verify(right, parse(stated, parsing_timeout=None), timeout_seconds=None))


@lru_cache(maxsize=1024)
def _right_expressions(right: str) -> list[Any]:
    boxed = last_boxed(right)
    content = boxed[1] if boxed else after_hashes(right).strip("$")
    expressions = parse(f"\\boxed{{{content}}}", parsing_timeout=None)
    if not verify(expressions, expressions, timeout_seconds=None):
        raise ValueError(f"the item's answer, {right[:100]!r}, can't be read as an expression")
    return list(expressions)
