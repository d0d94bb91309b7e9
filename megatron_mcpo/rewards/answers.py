r"""Verifiers that need nothing but the standard library. Each returns 0.0 or 1.0.

entry["answer"] is the right answer, a text or a number. They raise ValueError or KeyError where it is unusable: what is
then wrong is the item, not the response. No text is ever evaluated, and none takes more than linear time, but for
`response_format`, whose pattern is the user's.

A response states its answer in its last complete \boxed{...}; each verifier says what counts where there is none.
"""

import math
import re
import unicodedata
from functools import cache
from typing import Any

Entry = dict[str, Any]

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def right_answer(entry: Entry) -> str:
    """The item's answer as text, stripped. Raises ValueError where it is empty or neither text nor number."""
    value = entry["answer"]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"the item's answer is a {type(value).__name__}, not a text or a number")
    text = str(value).strip()
    if not text:
        raise ValueError("the item's answer is empty")
    return text


def last_boxed(text: str) -> tuple[int, str] | None:
    r"""Position and content of the last \boxed{...} whose braces close; escaped braces don't count."""
    opened: list[tuple[int, int]] = []
    last: tuple[int, int, int] | None = None
    for match in _BRACES.finditer(text):
        token = match[0]
        if token == "{" or token.startswith("\\boxed"):
            opened.append((match.start(), match.end() if token != "{" else -1))
        elif token == "}" and opened:
            start, content = opened.pop()
            if content >= 0 and (last is None or start > last[0]):
                last = (start, content, match.start())
    return (last[0], text[last[1] : last[2]]) if last else None


def after_hashes(text: str) -> str:
    """What follows the last ####, as in GSM8K's answers; all of it where there is none."""
    return text.rpartition("####")[2].strip()


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
    right = _normalized(right_answer(entry))
    if not right:
        raise ValueError("nothing is left of the item's answer without articles and punctuation; use kind exact")
    boxed = last_boxed(answer)
    return float(_normalized(answer) == right or (boxed is not None and _normalized(boxed[1]) == right))


def _normalized(value: str) -> str:
    folded = unicodedata.normalize("NFKC", value).casefold()
    plain = _PUNCTUATION.sub(_without_punctuation, folded)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def _without_punctuation(match: re.Match[str]) -> str:
    drops = match["kept"] is None and unicodedata.category(match[0]).startswith("P")
    return "" if drops else match[0]


# A statement: "the answer is (B)", "Answer: B", "final answer: **B**". What follows it must be a letter.
_STATEMENT = re.compile(r"\banswer\b(?:\s+is\b(?:\s*:)?|\s*:)\s*", re.IGNORECASE)
_MARKUP = r"[\s*_$\"'`\[]*+"  # possessive: two in a row would try every way to share the text out
_LABEL = re.compile(
    rf"{_MARKUP}(?:(?i:option|choice)\b{_MARKUP})?"
    rf"(?:\(\s*(?P<bracketed>[A-Za-z])\s*\)|(?P<bare>[A-Z])(?![\w'’])|(?P<small>[a-z])(?={_MARKUP}(?:[].):,;]|$)))",
)
_ANOTHER = re.compile(
    rf"[).\]:]?{_MARKUP}(?:,|/|&|\+|\bor\b|\band\b){_MARKUP}(?:or\b|and\b)?{_MARKUP}\(?[A-Za-z](?![\w'’])"
)
_WRAPPED = re.compile(r"\s*\\(?:text|textbf|textit|mathrm|mathbf|textrm)\s*\{([^{}]*)\}\s*")
_OTHER_LABEL = re.compile(r"(?<![\w])\(?[A-Z][).:](?!\w)")


def choice(entry: Entry, answer: str) -> float:
    r"""The letter that the response states last, in a box or after "answer is" or "answer:", is the item's.

    Without such a statement the whole response must be a letter, as in "B", "(b)", "**B.**", or an option as in
    "B. bank". Several letters ("A or B") state nothing: 0. So does a bare A or I before another word, which is a word
    of the language ("the answer is A bank").
    """
    return float(_stated_letter(answer) == _right_letter(entry))


def _right_letter(entry: Entry) -> str:
    """The item's answer, which is a letter or one of its `choices`, of which A is the first."""
    right = right_answer(entry)
    choices = entry.get("choices") or []
    if right in choices:
        return chr(ord("A") + choices.index(right))
    letter = right.strip("().[]: ").upper()
    if not re.fullmatch("[A-Z]", letter):
        raise ValueError(f"the item's answer is {right[:20]!r}, neither a letter nor one of its choices")
    return letter


def _stated_letter(answer: str) -> str | None:
    boxed = last_boxed(answer)
    statement = max(_STATEMENT.finditer(answer), key=re.Match.start, default=None)
    if boxed is not None and (statement is None or boxed[0] >= statement.start()):
        return _letter_alone(boxed[1])
    if statement is not None:
        return _letter_first(answer, statement.end())
    return _letter_alone(answer)


