r"""Read the number that a text ends in, where it stands for itself. Standard library only; linear time.

A number may have a sign, a currency sign, separators between groups of three digits (a comma, and LaTeX's {,} \! and
\,), a decimal point, an exponent (1e5, 1.2 \times 10^5), a percent sign; it may be a fraction, mixed number (1 3/4, 1½)
or \frac{3}{4}. Behind it there may be a unit: letters, \text{...} or degrees, with a power: cm^2, m/s^2. Only x, y and
z, and n directly behind it, are variables.

A number that is part of an expression does not count: 10^5, \sqrt{2}, 3\pi, 10-5, 2x, x+3. Nor does one that can't be
read: 3,14, 1/2/2024, 3:45, 1 234. Its tail must not be taken for it. A dash between blanks is punctuation after a word,
and a list's at the start of a line.

Written by hand because math-verify finds 45 of the 138 numbers of the tests wrong: it reads 5 of 5x, 10 km - 5 and 5!.
"""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, kw_only=True)
class Number:
    """A number of a text. percent: a percent sign follows, so that 50% may be meant as 50 and as 0.5."""

    value: Fraction
    percent: bool


_Token = re.Match[str]

_MOST_DIGITS = 1000

_BLANK = r"(?:[ \t~\xa0]|\\[,;: !])"
_PLAINER: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile("[！-～]|[¼-¾⅐-⅞]"), lambda m: _plain_character(m[0])),
    (re.compile("[−\u2011]"), "-"),
    (re.compile(r"(?<=[0-9])(?:\{,\}|,?\\!|\\,)(?=[0-9])"), ","),
    (re.compile(r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mbox|operatorname)\s?\{([^{}]{0,99})\}"), r"\1"),
    (re.compile(r"(?<=\w)\\?[$€£](?=[0-9])"), " "),
    (re.compile(r"\\(?:left|right)(?![A-Za-z])|\\?[$€£]|\\[()\[\]]"), ""),
    (re.compile(r"(?<![\w)}\]*])(\*{1,3}|__?)(?=[^\s*])([^*\n]{1,200}?)(?<=\S)\1(?![\w*({\[])"), r"\2"),
    (re.compile(r"(?:([0-9]) ?)?\\[dt]?frac\{(-?[0-9]{1,300})\}\{([0-9]{1,300})\}"), lambda m: _plain_fraction(m)),
    (
        re.compile(
            r"(?<![\w.,/])([0-9][0-9,]{0,30}(?:\.[0-9]{0,30})?) ?(?:\*|×|\\times|\\cdot) ?"
            r"10(?:\^|\*\*)(\{)?(-?[0-9]{1,3})(?(2)\})(?![0-9])"
        ),
        r"\1e\3",
    ),
    (re.compile(rf"\^\{{?\\circ\}}?|{_BLANK}?(?:°|\\degree|\\circ)"), ""),
    (re.compile(rf"{_BLANK}+"), " "),
]
"""What to replace in a line, in this order, so that fewer ways to write a number are left."""

_WORD = r"[A-Za-z]++(?:\^\{?-?[0-9]\}?|[0-9²³])?(?!\w)"
_TOKEN = re.compile(
    r"(?:(?P<whole>(?<![^\W_])(?<![.,/])[0-9]{1,300}) (?=[0-9]{1,300}/[0-9]))?"
    r"(?<![^\W_])(?<!\.)(?P<digits>\.?[0-9][0-9.,/]*(?:[eE][-+]?[0-9]+)?)(?P<percent> ?\\?%)?"
    rf"(?P<unit>(?!n(?![A-Za-z])) ?(?![xyz](?![A-Za-z]))(?:(?:square|cubic|sq\.?|cu\.?) )?{_WORD}(?:/{_WORD})*)?"
)
_DIGITS = re.compile(r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]*)?(?:[eE][-+]?[0-9]{1,3})?")

_OPERATOR = (
    r"(?:[\^/×·÷±√∛∜]|\\(?:[dtc]?frac|sqrt|times|cdot|div|pm|mp|ast|[dt]?binom|overline|pi|theta|phi|infty|exp|log|ln|lg"
    r"|(?:arc)?(?:sin|cos|tan)|cot|sec|csc|sum|prod|int|lim|max|min|gcd|lcm|[pb]?mod|lfloor|lceil)(?![A-Za-z]))"
)
_CONTINUED = re.compile(
    rf"n(?![A-Za-z])|\w*[0-9πθ²³¹⁰-₉]|_[\w({{]| *(?:{_OPERATOR}|[xyzπθ](?![A-Za-z])"
    rf"|[-+*({{\[–] *(?:{_OPERATOR}|[({{\[]|[xyzπθ](?![A-Za-z])))"
)
"""An expression, not a text, goes on behind the number."""

