"""What each kind of verifier takes for right: tables of answers, hostile text in real workers, rows of real data.

Real data are some rows of GSM8K and CommonsenseQA (data/README.md). Not covered: reasoning_gym (test_rewards.py), judge
(test_judge.py), code, and what math-verify takes for equal beyond a few cases of each sort.
"""

import inspect
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from megatron_mcpo.config.domain_schema import RewardsConfig, VerifierConfig
from megatron_mcpo.rewards.registry import VERIFIERS, check_of
from megatron_mcpo.rewards.scorer import Scorer
from megatron_mcpo.rewards.worker import checked_score, load_verifier
from tests.support.paths import DATA
from tests.support.scoring import HOSTILE, config_of, group, scorer_of

RIGHT: list[tuple[str, Any, str]] = [
    *(("choice", "B", text) for text in ("B", "b", "(B)", "B.", "[B]", "**B.**", "$B$", "B. bank", "(b) bank")),
    *(("choice", "B", text) for text in ("The answer is B", "the answer is (b).", "**Answer:** B", "Answer: **(B)**")),
    *(("choice", "B", text) for text in ("The correct answer is: option B, because A isn't.", "answer is\n\nB\n\nend")),
    *(("choice", "B", text) for text in (r"\boxed{B}", r"$\boxed{\text{(B)}}$.", r"\boxed{B. bank}", r"{\boxed{B}")),
    ("choice", "B", "The answer is A. No: the answer is B"),
    ("choice", "B", r"\boxed{A}? No, the answer is B"),
    ("choice", "B", r"The answer is A or C? No: \boxed{B}"),
    ("choice", "(b)", "B"),
    ("choice", "A", "The answer is A."),
    ("choice", "B", "The answer is B. That is why this answer is correct."),
    ("choice", "B", r"\boxed{B} I hope the answer is clear."),
    ("choice", "B", "Answer: B\n\nExplanation: the answer is not A since it is dry."),
    ("choice", "B", "The answer is B. I do not think that the correct answer is A."),
    ("choice", "B", "The answer is B. If the answer was C or if the answer is A, it would rain. A wrong answer is C."),
    ("choice", "B", "It is not C so the answer is B"),
    *(
        ("choice", "B", f"The answer is B{rest}")
        for rest in (", a bank.", ", B.", " and I am sure", ", an item", " I think")
    ),
    *(("choice", "B", text) for text in (r"The answer is \text{B}", r"The answer is \(\mathbf{B}\).", "**Answer**: B")),
    *(
        ("choice", "A", f"The answer is A{rest}")
        for rest in (" because banks", " since it is", "\n\nBanks are", ", a bank")
    ),
    *(("choice", "A", text) for text in ("The answer is **A** bank", "The answer is (A) bank", "Answer: A as I said")),
    ("exact", "a b", "  a b\n"),
    ("exact", "a b", r"It is \boxed{a b}."),
    ("exact", r"\boxed{3}", r"\boxed{3}"),
    ("exact", 3, "3"),
    ("text", "The Eiffel Tower", "eiffel  tower."),
    ("text", "New York", r"So: \boxed{new york}"),
    ("text", "U.S.", "us"),
    ("text", "don't", "Dont"),
    ("text", "-3.5", "-3.5!"),
    *(
        ("numeric", "42", text)
        for text in ("42", "so 42.", "41 + 1 = 42", "2^3 + 34 = 42", "1, 2 or 42", r"\boxed{42} of 43", "#### 42")
    ),
    *(("numeric", "42", text) for text in ("+42", "42.0", "$42", r"\$42 a day", "42 apples", "42m2", "(42)", "4.2e1")),
    *(("numeric", "-1234.5", text) for text in ("-1,234.5", "x=-1234.5", "−1234.50", "-$1,234.5", "$-1,234.5")),
    *(("numeric", "1.75", text) for text in ("7/4", "1 3/4", r"\frac{7}{4}", r"\boxed{\dfrac{7}{4}}", "1.750", "175%")),
    ("numeric", "50", "50%"),
    ("numeric", "50%", "0.5"),
    *(
        ("numeric", "12", f"12{unit}")
        for unit in (" cm^2", "cm²", r"\text{ cm}^2", r"\,\mathrm{m}/s^{2}", " square km^2")
    ),
    *(("numeric", "12", f"12{unit}") for unit in ("°", r"^\circ", r"^{\circ}C", " CO2", " kg CO2", "/day", "\n- done")),
    *(("numeric", "1234", rf"\boxed{{1{mark}234}}") for mark in (",", "{,}", r"\!", r",\!", r"\,")),
    *(("numeric", rf"10{mark}000", "10,000") for mark in (",", "{,}", r"\!", r",\!", r"\,")),
    *(
        ("numeric", "42", text)
        for text in ("**42**", "**Answer** 42", "Answer - 42", "1. 42", "- 41\n- 42", "It is 42!")
    ),
    *(("numeric", "42", text) for text in (r"$x = 42$", r"\(42\)", r"\text{So }42", "x = 3 * 14 = 42", "42 (apples)")),
    *(("numeric", "-5", text) for text in ("is -5", "x = - 5", r"\boxed{- 5}", "(-5)", "-(5)", "−5", "-5 m")),
    *(("numeric", "-0.75", text) for text in (r"-\frac{3}{4}", r"\frac{-3}{4}", "-3/4")),
    ("numeric", "1.75", r"1\frac{3}{4}"),
    *(("numeric", "-1.75", text) for text in ("-1 3/4", r"-1\frac{3}{4}")),
    ("numeric", "so 6 * 7 #### 1,042", "1042"),
    ("numeric", 0.1, ".1"),
    *(
        ("math", "72", text)
        for text in ("72", "so 72.", r"\boxed{72}", "#### 72", "$72.00$", r"\boxed{70+2}", "72 clips")
    ),
    *(("math", r"\frac{1}{2}", text) for text in ("1/2", "0.5", r"\boxed{\dfrac12}", r"$\frac{2}{4}$")),
    ("math", "so 70 + 2 = 72 #### 1,072", r"\boxed{1072}"),
    ("math", r"\boxed{x^2+2x+1}", r"the answer is $(x+1)^2$"),
    ("math", r"\{1, 2\}", r"\boxed{\{2, 1\}}"),
    ("math", r"2\sqrt{2}", r"\boxed{\sqrt{8}}"),
    ("math", "B", r"\boxed{B}"),
]
WRONG: list[tuple[str, Any, str]] = [
    *(
        ("choice", "B", text)
        for text in ("A", "", "B C", "BB", "B'", "bank", "A. bank B. mall", "B. bank\nC. mall", "?")
    ),
    *(
        ("choice", "B", text)
        for text in ("The answer is A or B", "the answer is B/C", "Answer: (B), (C)", "answer: B & C")
    ),
    *(
        ("choice", "B", text)
        for text in (r"\boxed{A, B}", r"\boxed{B and C}", r"\boxed{}", r"\boxed{B", r"\boxed{bank}")
    ),
    ("choice", "B", "The answer is B. No: the answer is A"),
    ("choice", "B", r"The answer is B, that is \boxed{C}"),
    ("choice", "B", "I think B is nice. The answer is unknown"),
    ("choice", "A", "The answer is A bank"),
    ("choice", "A", "The answer is a bank"),
    *(
        ("choice", "A", f"The answer is A{rest}")
        for rest in (" for-profit bank", " or B", " and B", ", B", " B", ", A, B")
    ),
    *(
        ("choice", "B", f"The answer is B{rest}")
        for rest in (" or maybe C", " (or C)", r"} or \text{A", ", a or c", " (A)")
    ),
    *(
        ("choice", "B", text)
        for text in ("I don't think the answer is B", "The wrong answer is B", "Not the answer: B")
    ),
    ("exact", "a b", "A b"),
    ("exact", "a b", "a b."),
    ("exact", "a b", r"\boxed{a b} or \boxed{c}"),
    ("text", "Eiffel Tower", "the Eiffel Tower in Paris"),
    ("text", "35", "3.5"),
    ("text", "5", "-5"),
    *(
        ("numeric", "42", text)
        for text in ("", "43", "none", "42 or 43", "4,2", "42,0", "4 2", r"\boxed{4} 42", "٤٢", "H42")
    ),
    *(("numeric", "42", text) for text in ("nan", "inf", "42/0", "1/42/2024", "42.0.0", "42e999", "42.0001")),
    *(
        ("numeric", "5", text)
        for text in ("10^5", "10^{5}", "10-5", "10 - 5", "10–5", "10 km - 5", "x+5", "x - 5", "10 / 5")
    ),
    *(
        ("numeric", "5", text)
        for text in ("2*5", "2 * 5", "2**5", "2 x 5", "2×5", r"2 \cdot 5", r"\pm 5", "3:5", "(2)(5)")
    ),
    *(
        ("numeric", "5", text)
        for text in (r"\sqrt{5}", r"\sqrt 5", "√5", "log(5)", r"\frac{x}{5}", "x_{5}", r"\frac35")
    ),
    *(
        ("numeric", "5", text)
        for text in ("5^2", "5²", "5½", r"5\sqrt{3}", r"5\pi", "5π", "5x", "5 + x", "5(x+1)", "5x^2", "5!")
    ),
    ("numeric", "5", r"0.\overline{5}"),
    ("numeric", "5", "- (-5)"),
    ("numeric", "5", "- 5"),
    ("numeric", "234", r"\boxed{1{,}234}"),
    ("numeric", "234", "1 234"),
    ("numeric", "31", "0x1F"),
    ("numeric", "0", "0x1F"),
    ("numeric", "5000%", "50%"),
    ("numeric", "-5", "5"),
    *(
        ("math", "72", text)
        for text in ("", "73", r"\boxed{73} and not 72", "seventy-two", r"\boxed{72, 73}", r"\boxed{x}")
    ),
    ("math", "0", r"$\frac{1}{0}$"),
    ("math", "x+1", r"\boxed{y+1}"),
]


