"""A verifier whose import takes longer than a deadline."""

import time
from typing import Any

time.sleep(2.0)


def right(entry: dict[str, Any], response: str) -> float:
    return float(response == entry["answer"])
