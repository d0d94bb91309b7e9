"""The study's domains: workings, answers, and a writer whose errors are as frequent as the small model needs them.

Not covered: the model, which `python -m benchmarks.study.pretrain` trains for minutes and then holds to its accuracy.
"""

import random
import re
import statistics

import pytest

from benchmarks.study.domains import DOMAINS, WORDS, Example, StudyDomain
from benchmarks.study.knowledge import LETTERS, Knowledge
from benchmarks.study.tokens import PAD, make_tokenizer
from megatron_mcpo.rewards.answers import exact
from megatron_mcpo.rewards.boxes import last_boxed

BY_NAME = {domain.name: domain for domain in DOMAINS}
CONTROL = "letters"

by_domain = pytest.mark.parametrize("domain", DOMAINS, ids=BY_NAME)


def examples(domain: StudyDomain, number: int, *, half_known: bool = False) -> list[Example]:
    rng = random.Random(1)
    return [domain.example(rng, half_known=half_known) for _ in range(number)]


def numerals(text: str) -> str:
    """Write numbers that are spoken digit by digit as numerals."""
    word = f"(?:{'|'.join(WORDS)})"
    return re.sub(rf"{word}(?: {word})*", lambda found: "".join(str(WORDS.index(w)) for w in found[0].split()), text)


def solved_otherwise(name: str, question: str) -> str:
    """Return the answer by Python's own arithmetic and ordering."""
    if name == CONTROL:
        return "".join(map(Knowledge().encode, question.partition(":")[2]))
    numbers = re.findall(r"\d+", numerals(question))
    if name == "largest":
        return max(numbers, key=int)
    if name == "sort":
        return ", ".join(sorted(numbers))
    return str(sum(map(int, numbers)))


@by_domain
def test_true_responses_are_right(domain: StudyDomain) -> None:
    for example in examples(domain, 300):
        assert numerals(example.answer) == solved_otherwise(domain.name, example.question)
        assert exact({"answer": example.answer}, example.response) == 1.0


@by_domain
def test_errors_are_as_frequent_as_pretraining_needs_them(domain: StudyDomain) -> None:
    scores = [exact({"answer": e.answer}, e.response) for e in examples(domain, 1000, half_known=True)]
    assert 0.3 < statistics.fmean(scores) < 0.55


@pytest.mark.parametrize(
    ("name", "question", "response"),
    [
        ("digits", ("345", "378"), "58=3c47=2c33=7n \\boxed{723}"),
        ("digits", ("864", "484"), "44=8n68=4c84=3c \\boxed{1348}"),
        (
            "words",
            ("345", "378"),
            "five eight makes three carry four seven makes two carry three three makes seven alone "
            "\\boxed{seven two three}",
        ),
        (
            "ledger",
            ("345", "378"),
            "ones 5 8 put 3 over tens 4 7 put 2 over hundreds 3 3 put 7 done \\boxed{723}",
        ),
        ("largest", ("78", "86", "83", "46"), "78<86,86>83,86>46 \\boxed{86}"),
        (
            "sort",
            ("74", "73", "38"),
            "seven four above seven three swap seven four above three eight swap seven three above three eight swap "
            "\\boxed{three eight, seven three, seven four}",
        ),
    ],
)
def test_workings(name: str, question: tuple[str, ...], response: str) -> None:
    assert BY_NAME[name].respond(question, Knowledge()) == response


def test_a_forgotten_carry_gives_the_sum_without_it() -> None:
    class Forgetful(Knowledge):
        def add(self, a: int, b: int, carry: int) -> tuple[int, int]:
            return (a + b + carry) % 10, 0

    forgetful = BY_NAME["digits"].respond(("345", "378"), Forgetful())
    assert forgetful == "58=3n47=1n33=6n \\boxed{613}"
    assert exact({"answer": "723"}, forgetful) == 0.0


def test_the_control_shares_no_operand_with_the_others() -> None:
    tokens = {name: set(re.findall(r"[a-z]+|[A-Z0-9]", _texts(domain))) - {"boxed"} for name, domain in BY_NAME.items()}
    others = set().union(*(found for name, found in tokens.items() if name != CONTROL))
    assert not tokens[CONTROL] & others
    assert {Knowledge().encode(letter) for letter in LETTERS} == set(LETTERS)


def test_questions_are_distinct_and_drawn_the_same_again() -> None:
    first, second = (
        [example for example, _ in zip(BY_NAME["sort"].distinct(random.Random(3)), range(500), strict=False)]
        for _ in range(2)
    )
    assert first == second
    assert len({example.question for example in first}) == 500


@by_domain
def test_tokens_give_the_text_again(domain: StudyDomain) -> None:
    drawn = examples(domain, 50)
    tokenizer = make_tokenizer([text for e in drawn for text in (e.question, e.response)])
    for example in drawn:
        ids = tokenizer(example.response, add_special_tokens=False)["input_ids"]
        assert tokenizer.convert_tokens_to_ids(PAD) not in ids
        assert tokenizer.decode(ids) == example.response
        assert last_boxed(tokenizer.decode(ids)) is not None


def _texts(domain: StudyDomain) -> str:
    return " ".join(text for e in examples(domain, 100) for text in (e.question, e.response))