def score(kind: str, answer: Any, response: str, *, choices: list[str] | None = None, **keys: Any) -> float:
    """As a worker comes to it, in this process."""
    check = check_of(VerifierConfig.model_validate({"kind": kind, **keys}), RewardsConfig())
    entry = {"question": "q", "answer": answer, "choices": choices, "metadata": {}}
    return checked_score(load_verifier(check.function)(entry, response, **check.options))


@pytest.mark.parametrize(("kind", "answer", "response"), RIGHT)
def test_right(kind: str, answer: Any, response: str) -> None:
    assert score(kind, answer, response) == 1.0


@pytest.mark.parametrize(("kind", "answer", "response"), WRONG)
def test_wrong(kind: str, answer: Any, response: str) -> None:
    assert score(kind, answer, response) == 0.0


@pytest.mark.parametrize("kind", ["math", "choice", "exact", "text", "numeric"])
@pytest.mark.parametrize("answer", ["", " ", None, True, ["B"], {}])
def test_an_item_without_a_usable_answer_is_an_error_not_a_zero(kind: str, answer: Any) -> None:
    with pytest.raises(ValueError, match="item's answer"):
        score(kind, answer, "B")


@pytest.mark.parametrize(
    ("kind", "answer"),
    [("choice", "BC"), ("choice", "bank"), ("numeric", "many"), ("numeric", "1/0"), ("text", "The")]
    + [
        ("numeric", answer)
        for answer in ("10^5", r"\sqrt{2}", "3,14", "x+3", r"2\pi", "1 234", "3:4", "5!", r"\frac{x}{2}")
    ],
)
def test_an_answer_that_the_kind_can_not_read_is_an_error(kind: str, answer: str) -> None:
    with pytest.raises(ValueError, match="item's answer"):
        score(kind, answer, "B")


