"""The answer that a response states, as text for a majority vote: equal texts are the same answer.

Imports neither torch nor a verifier that needs more than the standard library.
"""

import re
from fractions import Fraction

from megatron_mcpo.rewards.answers import normalized
from megatron_mcpo.rewards.boxes import after_hashes, last_boxed, where_stated
from megatron_mcpo.rewards.letters import stated_letter
from megatron_mcpo.rewards.number_parser import last_number

# A dollar in front of a blank, or behind one, is a currency's: "from $5 to $6".
_MATHS = re.compile(
    r"\$\$([^$]+)\$\$|\$(?!\s)([^$]+)(?<!\s)\$(?![0-9])|\\\(((?:(?!\\[()]).)+)\\\)|\\\[((?:(?!\\[\[\]]).)+)\\\]",
    re.DOTALL,
)
_NO_MEANING = re.compile(
    r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\[,;:! ]|\{,\}|[\s~$]|(?<=[0-9]),(?=[0-9]{3}(?![0-9]))"
)
_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}")


def stated_choice(text: str) -> str:
    """Return the letter that a response states, "" where it states none or several."""
    return stated_letter(text) or ""


def stated_number(text: str) -> str:
    """Return the last number of the box, else of the response, with its percent sign; "" where there is none."""
    number = last_number(where_stated(text))
    return "" if number is None else f"{_plain(number.value)}{'%' if number.percent else ''}"


def stated_characters(text: str) -> str:
    """Return the content of the box, else the whole response, without the blanks around it."""
    return _boxed_or_all(text).strip()


def stated_words(text: str) -> str:
    """Return the content of the box, else the whole response, normalized as kind `text` compares it."""
    return normalized(_boxed_or_all(text))


def stated_expression(text: str) -> str:
    r"""Return the box, else the last of numbers and $...$, \(...\), \[...\], else all, without meaningless LaTeX."""
    boxed = last_boxed(text)
    found = boxed[1] if boxed else _last_expression(after_hashes(text))
    plain = _WRAPPED.sub(r"\1", re.sub(r"\\[dt]frac", r"\\frac", found))
    plain = _NO_MEANING.sub("", plain).rstrip(".,;")
    name, _, value = plain.rpartition("=")
    return value if value and "," not in name else plain  # x = 5 is 5; of x = 1, y = 2 all counts


def _plain(value: Fraction) -> str:
    """Return a number as text, whole and very large numbers exactly."""
    is_exact = value.denominator == 1 or abs(value) > 2**1000
    return str(value) if is_exact else repr(float(value))


def folded(text: str) -> str:
    """Return a text without case, with single spaces."""
    return " ".join(text.casefold().split())


def _boxed_or_all(text: str) -> str:
    boxed = last_boxed(text)
    return boxed[1] if boxed else text


def _last_expression(text: str) -> str:
    maths = max(_MATHS.finditer(text), key=re.Match.start, default=None)
    number = last_number(text[maths.end() :] if maths else text)
    if number is not None:
        return f"{_plain(number.value)}{'%' if number.percent else ''}"
    return next(filter(None, maths.groups())) if maths else folded(text)
