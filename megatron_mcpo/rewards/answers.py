r"""Verifiers that need nothing but the standard library. Each returns 0.0 or 1.0.

entry["answer"] is the item's answer, a text or a number. They raise ValueError or KeyError where it cannot be used:
the item is then wrong, not the response. No text is ever evaluated, and none takes more than linear time, except for
`response_format`, whose pattern is the user's.

A response states its answer in its last complete \boxed{...}; each verifier says what counts where there is none.
"""

import re
import unicodedata
from collections.abc import Mapping
from fractions import Fraction
from functools import cache
from typing import Any

from megatron_mcpo.rewards.boxes import braces_close, last_boxed, where_stated
from megatron_mcpo.rewards.letters import stated_letter
from megatron_mcpo.rewards.number_parser import Number, last_number

Entry = Mapping[str, Any]


def correct_answer(entry: Entry) -> str:
    """Return the item's answer as stripped text. Raises ValueError where it is empty or neither text nor number."""
    value = entry["answer"]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"the item's answer is a {type(value).__name__}, not a text or a number")
    text = str(value).strip()
    if not text:
        raise ValueError("the item's answer is empty")
    return text


def exact(entry: Entry, response: str) -> float:
    """Return 1.0 where the response, or its box, is the item's answer, except for blanks around it."""
    correct = correct_answer(entry)
    boxed = last_boxed(response)
    return float(response.strip() == correct or (boxed is not None and boxed[1].strip() == correct))


_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = re.compile(r"(?P<kept>(?<=[0-9])[.,:/](?=[0-9])|(?<!\w)-(?=[0-9.]))|[^\w\s]|_")


def text(entry: Entry, response: str) -> float:
    """Compare as `exact` does, after SQuAD's normalization: case, articles, punctuation and spacing do not count.

    Unlike in SQuAD's scorer, a number keeps its sign and the marks between its digits: -3.5 is not 35.
    """
    correct = correct_words(entry)
    boxed = last_boxed(response)
    return float(normalized(response) == correct or (boxed is not None and normalized(boxed[1]) == correct))


def correct_words(entry: Entry) -> str:
    """Return the item's answer, normalized. Raises ValueError where nothing is left of it."""
    correct = normalized(correct_answer(entry))
    if not correct:
        raise ValueError("nothing is left of the item's answer without articles and punctuation; use kind exact")
    return correct


def normalized(value: str) -> str:
    """Return a text as kind `text` compares it."""
    folded = unicodedata.normalize("NFKC", value).casefold()
    plain = _PUNCTUATION.sub(_without_punctuation, folded)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def _without_punctuation(match: re.Match[str]) -> str:
    drops = match["kept"] is None and unicodedata.category(match[0]).startswith("P")
    return "" if drops else match[0]


def choice(entry: Entry, response: str) -> float:
    """Return 1.0 where the response states the item's letter (see letters.py) and no other."""
    return float(stated_letter(response) == correct_letter(entry))


def correct_letter(entry: Entry) -> str:
    """Return the letter of the item's answer, which is the letter of one of its `choices` (A: the first) or its text.

    The letter comes first: of the choices O, A, B and AB the answer "A" is O. Raises ValueError where it is neither.
    """
    correct, choices = correct_answer(entry), entry.get("choices") or []
    letter = correct.strip("().[]: ").upper()
    if re.fullmatch("[A-Z]", letter) and (not choices or ord(letter) - ord("A") < len(choices)):
        return letter
    if correct in choices:
        return chr(ord("A") + choices.index(correct))
    if choices:
        raise ValueError(
            f"the item's answer, {correct[:40]!r}, is neither the letter of one of its choices nor its text"
        )
    raise ValueError(f"the item's answer, {correct[:40]!r}, is not a letter, and the item has no choices")


DEFAULT_TOLERANCE = 1e-6

_ROUNDING = 1e-4
"""Largest relative error of a number near 0, unless the tolerance is larger: that of four significant digits."""


def numeric(entry: Entry, response: str, *, tolerance: float | None) -> float:
    """Return 1.0 where the response's number x is the item's number y.

    x is the last number of the box, else of what follows the last ####, else of the response; number_parser.py says
    what a number is. Where the last thing is not a number, as in 10^5, the response is incorrect. A percent sign on one
    side only may be meant either way: 50% is 50 and 0.5.
    tolerance: largest |x - y| / max(1, |y|); besides, |x - y| / |y| must be at most 1e-4, or the tolerance if that is
        larger, so that small numbers differ. None: whole numbers must be equal, others within DEFAULT_TOLERANCE
    """
    correct = correct_number(entry)
    found = last_number(where_stated(response))
    if found is None:
        return 0.0
    readings = [found.value]
    if found.percent != correct.percent:
        readings.append(found.value / 100 if found.percent else found.value * 100)
    return float(any(_is_close(x, correct.value, tolerance) for x in readings))


def _is_close(x: Fraction, y: Fraction, tolerance: float | None) -> bool:
    if tolerance is None and (y == 0 or x.denominator == y.denominator == 1):
        return x == y
    allowed = Fraction(str(DEFAULT_TOLERANCE if tolerance is None else tolerance))
    relative = max(allowed, Fraction(str(_ROUNDING)))
    return abs(x - y) <= allowed * max(Fraction(1), abs(y)) and (y == 0 or abs(x - y) <= relative * abs(y))


def correct_number(entry: Entry) -> Number:
    """Return the number that the item's answer ends in. Raises ValueError where it ends in none."""
    correct = correct_answer(entry)
    number = last_number(where_stated(correct))
    if number is None:
        raise ValueError(
            f"the item's answer, {correct[:50]!r}, does not end in a number that stands for itself (10^5 does not)"
        )
    return number


def check_expression(entry: Entry) -> None:
    """Raise ValueError where the item's answer cannot be an expression: it has unbalanced braces."""
    correct = correct_answer(entry)
    if not braces_close(correct):
        raise ValueError(f"the item's answer, {correct[:50]!r}, has unbalanced braces")


def response_format(entry: Entry, response: str, *, pattern: str) -> float:
    """Return 1.0 where the whole response matches the pattern; a match that never ends is ended with its worker."""
    return float(_compiled(pattern).fullmatch(response) is not None)


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)
