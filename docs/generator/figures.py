"""Look figures up in benchmarks/results/*.json and format them."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"

UNITS = {"MB": 1e6, "GB": 1e9, "KB": 1e3, "MiB": 2**20, "GiB": 2**30, "%": 0.01}
"""What a number of bytes (or a share) is divided by before it is printed with its unit."""


def lookup(file: str, path: str, results: Path = RESULTS) -> Any:
    """Return the value at `path` in a result file.

    The parts of a path are divided by slashes. In an object a part is a key. In a list it is a position, or conditions
    `key=value,key=value`, where `_` stands for a space, that exactly one element must meet.

    Raises:
        ValueError: nothing, or more than one element, is there.
    """
    value = json.loads((results / file).read_text(encoding="utf-8"))
    for part in path.split("/"):
        value = _child(value, part, f"{file} {path}")
    return value


def _child(value: Any, part: str, where: str) -> Any:
    if isinstance(value, dict) and part in value:
        return value[part]
    if isinstance(value, list) and "=" in part:
        conditions = [condition.split("=", 1) for condition in part.split(",")]
        found = [row for row in value if all(str(row.get(key)).replace(" ", "_") == text for key, text in conditions)]
        if len(found) == 1:
            return found[0]
        raise ValueError(f"{where}: {len(found)} elements meet {part!r}, must be one")
    if isinstance(value, list) and part.isdecimal() and int(part) < len(value):
        return value[int(part)]
    raise ValueError(f"{where}: there is no {part!r}")


def formatted(value: Any, form: str) -> str:
    """Format a number: `.2f`, `,d`, or with one of UNITS behind, as in `.1fGB`; the unit is printed."""
    unit = next((unit for unit in UNITS if form.endswith(unit)), "")
    if not unit:
        return format(int(value) if form.endswith("d") else value, form)
    return f"{format(value / UNITS[unit], form.removesuffix(unit))}{'' if unit == '%' else ' '}{unit}"


def significant(value: float, digits: int = 2) -> str:
    """Return a number with so many significant digits and no exponent: 0.0057, 0.84, 5.7, 87."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits}g}")
    decimals = max(0, digits - len(str(int(abs(rounded)))) if abs(rounded) >= 1 else _leading_zeros(rounded) + digits)
    return f"{rounded:.{decimals}f}"


def _leading_zeros(value: float) -> int:
    """Count the zeros between the point and the first digit of a number below 1."""
    return -int(f"{value:e}".partition("e")[2]) - 1


def byte_text(num_bytes: float) -> str:
    """Return bytes in the largest decimal unit of which there is at least one: 174 MB, 2.2 GB."""
    for unit in ("GB", "MB", "KB"):
        if num_bytes >= UNITS[unit]:
            return f"{significant(num_bytes / UNITS[unit], 3 if num_bytes / UNITS[unit] >= 100 else 2)} {unit}"
    return f"{num_bytes:.0f} bytes"
