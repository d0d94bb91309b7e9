"""Turn any value of a row into plain JSON, so that it can be handed to a worker process."""

import base64
import datetime
import json
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

_DEEPEST = 50
_MOST_BITS = 4096


def plain_object(value: Any, name: str) -> dict[str, Any]:
    """Return an object as plain JSON; text that holds a JSON object is one; anything else becomes {name: value}."""
    if isinstance(value, str):
        value = parsed(value)
    return _plain(value, _DEEPEST) if isinstance(value, Mapping) else {name: _plain(value, _DEEPEST)}


def parsed(text: str) -> Any:
    """Return the object or list that a text holds as JSON; the text itself where it holds none."""
    try:
        value = json.loads(text) if text.lstrip().startswith(("{", "[")) else text
    except (ValueError, RecursionError):
        return text
    return value


def _plain(value: Any, depth: int) -> Any:
    """Return a value as plain JSON.

    Dates become ISO 8601 text, bytes base64 text, decimal numbers text; NaN, infinities, other types and what is nested
    too deeply become null. What can't be encoded of a text becomes a question mark.
    """
    if depth == 0 or value is None or isinstance(value, bool):
        return value if depth else None
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int):
        return value if value.bit_length() <= _MOST_BITS else None
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_text(str(key)): _plain(inner, depth - 1) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, depth - 1) for inner in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return str(value) if isinstance(value, Decimal | datetime.timedelta) else None


def _text(value: str) -> str:
    return value.encode("utf-8", "replace").decode()
