r"""Verifiers that need nothing but the standard library. Each returns 0.0 or 1.0.

entry["answer"] is the right answer, a text or a number. They raise ValueError or KeyError where it is unusable: what is
then wrong is the item, not the response. No text is ever evaluated, and none takes more than linear time, but for
`response_format`, whose pattern is the user's.

A response states its answer in its last complete \boxed{...}; each verifier says what counts where there is none.
"""

import re
import unicodedata
from collections.abc import Mapping
from functools import cache
from typing import Any

from megatron_mcpo.rewards.boxes import braces_close, last_boxed, where_stated
from megatron_mcpo.rewards.letters import stated_letter
from megatron_mcpo.rewards.number_parser import Number, last_number

Entry = Mapping[str, Any]


def right_answer(entry: Entry) -> str:
    """The item's answer as text, stripped. Raises ValueError where it is empty or neither text nor number."""
    value = entry["answer"]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"the item's answer is a {type(value).__name__}, not a text or a number")
    text = str(value).strip()
    if not text:
        raise ValueError("the item's answer is empty")
    return text


def exact(entry: Entry, answer: str) -> float:
    """The response, or what it puts into a box, is the answer, character for character but for blanks around it."""
    right = right_answer(entry)
    boxed = last_boxed(answer)
    return float(answer.strip() == right or (boxed is not None and boxed[1].strip() == right))


_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = re.compile(r"(?P<kept>(?<=[0-9])[.,:/](?=[0-9])|(?<!\w)-(?=[0-9.]))|[^\w\s]|_")


def text(entry: Entry, answer: str) -> float:
    """As `exact`, of texts normalized as in SQuAD's scorer: no case, articles, punctuation, nor number of blanks.

    Unlike there, a number keeps its sign and the marks between its digits: -3.5 is not 35.
    """
    right = _right_text(entry)
    boxed = last_boxed(answer)
    return float(normalized(answer) == right or (boxed is not None and normalized(boxed[1]) == right))


def _right_text(entry: Entry) -> str:
    right = normalized(right_answer(entry))
    if not right:
        raise ValueError("nothing is left of the item's answer without articles and punctuation; use kind exact")
    return right


def normalized(value: str) -> str:
    """A text as kind `text` compares it."""
    folded = unicodedata.normalize("NFKC", value).casefold()
    plain = _PUNCTUATION.sub(_without_punctuation, folded)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def _without_punctuation(match: re.Match[str]) -> str:
    drops = match["kept"] is None and unicodedata.category(match[0]).startswith("P")
    return "" if drops else match[0]


def choice(entry: Entry, answer: str) -> float:
    """The letter that the response states (letters.py says how) is the item's. Several state nothing: 0."""
    return float(stated_letter(answer) == _right_letter(entry))


def _right_letter(entry: Entry) -> str:
    """The item's answer, which is the letter of one of its `choices`, of which A is the first, or else its text.

    The letter comes first: of the choices O, A, B and AB the answer "A" is O.
    """
    right, choices = right_answer(entry), entry.get("choices") or []
    letter = right.strip("().[]: ").upper()
    if re.fullmatch("[A-Z]", letter) and (not choices or ord(letter) - ord("A") < len(choices)):
        return letter
    if right in choices:
        return chr(ord("A") + choices.index(right))
    if choices:
        raise ValueError(f"the item's answer, {right[:40]!r}, is neither the letter of one of its choices nor its text")
    raise ValueError(f"the item's answer, {right[:40]!r}, is no letter, and it has no choices")


def numeric(entry: Entry, answer: str, *, tolerance: float) -> float:
    """The last number of the box, else of what follows the last ####, else of the response, is the item's.

    That is |x - y| / max(1, |y|) <= tolerance, y the item's. What a number is: numerals.py. Where what comes last is
    none, as 10^5, the response is wrong. A percent sign on one side only may be meant either way: 50% is 50 and 0.5.
    """
    right = _right_number(entry)
    found = last_number(where_stated(answer))
    if found is None:
        return 0.0
    readings = [found.value]
    if found.percent != right.percent:
        readings.append(found.value / 100 if found.percent else found.value * 100)
    return float(any(abs(x - right.value) <= tolerance * max(1.0, abs(right.value)) for x in readings))


def _right_number(entry: Entry) -> Number:
    right = right_answer(entry)
    number = last_number(where_stated(right))
    if number is None:
        raise ValueError(f"the item's answer, {right[:50]!r}, ends in no number that stands for itself (10^5 does not)")
    return number


def check_answer(kind: str, entry: Entry) -> None:
    """Raise ValueError where this kind of verifier can't use the item's answer, as far as that is cheap to know."""
    if kind == "choice":
        _right_letter(entry)
    elif kind == "numeric":
        _right_number(entry)
    elif kind == "text":
        _right_text(entry)
    elif kind == "math" and not braces_close(right_answer(entry)):
        raise ValueError(f"the item's answer, {right_answer(entry)[:50]!r}, has a brace without its other one")


def response_format(entry: Entry, answer: str, *, pattern: str) -> float:
    """The whole response matches the pattern. One that backtracks without end is ended with its worker."""
    return float(_compiled(pattern).fullmatch(answer) is not None)


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)
