"""Repair how math-verify compares small numbers, for the versions that take numbers near 0 for equal.

math-verify 0.9.0 rounds decimals to 6 places and drops what is below 1e-15 of a difference: the electron's charge,
1.6e-19, equals its mass, 9.1e-31, and 1/52! equals 0. Imported by worker processes only.
"""

from importlib.metadata import version
from typing import Any

from math_verify import grader

_AFFECTED = ("0.9.0",)

_DECIMAL_ERROR = 1e-4
"""Largest relative error of a decimal: that of four significant digits."""

_EXACT_DIGITS = 50
_EXACT_ERROR = 1e-40
"""Relative difference below which exact irrational numbers, computed to _EXACT_DIGITS digits, are the same."""

_SMALL = 1e-9
"""Coefficients below this are scaled up before polynomials are compared."""

_numeric_eq = grader.sympy_numeric_eq


def apply() -> None:
    """Replace math-verify's comparison of numbers, which those of sets, matrices and intervals use too."""
    if version("math-verify") in _AFFECTED:
        grader.sympy_numeric_eq = _scaled_eq


def _scaled_eq(a: Any, b: Any, float_rounding: int, numeric_precision: int) -> bool:
    """Return what math-verify does, unless the two differ in their size."""
    if not _numeric_eq(a, b, float_rounding, numeric_precision):
        return False
    if isinstance(a, grader.MatrixBase) or isinstance(
        b, grader.MatrixBase
    ):  # compared by their entries, with this function
        return True
    x, y = grader.safe_sympy_doit(a), grader.safe_sympy_doit(b)
    if x.free_symbols or y.free_symbols:
        smallest = min(_coefficients(x) + _coefficients(y), default=1.0)
        return smallest >= _SMALL or bool(_numeric_eq(x / smallest, y / smallest, float_rounding, numeric_precision))
    if all(grader.is_atomic_or_pct_atomic(value, grader.Rational) for value in (a, b)):
        return True  # exactly compared; 9 % may be 9
    return _same_number(x, y)


def _coefficients(expression: Any) -> list[float]:
    """Return the sizes of the coefficients of a sum that are numbers other than 0."""
    numbers = expression.expand().as_coefficients_dict().values()
    return [abs(float(number)) for number in numbers if number.is_number and number != 0]


def _same_number(x: Any, y: Any) -> bool:
    if isinstance(x, grader.Rational) and isinstance(y, grader.Rational):
        return bool(x == y)
    error = _DECIMAL_ERROR if x.has(grader.Float) or y.has(grader.Float) else _EXACT_ERROR
    size = max(abs(x.evalf(_EXACT_DIGITS)), abs(y.evalf(_EXACT_DIGITS)))
    return bool(abs((x - y).evalf(_EXACT_DIGITS)) <= error * size)
