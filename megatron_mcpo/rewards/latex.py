r"""Write an answer as LaTeX that math-verify reads whole. Standard library only; linear time.

math-verify reads 1.6e-19 as 1.6 e - 19, 1 3/4 as 1, 3\,000 as 3 times 0, 3 4 as 12 and pi/2 as p i/2; it does not read
½, √2, x² or 90° at all.
"""

import re
import unicodedata

from megatron_mcpo.rewards.units import without_unit

_WRAPPED = re.compile(
    r"\s*(?:\$\$?(?P<dollar>[^$]+)\$\$?|\\\((?P<inline>.+)\\\)|\\\[(?P<display>.+)\\\])[.,;\s]*", re.DOTALL
)
_ABOUT = re.compile(r"\s*(?:\\approx|\\simeq|\\sim|≈|≃|~|=)(?![A-Za-z])\s*")

_EMPHASIS = re.compile(r"(?<![\w*)])\*{1,3}(?=[^\s*])([^*\n]{1,200})(?<=\S)\*{1,3}(?![\w*(])")
_BOLD = re.compile(r"\*\*[^\s*].*[^\s*]\*\*")
_STARS = re.compile(r"(?<!\*)\*{1,3}$")
"""The end of bold or italic type that began before a statement, as in **Answer: 42**."""
_DOLLARS = re.compile(r"\$\s*+(?:,\s*+)?\$")
_DOLLAR = re.compile(r"\\?\$")
_CURRENCY = re.compile(r"[€£¥₹]\s?(?=[0-9.])|(?<=[0-9])\s?[€£¥₹]")

_SYMBOLS = {"√": r"\sqrt ", "∞": r"\infty ", "°": r"^\circ ", "−": "-", "π": r"\pi ", "×": r"\times ", "·": r"\cdot "}
_SYMBOL = re.compile("|".join(_SYMBOLS))
_ROOT = re.compile(r"√\s{0,9}([0-9]{1,300}(?:\.[0-9]{1,300})?)")
_POWER = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")
_FRACTION = re.compile("[¼-¾⅐-⅞]")
_FULL_WIDTH = re.compile("[！-～]")
_NAME = re.compile(r"(?<![\\A-Za-z])(?:pi|exp|ln|sin|cos|tan)(?![A-Za-z])")

_SEPARATOR = re.compile(r"(?<=[0-9])(?:\{,\}|,?\\!|\\,|[\xa0\u202f\u2009])(?=[0-9]{3}(?![0-9]))")
_EXPONENT = re.compile(
    r"(?<![A-Za-z0-9.])([0-9]{1,300}(?:\.[0-9]{0,300})?|\.[0-9]{1,300})[eE]([-+]?[0-9]{1,3})(?![0-9])"
)
_MIXED = re.compile(r"(?<![0-9.,/)}])([0-9]{1,300})[ \t]+([0-9]{1,300})/([0-9]{1,300})(?![0-9]|\.[0-9])")
_GROUPS = re.compile(r"[0-9]{1,3}(?: [0-9]{3})+")
_ALONE = re.compile(r"(?:(?<=\s)-)?[0-9]{0,300}\\frac\{[0-9]{1,300}\}\{[0-9]{1,300}\}")

_LIST_MARK = re.compile(r"\s*(?:[*•]|\(?(?:[0-9]{1,2}|[a-z])[.)])\s+")
_LIST_MARK_OR_DASH = re.compile(rf"\s*-\s+|{_LIST_MARK.pattern}")
"""Marks at the beginning of a line; a dash is a minus sign in a text of one line."""

_ANSWER = re.compile(r"\banswers?\b[*_]*(?:\s+(?:is|are)\b)?[*_]*[:：]?[*_]*\s*", re.IGNORECASE)

_LONGEST = 200
_MOST_BRACKETS = 24
"""Opening brackets of a formula without a box: nested ones take math-verify's grammar seconds."""

_LAYERS = 3
"""Pairs of dollars or brackets around a formula that are removed."""

_COMMAND = re.compile(r"\\(?:text|mathrm|mbox)\s?\{[^{}]*\}|\\[A-Za-z]+|\b(?:pi|exp|ln|log|sin|cos|tan|sqrt|or|and)\b")
_WORD = re.compile(r"[^\W\d_]{2,}")
_UNIT = re.compile(r"[0-9]\s+[a-wA-Z](?![\w^(])")