def test_a_choice_may_be_given_as_its_text() -> None:
    assert score("choice", "mall", "The answer is (B)", choices=["bank", "mall"]) == 1.0
    assert score("choice", "B", "B", choices=["bank", "mall"]) == 1.0
    assert score("choice", "mall", "A", choices=["bank", "mall"]) == 0.0


def test_the_letter_of_a_choice_comes_before_its_text() -> None:
    blood = ["O", "A", "B", "AB"]
    assert score("choice", "A", "The answer is A.", choices=blood) == 1.0
    assert score("choice", "A", "The answer is B.", choices=blood) == 0.0
    assert score("choice", "AB", "The answer is D.", choices=blood) == 1.0
    assert score("choice", "O", "The answer is A.", choices=blood) == 1.0, "O is the letter of none of four"
    with pytest.raises(ValueError, match="'E', is neither the letter"):
        score("choice", "E", "E", choices=blood)


def test_tolerance_is_relative_above_one_and_absolute_below() -> None:
    assert score("numeric", "1000", "1009", tolerance=0.01) == 1.0
    assert score("numeric", "1000", "1011", tolerance=0.01) == 0.0
    assert score("numeric", "0", "0.009", tolerance=0.01) == 1.0
    assert score("numeric", "0", "0.011", tolerance=0.01) == 0.0
    assert score("numeric", "3", "3", tolerance=0.0) == 1.0


