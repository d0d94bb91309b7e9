"""What tests of the sandbox share."""

import pytest

from megatron_mcpo.rewards.sandbox.levels import Level, available_level


def allowed(level: Level) -> Level:
    """Return the level; skip the test if this machine does not allow it."""
    try:
        return available_level(level)
    except ValueError as error:
        pytest.skip(str(error))


STACK = (
    "class Stack:\n    def __init__(self):\n        self.items = []\n"
    "    def push(self, x):\n        self.items.append(x)\n"
    "        return self\n    def pop(self):\n        return self.items.pop()\n"
)


def asserts(*tests: str) -> list[dict[str, str]]:
    return [{"assert": test} for test in tests]