_BLANKS = re.compile(r"(?:\s|~|\\[,;:! ]|\\q?quad(?![A-Za-z]))+")
_SKNALB = re.compile(r"(?:[,;:! ]\\(?!\\)|dauqq?\\(?!\\)|[\s~.,;])+")
"""Blanks and punctuation at the end of a text that is read backwards, which takes linear time."""

_SIDE_BY_SIDE = re.compile(r"(?<=[0-9])(?<![_^][0-9])(?:\s|~|\\[,;: ]|\\q?quad)+(?=[0-9])")


def as_latex(answer: str) -> str:
    """Return an answer in the notation of LaTeX, without markup around it and a unit behind it."""
    text = answer[about.end() :] if (about := _ABOUT.match(answer)) else answer
    for _ in range(_LAYERS):
        wrapped = _WRAPPED.fullmatch(_trimmed(text))
        text = wrapped[wrapped.lastindex or 0] if wrapped else text
    text = _trimmed(text)
    text = _CURRENCY.sub("", without_emphasis(_DOLLAR.sub("", _DOLLARS.sub(", ", text))))
    text = _POWER.sub(_power, text)
    text = _FRACTION.sub(_fraction, text)
    text = _FULL_WIDTH.sub(lambda match: unicodedata.normalize("NFKC", match[0]), text)
    text = _ROOT.sub(r"\\sqrt{\1}", text)
    text = _SYMBOL.sub(lambda match: _SYMBOLS[match[0]], text).replace("**", "^")
    text = _NAME.sub(lambda match: f"\\{match[0]} ", text)
    text = _SEPARATOR.sub("", text).strip()
    text = text.replace(" ", "") if _GROUPS.fullmatch(text) else text
    text = _EXPONENT.sub(r"\1 \\times 10^{\2}", text)
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    # Two numbers side by side are no product.
    return without_unit(_trimmed(_SIDE_BY_SIDE.sub(", ", text)))


def _trimmed(text: str) -> str:
    """Return a text without blanks, LaTeX's included, at its ends, and without punctuation at its end."""
    text = text[match.end() :] if (match := _BLANKS.match(text)) else text
    behind = _SKNALB.match(text[::-1])
    return text[: len(text) - behind.end()] if behind else text


def is_bare(text: str) -> bool:
    """Tell whether a text is a formula from its beginning to its end: it has no words, and no unit behind a number."""
    is_short = len(text) <= _LONGEST and sum(map(text.count, "({[")) <= _MOST_BRACKETS
    if not is_short or not any(map(str.isalnum, text)):
        return False
    plain = _COMMAND.sub(" ", text)
    return not _WORD.search(plain) and not _UNIT.search(plain)


def marked(text: str) -> str:
    """Return a text without formulas with dollars around the numbers that math-verify would not read whole."""
    if "$" in text or "\\(" in text or "\\[" in text:
        return text
    text = _FRACTION.sub(_fraction, _EXPONENT.sub(r"$\1 \\times 10^{\2}$", text))
    return _ALONE.sub(r"$\g<0>$", _MIXED.sub(r"\1\\frac{\2}{\3}", text))


def last_statement(text: str) -> str:
    """Return the line behind the last "answer is" of a text, else its last line without a list's mark."""
    *others, said = _ANSWER.split(text)
    lines = said.strip(" \t\r\n.,;:").split("\n")
    if others and lines[0]:
        line, stars = lines[0], _STARS.search(lines[0])
        return line.removesuffix(stars[0]) if stars and line.count(stars[0]) % 2 else line
    lines = text.strip().split("\n")
    mark = (_LIST_MARK if len(lines) == 1 else _LIST_MARK_OR_DASH).match(lines[-1])
    line = lines[-1][mark.end() :] if mark else lines[-1]
    return line[2:-2] if _BOLD.fullmatch(line) and line.count("**") == 2 else line


def without_emphasis(text: str) -> str:
    """Return a text without the stars of bold and italic type."""
    return _EMPHASIS.sub(r"\1", text)


def _power(match: re.Match[str]) -> str:
    return f"^{{{unicodedata.normalize('NFKC', match[0]).replace('−', '-')}}}"


def _fraction(match: re.Match[str]) -> str:
    top, _, bottom = unicodedata.normalize("NFKC", match[0]).partition("\u2044")
    return f"\\frac{{{top}}}{{{bottom}}}"
