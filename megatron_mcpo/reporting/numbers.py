"""Format numbers, durations and foreign text for a terminal."""

import math


def number(value: float | None, form: str) -> str:
    """Return the formatted value, "-" for None; a value that is not finite as nan, inf or -inf."""
    if value is None or not math.isfinite(value):
        return "-" if value is None else str(float(value))
    return format(value, form)


def short(value: float | None) -> str:
    """Return the value with about three digits, in at most six characters."""
    if value is None or not math.isfinite(value):
        return number(value, "")
    size = abs(value)
    if size == 0:
        return "0"
    # Rounding up to the next limit must not add a character: 9.996 is 10.0, not 10.00.
    forms = ((0.00095, ".0e"), (0.9995, ".3f"), (9.995, ".2f"), (99.95, ".1f"), (999.5, ".0f"))
    return format(value, next((form for limit, form in forms if size < limit), ".0e"))


def duration(seconds: float) -> str:
    """Return seconds as 1:02:03, or as 2:03 below an hour."""
    if not math.isfinite(seconds):
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def printable(text: str) -> str:
    """Return the text with everything that could steer a terminal written as an escape sequence."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
