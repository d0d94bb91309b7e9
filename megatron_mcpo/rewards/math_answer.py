r"""Compare responses with the item's answer as expressions, by math-verify. Imported by worker processes only.

math-verify's own time limits are off: they are SIGALRM's, which the worker needs, and they would make an answer that
takes too long incorrect. The worker's deadline takes their place. It never evaluates text: what is not LaTeX is
handed to sympy's parser only if it consists of digits and operators.
"""

import logging
import re
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, grader, parse, verify

from megatron_mcpo.rewards import math_verify_fixes
from megatron_mcpo.rewards.answers import correct_answer
from megatron_mcpo.rewards.boxes import after_hashes, last_boxed
from megatron_mcpo.rewards.latex import as_latex, is_bare, last_statement, marked, without_emphasis
from megatron_mcpo.rewards.plain_text import equal_as_text

math_verify_fixes.apply()
logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off

_ROUNDING = 0.01
"""Largest relative error of a decimal that an equation may have."""

_SIDE = r"(?:[0-9 .+*/()^-]|\\times|\\cdot|\\[dt]?frac\{[0-9]{1,50}\}\{[0-9]{1,50}\}){1,200}"
_EQUATION = re.compile(
    r"(?:^|(?<![0-9]),[ ]|[.;:!?][ ]|\b(?:so|thus|hence|therefore|then|gets?|gives?|have|that|since|because|is)[ ])"
    rf"(?P<sides>{_SIDE}(?:={_SIDE})+)$",
    re.IGNORECASE,
)
_PRODUCT = re.compile(r"[0-9)] ?\(|\) ?[0-9]")
"""A product without a sign: math-verify reads (6)(7) as 13."""

_LONGEST_END = 2000
"""Characters at the end of a response without a box that are searched: its patterns take quadratic time."""


def score(entry: dict[str, Any], response: str) -> float:
    r"""Return 1.0 where the last \boxed{...}, else the expression that the response ends in, equals the item's answer.

    What can't be read as an expression, or not be compared, is not equal; a box is read whole or not at all. An item's
    answer may be LaTeX, a plain number or GSM8K's "... #### 42". Decimals equal a number where both agree in 6 decimal
    places and 4 significant digits; all other numbers are compared exactly. Equations between different numbers, as
    in 7 = 6, state nothing. Raises ValueError where the item's answer can't be read or is not equal to itself.
    """
    correct = _expressions_of(correct_answer(entry))
    stated = expressions(response)
    as_text = equal_as_text(str(correct[-1]), str(stated[-1])) if stated else None
    if as_text is not None:
        return float(as_text)
    return float(verify(correct, stated, allow_set_relation_comp=True, timeout_seconds=None))


def expressions(response: str) -> list[Any]:
    """Return what a response states: an expression, if it can be read, and its text; nothing where it has neither."""
    boxed = last_boxed(response)
    if boxed is None:
        return _found(after_hashes(response)[-_LONGEST_END:])
    found = _read(boxed[1])
    has_base = "_" in boxed[1]  # which is not read: 110_2 = 6_{10}
    return [] if not has_base and any(map(_is_contradiction, found)) else found


@lru_cache(maxsize=1024)
def _expressions_of(answer: str) -> list[Any]:
    """Read the item's answer. Raises ValueError where that can't be done."""
    boxed = last_boxed(answer)
    found = _read(boxed[1] if boxed else after_hashes(answer).strip("$"))
    if not verify(found, found, timeout_seconds=None):
        raise ValueError(f"the item's answer, {answer[:100]!r}, can't be read as an expression")
    return found


def _read(content: str) -> list[Any]:
    """Read all of a box: math-verify's search for expressions would take 3 of a box that says "not 3"."""
    return list(parse(f"\\boxed{{{as_latex(content)}}}", [LatexExtractionConfig()], parsing_timeout=None))


def _found(end: str) -> list[Any]:
    """Read the last line where it is a formula, else find the last expression of a text without a box.

    An equation is taken for a contradiction only where it is arithmetic with numbers that stands for itself, at the end
    of the last line: at its start, behind a mark of punctuation, or behind a word such as "so". In "15% of 80 = 12" it
    does not. The last line may also be a derivation in notation that math-verify does not read, as in 27 mod 15 = 12:
    then the last expression counts.
    """
    statement = last_statement(end)
    if _is_false_arithmetic(statement):
        return []
    found = _read(statement) if is_bare(statement) else []
    if found and not ("=" in statement and _is_derivation(found[0])):
        return found
    return list(parse(marked(without_emphasis(end)), parsing_timeout=None))


def _is_false_arithmetic(statement: str) -> bool:
    """Tell whether a statement ends in an equation of numbers, standing for itself, that does not hold."""
    equation = _EQUATION.search(as_latex(statement))
    if equation is None or _PRODUCT.search(equation["sides"]):
        return False
    return any(map(_is_contradiction, _read(equation["sides"])))


def _is_derivation(expression: Any) -> bool:
    """Tell whether a formula could not be read, does not hold as read, or holds equations that name no variable."""
    if isinstance(expression, grader.FiniteSet):
        return any(grader.is_equation(each) and not each.args[0].is_Symbol for each in expression.args)
    return isinstance(expression, str) or _is_contradiction(expression)


def _is_contradiction(expression: Any) -> bool:
    """Tell whether an equation, or a chain of them, has two sides that are different numbers."""
    if not grader.is_equation(expression):
        return False
    equations = [expression] if isinstance(expression, grader.Eq) else expression.args
    return any(
        all(side.is_number for side in equation.args) and not _about_equal(*equation.args) for equation in equations
    )


def _about_equal(left: Any, right: Any) -> bool:
    """Tell whether two numbers are equal, or may be where one of them is rounded: 2/3 = 0.67."""
    if verify(left, right, timeout_seconds=None):
        return True
    if not left.has(grader.Float) and not right.has(grader.Float):
        return False
    return bool(abs((left - right).evalf()) <= _ROUNDING * abs(right.evalf()))
