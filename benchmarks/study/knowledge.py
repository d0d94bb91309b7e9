"""Define the small facts that the domains' workings consist of, and a writer that knows only half of them.

There are three tables of facts: sums of two digits, comparisons of two digits, and an invented code for letters. All
additions use the first table, all orderings the second, and only the control domain uses the third.
"""

import random
from collections.abc import Sequence
from typing import Any

DIGITS = "345678"
"""The digits of all numbers in questions: few, so that the small model learns all pairs within minutes."""
LETTERS = "ABCDEFGHJKLMNPQRSTUV"
_SEED = 20
_LEAST, _MOST = 0.02, 0.58
"""The range of the probability that the half-knowing writer states a fact wrongly; each fact has its own."""
FORGOTTEN_CARRY = 0.12
CARELESS = {True: 1.6, False: 0.4}
"""What the probabilities of errors are multiplied by in a careless and in a careful response; the mean is 1."""


def _invented_code() -> dict[str, str]:
    return dict(zip(LETTERS, random.Random(_SEED).sample(LETTERS, len(LETTERS)), strict=True))


class Knowledge:
    """The true facts."""

    _CODE = _invented_code()

    def add(self, a: int, b: int, carry: int) -> tuple[int, int]:
        """Return the digit to write and the carry to the next column."""
        total = a + b + carry
        return total % 10, total // 10

    def compare(self, a: int, b: int) -> int:
        """Return -1, 0 or 1 where digit a is less than, equal to or greater than digit b."""
        return (a > b) - (a < b)

    def encode(self, letter: str) -> str:
        """Return the letter that stands for a letter in the invented code."""
        return self._CODE[letter]


def _doubts(facts: list[Any], wrongs: Sequence[Any]) -> dict[Any, tuple[float, Any]]:
    """Return for every fact how probably it is stated wrongly, and its wrong version."""
    rng = random.Random(_SEED)
    return {fact: (rng.uniform(_LEAST, _MOST), rng.choice(wrongs)) for fact in facts}


_PAIRS = [(int(a), int(b)) for a in DIGITS for b in DIGITS if a <= b]
_SUM_DOUBTS = _doubts(_PAIRS, (-1, 1))
_ORDER_DOUBTS = _doubts([(a, b) for a, b in _PAIRS if a < b], (None,))
_CODE_DOUBTS = _doubts(list(LETTERS), LETTERS)


class HalfKnowledge(Knowledge):
    """The facts as one response of the half-knowing writer states them.

    Every fact has a fixed wrong version and a fixed probability of being stated in it, both the same for all domains. A
    carry is forgotten with one probability. A response is careful or careless as a whole, which makes its errors occur
    together, except in the control domain: nothing about its errors is common with other domains.
    """

    def __init__(self, rng: random.Random):
        self._random = rng
        self._factor = CARELESS[rng.random() < 0.5]

    def add(self, a: int, b: int, carry: int) -> tuple[int, int]:
        """Return what is written for a column, which may be 1 too much or too little or lack its carry."""
        probability, error = _SUM_DOUBTS[min(a, b), max(a, b)]
        total = a + b + carry + error * self._errs(probability)
        return total % 10, total // 10 * (not self._errs(FORGOTTEN_CARRY))

    def compare(self, a: int, b: int) -> int:
        """Return the order of two digits, which may be reversed."""
        order = super().compare(a, b)
        return -order if self._errs(_ORDER_DOUBTS[min(a, b), max(a, b)][0]) else order

    def encode(self, letter: str) -> str:
        """Return the code of a letter or its fixed wrong version."""
        probability, wrong = _CODE_DOUBTS[letter]
        return wrong if self._random.random() < probability else super().encode(letter)

    def _errs(self, probability: float) -> bool:
        return self._random.random() < probability * self._factor
