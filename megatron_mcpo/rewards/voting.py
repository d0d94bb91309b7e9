"""What a response answers, as far as its verifier looks: equal texts are one answer in a majority vote.

Imports neither torch nor a verifier that needs more than the standard library.
"""

import re

from megatron_mcpo.rewards.answers import normalized
from megatron_mcpo.rewards.boxes import after_hashes, last_boxed, where_stated
from megatron_mcpo.rewards.letters import stated_letter
from megatron_mcpo.rewards.number_parser import last_number

EXTRACTING = ("choice", "numeric", "math", "exact", "text")
"""Kinds of verifiers that look at a part of the response, or at what is left of it once it is normalized."""

# A dollar in front of a blank, or behind one, is a currency's: "from $5 to $6".
_MATHS = re.compile(
    r"\$\$([^$]+)\$\$|\$(?!\s)([^$]+)(?<!\s)\$(?![0-9])|\\\(((?:(?!\\[()]).)+)\\\)|\\\[((?:(?!\\[\[\]]).)+)\\\]",
    re.DOTALL,
)
_NO_MEANING = re.compile(
    r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\[,;:! ]|\{,\}|[\s~$]|(?<=[0-9]),(?=[0-9]{3}(?![0-9]))"
)
_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}")


def stated(kind: str, text: str) -> str:
    r"""The answer that a verifier of this kind takes from a response; "" where it finds none.

    choice: the letter; numeric: the number; exact, text: the box, else all of it, text normalized; math: the box, else
    the last of numbers and $...$, \(...\), \[...\], else all of it, without what has no meaning in LaTeX. Of any other
    kind all of the text, but for case and blanks.
    """
    if kind == "choice":
        return stated_letter(text) or ""
    if kind == "numeric":
        number = last_number(where_stated(text))
        return "" if number is None else f"{number.value + 0.0!r}{'%' if number.percent else ''}"
    if kind == "math":
        return _expression(text)
    boxed = last_boxed(text)
    if kind == "exact":
        return (boxed[1] if boxed else text).strip()
    return normalized(boxed[1] if boxed else text) if kind == "text" else _folded(text)


def _expression(text: str) -> str:
    boxed = last_boxed(text)
    found = boxed[1] if boxed else _last_expression(after_hashes(text))
    plain = _WRAPPED.sub(r"\1", re.sub(r"\\[dt]frac", r"\\frac", found))
    plain = _NO_MEANING.sub("", plain).rstrip(".,;")
    name, _, value = plain.rpartition("=")
    return value if value and "," not in name else plain  # x = 5 is 5; of x = 1, y = 2 all counts


def _last_expression(text: str) -> str:
    maths = max(_MATHS.finditer(text), key=re.Match.start, default=None)
    number = last_number(text[maths.end() :] if maths else text)
    if number is not None:
        whole = number.value.is_integer() and abs(number.value) < 2**53
        return f"{int(number.value) if whole else number.value}{'%' if number.percent else ''}"
    return next(filter(None, maths.groups())) if maths else _folded(text)


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())
