r"""Define the six domains of the study's small model, each with questions, written-out workings and boxed answers.

digits, words and ledger add two numbers of three digits, column by column from the right, with carries. largest and
sort order numbers of two digits, pair by pair. letters, the control, writes letters in an invented code: it has no fact
and no symbol but the box in common with the other domains. A response is a working and its \boxed{answer}, so that the
verifier `exact` judges the answer alone.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.study.knowledge import DIGITS, LETTERS, HalfKnowledge, Knowledge
from megatron_mcpo.rewards.boxes import where_stated

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLUMNS = ("ones", "tens", "hundreds")

Operands = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Example:
    """A question, its true answer, and a response to it, which may be wrong.

    Example: Example(question="345+378=", answer="723", response="58=3c47=2c33=7n \\boxed{723}")
    """

    question: str
    answer: str
    response: str


@dataclass(frozen=True, kw_only=True)
class StudyDomain:
    """A domain: how operands are drawn, how the question is put, and how a response is written with some knowledge."""

    name: str
    draw: Callable[[random.Random], Operands]
    ask: Callable[[Operands], str]
    respond: Callable[[Operands, Knowledge], str]

    def example(self, rng: random.Random, *, half_known: bool) -> Example:
        """Draw a question and respond to it, as the half-knowing writer where `half_known`, else truly."""
        operands = self.draw(rng)
        true = self.respond(operands, Knowledge())
        response = self.respond(operands, HalfKnowledge(rng)) if half_known else true
        return Example(question=self.ask(operands), answer=where_stated(true), response=response)

    def distinct(self, rng: random.Random) -> Iterator[Example]:
        """Yield true examples with different questions, without end."""
        seen: set[str] = set()
        while True:
            example = self.example(rng, half_known=False)
            if example.question not in seen:
                seen.add(example.question)
                yield example


def _draw_sum(rng: random.Random) -> Operands:
    first, second = ("".join(rng.choices(DIGITS, k=3)) for _ in range(2))
    return first, second


def _columns(operands: Operands, knowledge: Knowledge) -> Iterator[tuple[int, int, int, int]]:
    """Yield both digits, the digit to write and the carry of every column, from the right."""
    carry = 0
    for a, b in zip(*(map(int, reversed(number)) for number in operands), strict=True):
        digit, carry = knowledge.add(a, b, carry)
        yield a, b, digit, carry


def _total(columns: list[tuple[int, int, int, int]]) -> list[int]:
    """Return the digits of the sum, first digit first, as the columns state them."""
    last_carry = columns[-1][3]
    return [last_carry] * bool(last_carry) + [digit for _, _, digit, _ in reversed(columns)]


def _digits(operands: Operands, knowledge: Knowledge) -> str:
    columns = list(_columns(operands, knowledge))
    working = "".join(f"{a}{b}={digit}{'nc'[carry]}" for a, b, digit, carry in columns)
    return f"{working} \\boxed{{{''.join(map(str, _total(columns)))}}}"


def _words(operands: Operands, knowledge: Knowledge) -> str:
    columns = list(_columns(operands, knowledge))
    working = " ".join(
        f"{WORDS[a]} {WORDS[b]} makes {WORDS[digit]} {('alone', 'carry')[carry]}" for a, b, digit, carry in columns
    )
    return f"{working} \\boxed{{{_spoken(_total(columns))}}}"


def _ledger(operands: Operands, knowledge: Knowledge) -> str:
    columns = list(_columns(operands, knowledge))
    working = " ".join(
        f"{place} {a} {b} put {digit} {('done', 'over')[carry]}"
        for place, (a, b, digit, carry) in zip(COLUMNS, columns, strict=True)
    )
    return f"{working} \\boxed{{{''.join(map(str, _total(columns)))}}}"


def _spoken(digits: list[int] | str) -> str:
    return " ".join(WORDS[int(digit)] for digit in digits)


def _draw_numbers(count: int) -> Callable[[random.Random], Operands]:
    """Return a way to draw different numbers of two digits, of which two with the same first digit are frequent."""

    def draw(rng: random.Random) -> Operands:
        firsts = rng.sample(DIGITS, count - 1)
        firsts.append(rng.choice(firsts))
        numbers = [first + second for first, second in zip(firsts, rng.sample(DIGITS, count), strict=True)]
        rng.shuffle(numbers)
        return tuple(numbers)

    return draw


def _exceeds(a: str, b: str, knowledge: Knowledge) -> bool:
    """Tell whether number a is the greater one, by the first digits that differ."""
    x, y = next(pair for pair in zip(a, b, strict=True) if pair[0] != pair[1])
    return knowledge.compare(int(x), int(y)) > 0


def _largest(operands: Operands, knowledge: Knowledge) -> str:
    best, *others = operands
    said = []
    for other in others:
        keeps = _exceeds(best, other, knowledge)
        said.append(f"{best}{'<>'[keeps]}{other}")
        best = best if keeps else other
    return f"{','.join(said)} \\boxed{{{best}}}"


def _sort(operands: Operands, knowledge: Knowledge) -> str:
    numbers = list(operands)
    said = []
    for place in (0, 1, 0):
        a, b = numbers[place : place + 2]
        swaps = _exceeds(a, b, knowledge)
        said.append(f"{_spoken(a)} {('under', 'above')[swaps]} {_spoken(b)} {('stay', 'swap')[swaps]}")
        numbers[place : place + 2] = (b, a) if swaps else (a, b)
    return f"{' '.join(said)} \\boxed{{{', '.join(map(_spoken, numbers))}}}"


def _draw_letters(rng: random.Random) -> Operands:
    return tuple(rng.choices(LETTERS, k=3))


def _letters(operands: Operands, knowledge: Knowledge) -> str:
    codes = [knowledge.encode(letter) for letter in operands]
    working = ";".join(f"{letter}:{code}" for letter, code in zip(operands, codes, strict=True))
    return f"{working} \\boxed{{{''.join(codes)}}}"


DOMAINS = (
    StudyDomain(name="digits", draw=_draw_sum, ask=lambda pair: f"{pair[0]}+{pair[1]}=", respond=_digits),
    StudyDomain(
        name="words",
        draw=_draw_sum,
        ask=lambda pair: f"add {_spoken(pair[0])} and {_spoken(pair[1])}",
        respond=_words,
    ),
    StudyDomain(
        name="ledger", draw=_draw_sum, ask=lambda pair: f"cash {pair[0]} goods {pair[1]} total", respond=_ledger
    ),
    StudyDomain(
        name="largest", draw=_draw_numbers(5), ask=lambda numbers: f"largest:{','.join(numbers)}", respond=_largest
    ),
    StudyDomain(
        name="sort",
        draw=_draw_numbers(3),
        ask=lambda numbers: f"sort {', '.join(map(_spoken, numbers))}",
        respond=_sort,
    ),
    StudyDomain(name="letters", draw=_draw_letters, ask=lambda letters: f"brew:{''.join(letters)}", respond=_letters),
)
