"""How close numbers must be for kind `numeric`: whole numbers, small numbers, tolerances. What a number is:
test_verifiers.py.
"""

import pyarrow.parquet
import pytest

from megatron_mcpo.rewards.answers import numeric
from megatron_mcpo.rewards.number_parser import last_number
from megatron_mcpo.rewards.voting import stated_number
from tests.support.paths import DATA


def score(answer: str, response: str, tolerance: float | None = None) -> float:
    return numeric({"answer": answer}, response, tolerance=tolerance)


@pytest.mark.parametrize(
    ("answer", "other"),
    [
        ("9999999", "9999990"),
        ("9999999", "9999990.0"),
        ("9,999,999", "10,000,000"),
        ("9007199254740993", "9007199254740992"),
        ("1" * 300, "1" * 299 + "2"),
        ("1e-10", "2e-10"),
        ("6.6e-34", "1e-20"),
        ("0.0000001", "0"),
        ("0.0000001", "0.0000002"),
        ("1/13983816", "1/13983817.5e3"),
        ("0.33", "1/3"),
        ("1234567.5", "1234569"),
        ("-1e-10", "1e-10"),
    ],
)
def test_different_numbers_differ(answer: str, other: str) -> None:
    assert (score(answer, other), score(other, answer)) == (0.0, 0.0)
    assert (score(answer, answer), score(other, other)) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("answer", "other"),
    [
        ("1/3", "0.333333"),
        ("1/6", "0.166667"),
        ("1/12", "0.083333"),
        ("0.30000000000000004", "0.3"),
        ("3.14159265", "3.141592"),
        ("1234567.25", "1234567.0"),
        ("1e-10", "0.0000000001"),
        ("1e6", "1,000,000"),
        ("0", "-0.0"),
        ("100%", "1"),
    ],
)
def test_numbers_that_are_the_same_but_for_rounding_are_equal(answer: str, other: str) -> None:
    assert score(answer, other) == 1.0


def test_a_tolerance_that_is_given_counts_for_whole_and_small_numbers_too() -> None:
    assert score("9999999", "9999990", 1e-6) == 1.0
    assert score("0.001", "0.00109", 0.1) == 1.0
    assert score("0.001", "0.00111", 0.1) == 0.0
    assert score("1e-10", "2e-10", 0.01) == 0.0
    assert score("5", "5.0000000001", 0.0) == 0.0


def test_no_wrong_answer_of_gsm8k_is_right() -> None:
    """Hold every answer against its neighbours and its digits with one changed: whole numbers differ."""
    rows = pyarrow.parquet.read_table(DATA / "gsm8k_train.parquet")["reward_model"].to_pylist()
    values = {int(row["ground_truth"].replace(",", "")) for row in rows} | {9_999_999, 123_456_789_012}
    wrong = [
        (v, w) for v in values for w in (v + 1, v - 1, -v - (v == 0), v + 10, v * 10 + (v == 0), int(f"{v}0"[1:] or 7))
    ]
    wrong = [(v, w) for v, w in wrong if v != w]
    assert len(wrong) > 500
    assert [(v, w) for v, w in wrong if score(str(v), f"So it is {w}.")] == []
    assert all(score(str(v), f"So it is {v:,}.") for v in values)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3½", "3.5"),
        ("¾", "0.75"),
        ("１，２３４", "1234"),
        ("1.23 × 10^5", "123000"),
        (r"1.23 \times 10^{-2}", "0.0123"),
        ("1.23*10**5 m", "123000"),
        (r"so \frac{3}{4}", "0.75"),
        (r"3, \frac{3}{4} cm", "0.75"),
        ("**-5 km", "-5"),
        ("_12.5_ apples", "12.5"),
        ("US$5 each", "5"),
        ("10 kg CO2", "10"),
        ("12\n- 5", "5"),
    ],
)
def test_a_number_is_read_in_these_forms_too(text: str, number: str) -> None:
    assert score(number, text) == 1.0


@pytest.mark.parametrize(
    "text",
    ["x12.5", "H42", "12.5½", "1 234", "3/4 × 10^5", "2 * -5", "3:5", "10 km - 5", r"\frac{x}{5}", "50%:30", "f(5)"],
)
def test_a_part_of_something_is_no_number(text: str) -> None:
    assert [score(answer, text) for answer in ("5", "-5", "0.5", "234", "42", "12.5", "2", "30")] == [0.0] * 8


def test_no_text_takes_the_parser_more_than_linear_time() -> None:
    for text in (
        "9",
        "1/",
        "- ",
        "(",
        "5 ",
        r"\frac{",
        "*",
        " ",
        "a",
        "a b ",
        "1,",
        "*a",
        "{,}",
        r"\text{",
        "5 km/",
        "−",
    ):
        last_number(text * 30_000 + "5")
        last_number("5" + text * 30_000)


def test_a_vote_keeps_large_whole_numbers_apart() -> None:
    assert stated_number("so 9007199254740993") == "9007199254740993"
    assert stated_number("so 5.0") == "5" and stated_number("0.5") == "0.5" and stated_number("50%") == "50%"
    assert stated_number("9" * 400 + "/7").startswith("9")