def test_a_format_is_the_whole_response() -> None:
    pattern = r"(?s)<think>.*</think>\s*\S+"
    assert score("format", None, "<think>a\nb</think> 3", pattern=pattern) == 1.0
    assert score("format", None, "so <think>a</think> 3", pattern=pattern) == 0.0
    assert score("format", None, "<think>a</think> 3 4", pattern=pattern) == 0.0


def test_every_kind_is_in_the_table() -> None:
    kinds = VerifierConfig.model_json_schema()["properties"]["kind"]["enum"]
    assert sorted(VERIFIERS) == sorted(kinds)
    keys = {key for kind in VERIFIERS.values() for key in kind.keys}
    assert keys | {"kind", "weight"} == set(VerifierConfig.model_fields), "a key that no kind has does nothing"
    assert all(set(kind.required) <= set(kind.keys) for kind in VERIFIERS.values())


@pytest.mark.parametrize("kind", ["choice", "exact", "text", "numeric"])
def test_hostile_text_gets_zero(kind: str) -> None:
    """In one process too: the worker that tried one text tries the next."""
    with scorer_of({"kind": kind}, timeout=20.0) as scorer:
        right = "C" if kind == "choice" else "77"
        scored = scorer.score([group(text, right, index=n, answer=right) for n, text in enumerate(HOSTILE)])
    assert [s.error for s in scored] == [None] * len(HOSTILE)
    assert [s.rewards for s in scored] == [(0.0, 1.0)] * len(HOSTILE)


def test_hostile_expressions_get_zero_or_time_out() -> None:
    with scorer_of({"kind": "math"}, timeout=4.0, workers=2) as scorer:
        scorer.wait_ready()
        scored = scorer.score([group(text, index=n, answer="77") for n, text in enumerate(HOSTILE)])
        [after] = scorer.score([group("77", "78", index=len(HOSTILE), answer="77")])
    assert after.rewards == (1.0, 0.0)
    failed = {text: s for text, s in zip(HOSTILE, scored, strict=True) if s.error is not None}
    assert [text[:30] for text, s in failed.items() if not s.timed_out] == []
    assert set(failed) <= {"9**9**9**9", "$9^{9^{9^9}}$", "$(10^{10^9})!$"}, "what computes forever, and nothing else"
    assert all(s.rewards == (0.0,) for s in scored if s.error is None)
    assert not Path("PWNED").exists()


def test_a_pattern_that_backtracks_for_ever_ends_with_its_worker() -> None:
    with scorer_of({"kind": "format", "pattern": "(a+)+b"}, timeout=1.0) as scorer:
        hanging, good = scorer.score([group("a" * 60), group("aab", "b", index=1)])
    assert hanging.timed_out and "no answer within 1 s" in str(hanging.error)
    assert good.rewards == (1.0, 0.0)


