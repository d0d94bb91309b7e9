r"""Remove the unit of a quantity in LaTeX: 8 dollars is 8. Standard library only; linear time.

math-verify reads kilograms and hours, but takes dollars for a product of seven symbols.
"""

import re

_NUMBER = (
    r"-?(?:[0-9]{1,300}(?:,[0-9]{3}){0,99}(?:\.[0-9]{1,300})?(?: ?/ ?[0-9]{1,300})?|\.[0-9]{1,300}"
    r"|[0-9]{0,300}\\[dt]?frac\{[0-9]{1,300}\}\{[0-9]{1,300}\})"
)
_NO_UNITS = (
    r"(?:(?:arc)?(?:sin|cos|tan)h?|cot|sec|csc|sqrt|log|exp|lim|max|min|gcd|lcm|mod|div|det|deg|sup|inf|infty|theta|alpha"
    r"|beta|gamma|phi|choose|factorial|and|not|nor|but|plus|minus|times|over|squared|cubed|percent|hundred|thousand|dozen"
    r"|[a-z]{1,9}llions?|half|halves|thirds?|quarters?|fourths?|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?"
    r"|hundredths?|thousandths?|[abcxyz]+)"
)
"""Words behind a number that are functions, operators, constants, products of variables, or that change its size."""
_WORD = rf"(?!{_NO_UNITS}(?![A-Za-z]))[A-Za-z][a-z]{{2,30}}"
_BEHIND = rf" (?:squared|cubed)| ?\^\{{?[23]\}}?|(?: per |/){_WORD}(?: squared)?"
_WORDS = rf"(?:(?:square|cubic|sq\.?|cu\.?) )?{_WORD}(?:{_BEHIND})?"

_POWER = r"\^(?:[23]|\{-?[1-3]\})"
_LONG = r"(?:[cdkm]m|ft|in|yd|mi|km|kg|hr|min|sec|ms|mol)"
_SHORT = rf"(?:{_LONG}|[mgshlLJNWVC])"
_SYMBOLS = rf"(?:(?:{_LONG}|m){_POWER}|{_SHORT}(?:{_POWER})?/{_SHORT}(?:{_POWER})?)"

_QUANTITY = re.compile(rf"(?P<number>{_NUMBER})(?:\s|~|\\[,;: ]){{1,9}}(?:{_WORDS}|{_SYMBOLS})")


def without_unit(text: str) -> str:
    r"""Return the number of a text that is a number, a blank and a unit; every other text as it is.

    A unit is a word of three or more letters, such as dollars, perhaps with square or cubic in front or "per" and
    another word behind it; or a short unit with a power or a slash, such as cm^2 or m/s. A short unit alone is left to
    math-verify, and so is what may be a variable, a function or part of a number: 8 x, 8 ab, 8 pi, 3 or 4, 8 million.
    """
    quantity = _QUANTITY.fullmatch(text)
    return quantity["number"] if quantity else text
