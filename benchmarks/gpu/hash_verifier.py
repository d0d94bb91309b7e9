"""Reward responses by a hash of their text: half of them are correct, for no reason that a model could learn."""

import hashlib
from collections.abc import Mapping
from typing import Any


def score(entry: Mapping[str, Any], response: str) -> float:
    """Return 0 or 1, the same for equal questions and responses in every process."""
    text = f"{entry['question']}\n{response}"
    return float(hashlib.sha256(text.encode()).digest()[0] % 2)