_OPERAND = re.compile(
    rf"(?:[\w)\]}}][({{\[] *|{_OPERATOR}[ ({{\[]*|(?:[A-Za-z]|[\w%]_)[({{\[]*|[0-9)\]}}] *\*+[ ({{\[]*"
    r"|\w\*+[({\[]*|[)\]}][({\[]*|[0-9] x [({\[]*|[0-9%]:)$"
)
"""The number is an argument, a factor or a part of something in front of it."""

_FACTOR = re.compile(r"[\w)\]}] ?\*+$")
_SIGN = re.compile(r"(?P<left>\S?)(?P<apart> *)(?P<sign>[-+–])(?P<blank>[ ({\[]*)$")


def last_number(text: str) -> Number | None:
    """Return the last number of a text; None where it has none, or the last is part of an expression or too large."""
    lines = text.split("\n")
    for row in range(len(lines) - 1, -1, -1):  # neither numbers nor expressions span lines
        line = _plainer(lines[row])
        *others, last = [None, *_TOKEN.finditer(line)]
        if last is not None:
            return _number(line, last, others[-1], in_list=row > 0)
    return None


def _plainer(line: str) -> str:
    for pattern, replacement in _PLAINER:
        line = pattern.sub(replacement, line)
    return line


def _plain_character(character: str) -> str:
    plain = unicodedata.normalize("NFKC", character).replace("\u2044", "/")
    return f" {plain}" if len(plain) > 1 else plain


def _plain_fraction(match: re.Match[str]) -> str:
    whole = f"{match[1]} " if match[1] else ""
    return f"{whole}{match[2]}/{match[3]}"


def _number(line: str, token: _Token, other: _Token | None, *, in_list: bool) -> Number | None:
    """Read a number. other: the number before it"""
    before, after = line[: token.start()], line[token.end() :]
    is_factorial = after.startswith("!") and not (before + after[1:]).strip(" ()[]{}")
    is_continued = not token["unit"] and _CONTINUED.match(after)
    if is_factorial or is_continued or _OPERAND.search(before) or _is_part(before, token, other):
        return None
    sign = _sign(before, len(before) if other is None else other.end(), in_list=in_list)
    size = _size(token["digits"].rstrip(".,/"), token["whole"])
    return Number(value=sign * size, percent=token["percent"] is not None) if sign and size is not None else None


def _is_part(before: str, token: _Token, other: _Token | None) -> bool:
    """Tell whether the number before, with a blank between them, may be part of this one: 1 234, or 12.5 1/2."""
    if other is None or other["unit"] or other["digits"][-1] in ".,/" or before[other.end() :] != " ":
        return False
    is_group = re.fullmatch("[0-9]{1,3}", other["digits"]) and re.match(r"[0-9]{3}(?![0-9])", token["digits"])
    return bool(is_group or "/" in token["digits"])


def _sign(before: str, other_end: int, *, in_list: bool) -> int:
    """Return 1 or -1; 0 where a sign in front is that of a difference or a sum. other_end: end of the number before"""
    match = _SIGN.search(before)
    if match is None:
        return 1
    sign, left = 1 if match["sign"] == "+" else -1, match["left"]
    if not left:
        return 1 if match["blank"].startswith(" ") and in_list else sign
    if match.end("left") == other_end or left in "+-–/^×·÷±√" or _FACTOR.search(before[: match.end("left")]):
        return 0
    is_word = left.isalpha()
    if is_word and match["blank"] and sign < 0 and re.search(r"[A-Za-z]{2} *[-–] *$", before):
        return 1
    if is_word or left in ")]}":
        return sign if match["apart"] and not match["blank"] else 0
    return sign


def _size(digits: str, whole: str | None) -> Fraction | None:
    parts = digits.split("/")
    if len(digits) > _MOST_DIGITS or len(parts) > 2 or not all(p and _DIGITS.fullmatch(p) for p in parts):
        return None
    values = [Fraction(part.replace(",", "")) for part in parts if re.search("[0-9]", part)]
    if len(values) < len(parts) or (len(values) == 2 and values[1] == 0):
        return None
    return (values[0] / values[1] if len(values) == 2 else values[0]) + Fraction(whole or 0)
