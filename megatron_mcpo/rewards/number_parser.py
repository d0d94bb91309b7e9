r"""Read the number that a text ends in, where it stands for itself. Standard library only; linear time.

A number may have a sign (also the Unicode minus), a currency sign, separators between groups of three digits (a comma,
and LaTeX's {,} \! ,\! and \,), a decimal point, an exponent, a percent sign; it may be a fraction, mixed number (1 3/4)
or \frac{3}{4}. Behind it there may be a unit: letters, \text{...} or degrees, with a power: cm^2, m/s^2. Only x, y and
z, and n directly behind it, are variables.

A number that is part of an expression does not count: 10^5, \sqrt{2}, 3\pi, 10-5, 2x, x+3. Nor does one that can't be
read: 3,14, 1/2/2024, 3:45, 1 234. Its tail must not be taken for it. A dash between blanks is punctuation after a word,
and a list's at the start of a line.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, kw_only=True)
class Number:
    """A number of a text. percent: a percent sign follows, so that 50% may be meant as 50 and as 0.5."""

    value: Fraction
    percent: bool


_SEPARATOR = re.compile(r"(?<=[0-9])(?:\{,\}|,?\\!|\\,)(?=[0-9])")
_TEXT = r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mbox|operatorname)\s?\{"
_BLANK = r"(?:[ \t~\xa0]|\\[,;: !])"
_UNIT_WORD = rf"(?:{_TEXT}[^{{}}]{{0,99}}\}}|[A-Za-z]++)(?:\^\{{?[-−]?[0-9]\}}?|[0-9²³])?(?!\w)"
_UNIT = (
    rf"(?:\^\{{?\\circ\}}?|{_BLANK}?(?:°|\\degree|\\circ))?"
    rf"(?:(?!n(?![A-Za-z])){_BLANK}*+(?![xyz](?![A-Za-z]))(?:(?:square|cubic|sq\.?|cu\.?)\s)?"
    rf"{_UNIT_WORD}(?:/{_UNIT_WORD})*)?"
)
_TOKEN = re.compile(
    r"(?P<number>(?:(?P<whole>[0-9]{1,300})[ \t]?)?"
    r"\\[dt]?frac\{(?P<top>[-−]?[0-9]{1,300})\}\{(?P<bottom>[0-9]{1,300})\}"
    r"|(?P<digits>\.?[0-9][0-9.,/]*(?:[eE][-+]?[0-9]+)?))"
    rf"(?P<percent>\s?\\?%)?{_UNIT}"
    r"|(?P<line>\n\s*)"
    rf"|(?P<blank>(?:{_BLANK}|\s)+)"
    rf"|(?P<wrap>{_TEXT}|\\?[$€£]|\\[(\[])"
    r"|(?P<open>(?:\\left)?[({\[])"
    r"|(?P<close>(?:\\right)?[)}\]])"
    r"|(?P<mark>\*\*?|_)"
    r"|(?P<sign>[-+−–])"
    r"|(?P<operator>[\^/×·÷±√∛∜]|\\(?:[dtc]?frac|sqrt|times|cdot|div|pm|mp|ast|[dt]?binom|overline|pi|theta|phi|infty"
    r"|exp|log|ln|lg|(?:arc)?(?:sin|cos|tan)|cot|sec|csc|sum|prod|int|lim|max|min|gcd|lcm|[pb]?mod|lfloor|lceil)"
    r"(?![A-Za-z]))"
    r"|(?P<word>[^\W\d_]\w*)"
    r"|(?P<other>\\[A-Za-z]+|.)",
    re.DOTALL,
)
_PLAIN = re.compile(r"(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?P<part>\.[0-9]*)?(?P<exponent>[eE][-+]?[0-9]{1,3})?")
_MOST_DIGITS = 1000
_DIGIT = re.compile("[0-9]")

_Token = re.Match[str]


def last_number(text: str) -> Number | None:
    """Return the last number of a text; None where it has none, or the last is part of an expression or not finite."""
    lines = _SEPARATOR.sub(",", text).split("\n")
    for row in range(len(lines) - 1, -1, -1):  # neither numbers nor expressions span lines
        if not _DIGIT.search(lines[row]):
            continue
        tokens = list(_TOKEN.finditer("\n" + lines[row] if row else lines[row]))
        place = next((n for n in range(len(tokens) - 1, -1, -1) if tokens[n]["number"]), None)
        if place is not None:
            return _number_at(tokens, place)
    return None


def _number_at(tokens: Sequence[_Token], place: int) -> Number | None:
    if _is_continued(tokens, place) or _is_factorial(tokens):
        return None
    is_mixed = _is_mixed(tokens, place)
    size, sign = _size_of(tokens[place]), _sign(tokens, place - 2 * is_mixed)
    if size is not None and is_mixed:
        size += Fraction(tokens[place - 2]["digits"])
    if not sign or size is None:
        return None
    return Number(value=sign * size, percent=tokens[place]["percent"] is not None)


def _kind(tokens: Sequence[_Token], place: int) -> str:
    """Return the group's name of a token; "end" beyond both ends of the text."""
    if not 0 <= place < len(tokens):
        return "end"
    token = tokens[place]
    return "number" if token["number"] else token.lastgroup or "other"