def _letter_alone(value: str) -> str | None:
    """The letter of a text that is one, or an option with its letter in front."""
    while wrapped := _WRAPPED.fullmatch(value):
        value = wrapped[1]
    label = _LABEL.match(value)
    if label is None:
        return None
    rest = value[label.end() :]
    if not rest.strip(" \t\n\r*_$\"'`.):]"):
        return _letter(label)
    is_option = label["bracketed"] or rest[0] in ".):"
    return _letter_first(value, 0) if is_option and not _OTHER_LABEL.search(rest) else None


def _letter_first(value: str, start: int) -> str | None:
    """The letter that a text has at `start`; None where another one is offered with it."""
    label = _LABEL.match(value, start)
    if label is None or _ANOTHER.match(value, label.end()):
        return None
    is_word = label["bare"] in ("A", "I") and re.compile(r"[ \t]+\w").match(value, label.end())
    return None if is_word else _letter(label)


def _letter(label: re.Match[str]) -> str:
    return (label["bracketed"] or label["bare"] or label["small"]).upper()


_NUMBER = re.compile(
    r"(?<![\w.,/])"
    r"(?P<sign>(?<![\w)\]}%.])[-+−])?(?:\\?[$€£])?(?P<sign2>(?<=[$€£])[-−])?"
    r"(?:\\[dt]?frac\{(?P<top>[0-9]{1,300})\}\{(?P<bottom>[0-9]{1,300})\}|(?P<digits>[0-9.][0-9.,/]*(?:[eE][-+]?[0-9]+)?))"
    r"(?P<percent>\s?\\?%)?"
)
_PLAIN = re.compile(r"(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?P<part>\.[0-9]*)?(?P<exponent>[eE][-+]?[0-9]+)?")
_DIGIT = re.compile("[0-9]")
_MIXED = re.compile(r"(?<![\w.,/])([0-9]+)[ \t]$")


def numeric(entry: Entry, answer: str, *, tolerance: float) -> float:
    r"""The last number of the box, else of what follows the last ####, else of the response, is the item's.

    That is |x - y| / max(1, |y|) <= tolerance, y the item's. A number may have a sign (also the Unicode minus, but not
    one that is an operator: 10-5 ends in 5), a currency sign, commas between groups of three digits, a decimal point,
    an exponent; it may be a fraction, mixed number (1 3/4) or \frac{3}{4}. A percent sign on one side only may be
    meant either way: 50% is 50 and 0.5. Anything else that has digits (3,14 or 1/2/2024) is no number: 0 where it
    comes last.
    """
    right = _last_number(_where_stated(right_answer(entry)))
    if right is None:
        raise ValueError(f"the item's answer, {right_answer(entry)[:50]!r}, ends in no number")
    found = _last_number(_where_stated(answer))
    if found is None:
        return 0.0
    (x, x_percent), (y, y_percent) = found, right
    readings = [x] if x_percent == y_percent else [x, x / 100 if x_percent else x * 100]
    return float(any(abs(reading - y) <= tolerance * max(1.0, abs(y)) for reading in readings))


def _where_stated(value: str) -> str:
    boxed = last_boxed(value)
    return boxed[1] if boxed else after_hashes(value)


def _last_number(value: str) -> tuple[float, bool] | None:
    """The last number and whether a percent sign follows; None where what comes last is none, or is not finite."""
    numbers = (match for match in _NUMBER.finditer(value) if match["top"] or _DIGIT.search(match["digits"]))
    last = max(numbers, key=re.Match.start, default=None)
    if last is None:
        return None
    size = _fraction(last["top"], last["bottom"]) if last["top"] else _size(last["digits"].rstrip(".,/"))
    if "/" in (last["digits"] or "") and size is not None and (mixed := _MIXED.search(value, 0, last.start())):
        size += float(mixed[1])
    if size is None or not math.isfinite(size):
        return None
    negative = (last["sign"] or last["sign2"] or "+") != "+"
    return (-size if negative else size), last["percent"] is not None


def _size(digits: str) -> float | None:
    if "/" in digits:
        top, _, bottom = digits.partition("/")
        return _fraction(top, bottom)
    plain = _PLAIN.fullmatch(digits)
    return float(digits.replace(",", "")) if plain and (plain["whole"] or plain["part"]) else None


def _fraction(top: str, bottom: str) -> float | None:
    numerator, denominator = (_size(part) if "/" not in part else None for part in (top, bottom))
    return numerator / denominator if numerator is not None and denominator else None


def response_format(entry: Entry, answer: str, *, pattern: str) -> float:
    """The whole response matches the pattern. One that backtracks without end is ended with its worker."""
    return float(_compiled(pattern).fullmatch(answer) is not None)


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)