@pytest.mark.parametrize("kind", sorted(name for name, kind in VERIFIERS.items() if kind.of_rows and name != "code"))
def test_a_row_may_name_its_verifier(kind: str, rows: Scorer) -> None:
    right, wrong = ("B", "C") if kind == "choice" else ("3", "4")
    metadata = {"source_dataset": "chain_sum"} if kind == "reasoning_gym" else {}
    [scored] = rows.score([group(right, wrong, verifier=kind, answer=right, metadata=metadata)])
    assert (scored.error, scored.rewards, scored.correct) == (None, (1.0, 0.0), (True, False))


@pytest.fixture(scope="module")
def rows() -> Any:
    with Scorer(config_of([{}])) as scorer:
        yield scorer


@pytest.mark.parametrize("named", ["judge", "format", "length", "function", "no such kind", None, 3])
def test_a_row_that_names_no_verifier_of_rows_is_an_error(named: Any, rows: Scorer) -> None:
    [scored, good] = rows.score([group("B", verifier=named), group("right", index=1, verifier="exact")])
    assert scored.rewards == () and f"verifier {named!r} of the item" in str(scored.error)
    assert good.rewards == (1.0,)


def ground_truths(file: str) -> list[str]:
    return [row["ground_truth"] for row in pyarrow.parquet.read_table(DATA / file)["reward_model"].to_pylist()]


def as_written(answer: str) -> list[str]:
    return [f"So it is \\boxed{{{answer}}}.", f"First 3, then 4.\nThe answer is {answer}.", answer]


@pytest.mark.parametrize(
    ("kind", "file", "forms", "chance"),
    [
        ("numeric", "gsm8k_train.parquet", ["0", "9", "-9", "-99", "999999999"], (0.002, 0.03)),
        ("math", "gsm8k_test.parquet", ["9", "-9", "-99", "9,999", "99,999", "9,999,999", "9999999"], (0.002, 0.03)),
        ("choice", "commonsense_qa.parquet", ["A", "B", "C", "D", "E"], (0.15, 0.25)),
    ],
)
def test_real_answers_are_right_and_those_of_other_items_at_chance(
    kind: str, file: str, forms: list[str], chance: tuple[float, float]
) -> None:
    """Hold each answer against those of the ten rows after it: among so few rows, next to next may never coincide."""
    answers = ground_truths(file)
    assert len(answers) > 100
    assert set(forms) <= {*answers, *(re.sub(r"\d", "9", a) for a in answers)}
    missed = [(a, text) for a in answers for text in as_written(a) if score(kind, a, text) != 1.0]
    assert missed == []
    pairs = [pair for n in range(1, 11) for pair in zip(answers, answers[n:] + answers[:n], strict=True)]
    hits = [score(kind, a, as_written(other)[n % 3]) for n, (a, other) in enumerate(pairs)]
    value = str if kind == "choice" else lambda text: float(text.replace(",", ""))
    assert hits == [float(value(a) == value(other)) for a, other in pairs]
    assert chance[0] < sum(hits) / len(hits) < chance[1]


def none() -> float:
    return 1.0


def one(entry: dict[str, Any]) -> float:
    return 1.0


def three(entry: dict[str, Any], response: str, third: int) -> float:
    return 1.0


def by_name(*, entry: dict[str, Any], response: str) -> float:
    return 1.0


def optional(entry: dict[str, Any], response: str, third: int = 3, *rest: int, key: str = "", **others: Any) -> float:
    return 1.0


def anything(*arguments: Any) -> float:
    return 1.0


@pytest.mark.parametrize("function", [none, one, three, by_name])
def test_a_function_that_can_not_be_called_with_two_arguments_is_refused(function: Any) -> None:
    name = f"{__name__}:{function.__name__}"
    with pytest.raises(ValueError, match="two positional arguments") as refused:
        load_verifier(name)
    assert name in str(refused.value) and str(inspect.signature(function)) in str(refused.value)


@pytest.mark.parametrize("name", [f"{__name__}:optional", f"{__name__}:anything", "builtins:max", "math:gcd"])
def test_a_function_that_can_be_called_with_two_arguments_is_accepted(name: str) -> None:
    assert callable(load_verifier(name))