def _is_continued(tokens: Sequence[_Token], place: int) -> bool:
    """Tell whether an expression continues after the number."""
    after = place + 1
    kind = _kind(tokens, after)
    if kind == "word":  # directly behind it, and no unit: 2n, 0x1F, 5², 1½
        return tokens[after][0] in "nxyzπθ" or any(map(str.isnumeric, tokens[after][0]))
    if kind == "mark" and tokens[after][0] == "_":
        return _kind(tokens, after + 1) in ("number", "open", "word")
    after += kind == "blank"
    kind = _kind(tokens, after)
    if kind == "operator":
        return True
    may_be_operator = kind == "sign" or (kind == "mark" and tokens[after][0] == "*")
    if may_be_operator or kind == "open":
        after += 1
        after += _kind(tokens, after) == "blank"
        return _kind(tokens, after) in ("operator", "open") or _is_variable(tokens, after)
    return _is_variable(tokens, after)


def _is_variable(tokens: Sequence[_Token], place: int) -> bool:
    return _kind(tokens, place) == "word" and tokens[place][0] in ("x", "y", "z", "π", "θ")


def _is_factorial(tokens: Sequence[_Token]) -> bool:
    """Tell whether number and exclamation marks are the whole text: in "It is 5!" the mark ends a sentence."""
    others = {token[0] for token in tokens if token.lastgroup not in ("blank", "wrap", "open", "close")}
    return len(others) == 2 and "!" in others


def _sign(tokens: Sequence[_Token], place: int) -> int:
    """Return 1 or -1; 0 where the number is an operand of what stands in front of it."""
    before, blank = _outside(tokens, place)
    kind = _kind(tokens, before)
    if before == _BOUND or kind == "operator":
        return 0
    if kind == "sign":
        return _signed(tokens, before, blank=blank)
    left = before - 1 - (_kind(tokens, before - 1) == "blank")
    if kind == "mark":  # of a product: what opens or closes bold face has been passed
        return 0
    if kind == "word":
        is_times = tokens[before][0] == "x" and _kind(tokens, left) == "number"
        return int(blank and not is_times)
    if kind == "number":
        return int(blank and not _are_groups(tokens[before], tokens[place]))
    if kind == "close":
        return int(blank or tokens[before][0] != ")")
    is_ratio = kind == "other" and tokens[before][0] == ":" and _kind(tokens, before - 1) == "number" and not blank
    return int(not is_ratio)


_BOUND = -2
"""Instead of a place: an argument, as in f(2), or a factor."""


def _outside(tokens: Sequence[_Token], place: int) -> tuple[int, bool]:
    """Return the place of what precedes a number and its opening brackets and marks, and whether a blank follows it."""
    before, blank = place - 1, False
    while (kind := _kind(tokens, before)) in ("blank", "wrap", "open", "mark"):
        in_front = _kind(tokens, before - 1)
        if kind == "open" and in_front in ("word", "number", "close"):
            return _BOUND, False
        if kind == "mark" and not _is_markup(tokens, before, blank=blank):
            break
        blank = blank or kind != "open"
        before -= 1
    return before, blank


def _is_markup(tokens: Sequence[_Token], place: int, *, blank: bool) -> bool:
    """Tell whether a star or underscore makes bold face or a list rather than a product. blank: one follows it."""
    in_front = _kind(tokens, place - 1)
    if in_front == "blank":
        operand = _kind(tokens, place - 2) in ("number", "close")
        return not (blank and operand)
    if in_front in ("number", "close", "word"):
        return blank and tokens[place][0] != "*"
    return True


def _signed(tokens: Sequence[_Token], place: int, *, blank: bool) -> int:
    """Return what `_sign` does for a number with a plus or minus in front. blank: one lies between the two."""
    mark = tokens[place][0]
    apart = _kind(tokens, place - 1) == "blank"
    left = place - 1 - apart
    while _kind(tokens, left) == "mark":
        left -= 1
    kind = _kind(tokens, left)
    sign = -1 if mark in "-−" else 1
    if kind in ("number", "operator", "sign"):
        return 0
    if kind == "close":
        return sign if apart and not blank else 0
    if kind == "word":
        is_dash = blank and mark != "+" and len(tokens[left][0]) > 1
        return 1 if is_dash else sign if apart and not blank else 0
    return 1 if kind == "line" and blank else sign


def _are_groups(left: _Token, right: _Token) -> bool:
    """Tell whether two numbers side by side may be one with a blank between its thousands."""
    return bool(re.fullmatch("[0-9]{1,3}", left[0]) and re.fullmatch(r"[0-9]{3}\b.*", right[0], re.DOTALL))


def _is_mixed(tokens: Sequence[_Token], place: int) -> bool:
    """Tell whether a fraction with a slash has a whole number in front of it: 1 3/4."""
    if place < 2 or _kind(tokens, place - 1) != "blank" or "/" not in (tokens[place]["digits"] or ""):
        return False
    return re.fullmatch("[0-9]{1,300}", tokens[place - 2][0]) is not None


def _size_of(token: _Token) -> Fraction | None:
    if not token["top"]:
        return _size(token["digits"].rstrip(".,/"))
    size = _fraction(token["top"].replace("−", "-"), token["bottom"])
    return size + Fraction(token["whole"]) if size is not None and token["whole"] else size


def _size(digits: str) -> Fraction | None:
    if "/" in digits:
        top, _, bottom = digits.partition("/")
        return _fraction(top, bottom)
    plain = _PLAIN.fullmatch(digits)
    can_be_computed = len(digits) <= _MOST_DIGITS and plain and (plain["whole"] or plain["part"])
    return Fraction(digits.replace(",", "")) if can_be_computed else None


def _fraction(top: str, bottom: str) -> Fraction | None:
    numerator, denominator = (_size(part.removeprefix("-")) if "/" not in part else None for part in (top, bottom))
    if numerator is None or not denominator:
        return None
    return (-numerator if top.startswith("-") else numerator) / denominator
