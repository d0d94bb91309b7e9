r"""What kind `math` takes for equal: small and large numbers, chains of equations, boxes that are unreadable, text.

Scored in this process by the function that the workers call. Not covered: what math-verify does beyond this
(its own tests), and time limits (test_verifiers.py).
"""

import time

import math_verify
import pytest
from math_verify import grader

from megatron_mcpo.rewards import math_verify_fixes
from megatron_mcpo.rewards.latex import as_latex
from megatron_mcpo.rewards.math_answer import score


def boxed(content: str) -> str:
    return f"So it is \\boxed{{{content}}}."


DIFFERENT = [
    (r"1.6 \times 10^{-19}", r"9.1 \times 10^{-31}"),
    (r"1.6 \times 10^{-19}", r"1.6 \times 10^{-20}"),
    (r"4.2 \cdot 10^{-7}", r"-4.2 \cdot 10^{-7}"),
    ("0.0000001", "0.0000002"),
    ("0.0000001", "0"),
    ("0", "0.0000001"),
    (r"\frac{1}{52!}", "0"),
    (r"\frac{1}{52!}", r"\frac{1}{53!}"),
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"),
    ("2^{-99}", "3^{-98}"),
    (r"1-\frac{1}{2^{100}}", r"1-\frac{1}{2^{99}}"),
    (r"1-\frac{1}{2^{100}}", "1"),
    (r"\frac{2^{100}+1}{2^{101}}", r"\frac{1}{2}"),
    (r"\frac{1}{2}+\frac{1}{2^{101}}", r"\frac{1}{2}-\frac{1}{2^{101}}"),
    (r"\frac{2^{2005}+1}{3 \cdot 2^{2006}}", r"\frac{1}{3 \cdot 2^{2006}}"),
    ("e^{-40}", "e^{-41}"),
    (r"10^{-20}\pi", "10^{-20}e"),
    (r"\sqrt{2}-1.414213562", "0"),
    (r"\frac{1}{100000}", r"\frac{1}{100001}"),
    ("10^{20}+1", "10^{20}"),
    ("2^{2005}", "2^{2005}+1"),
    ("9999999", "9999990"),
    ("9999999.0", "9999990"),
    (r"\frac{1}{3}", "0.33"),
    (r"\pi", "3.14159"),
    (r"\{2, 1.6 \times 10^{-19}\}", r"\{2, 9.1 \times 10^{-31}\}"),
    (r"(0, 10^{-20})", r"(0, 10^{-21})"),
    (r"\begin{pmatrix}1\\10^{-20}\end{pmatrix}", r"\begin{pmatrix}1\\10^{-21}\end{pmatrix}"),
    (r"x = 1.6 \times 10^{-19}", r"x = 9.1 \times 10^{-31}"),
    (r"10^{-20} x", r"2 \cdot 10^{-20} x"),
    (r"x < 10^{-20}", r"x < 10^{-21}"),
]
EQUAL = [
    (r"1.6 \times 10^{-19}", r"16 \times 10^{-20}"),
    (r"1.6 \times 10^{-19}", "1.6e-19"),
    ("1.6e-19", "0.00000000000000000016"),
    (r"\frac{1}{2^{99}}", "2^{-99}"),
    (r"\frac{1}{3}", "0.333333"),
    ("0.333333", r"\frac{1}{3}"),
    (r"\frac{1}{6}", "0.166667"),
    (r"\frac{1}{12}", "0.083333"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    (r"\log_2 3", r"\frac{\ln 3}{\ln 2}"),
    (r"10^{-20}\sqrt{8}", r"2 \cdot 10^{-20}\sqrt{2}"),
    (r"\{2, 1.6 \times 10^{-19}\}", r"\{1.6 \times 10^{-19}, 2\}"),
    (r"10^{-20} (x + 1)", r"10^{-20} x + 10^{-20}"),
    ("0.001x + 1000.1", "1000.1 + 0.001x"),
    ("72.00", "72"),
    ("72", "72.00"),
    ("9", r"9\%"),
]


@pytest.mark.parametrize(("answer", "other"), DIFFERENT)
def test_different_numbers_differ_however_close(answer: str, other: str) -> None:
    assert score({"answer": answer}, boxed(other)) == 0.0
    assert score({"answer": other}, boxed(answer)) == 0.0
    assert score({"answer": answer}, boxed(answer)) == score({"answer": other}, boxed(other)) == 1.0


@pytest.mark.parametrize(("answer", "other"), EQUAL)
def test_equal_numbers_are_equal_however_they_are_written(answer: str, other: str) -> None:
    assert score({"answer": answer}, boxed(other)) == 1.0


def test_the_repair_of_math_verify_is_still_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    charge, mass = math_verify.parse(r"$1.6 \times 10^{-19}$")[0], math_verify.parse(r"$9.1 \times 10^{-31}$")[0]
    assert not math_verify.verify(charge, mass)
    monkeypatch.setattr(grader, "sympy_numeric_eq", math_verify_fixes._numeric_eq)
    assert math_verify.verify(charge, mass), "remove math_verify_fixes.py"


UNITS = ("dollars", "points", "square units", "m/s", "cm^2", "cm^{2}", "cm²", "ft^3", "m^2", "km/h", "m/s^2", "Apples")
UNITS += ("meters per second", "miles/hour", "units squared", "units^2", "sq ft", "cm", "kg", "hours", "degrees")
NO_UNITS = ("x", "xyz", "pi", "sqrt 2", "log 10", "or 9", "and 9", "mod 3", "choose 3", "factorial", "squared")
NO_UNITS += ("million", "hundred", "dozen", "halves", "apples and 9 pears", "dollars + 1", "x^2", "g^2", "a/b", "DNA")


@pytest.mark.parametrize("unit", UNITS)
def test_a_number_with_a_unit_is_that_number(unit: str) -> None:
    assert score({"answer": "8"}, boxed(f"8 {unit}")) == score({"answer": f"8 {unit}"}, boxed("8")) == 1.0
    assert score({"answer": f"8 {unit}"}, boxed(f"8 {unit}")) == 1.0
    assert score({"answer": "8"}, boxed(f"9 {unit}")) == score({"answer": "8"}, boxed(f"18 {unit}")) == 0.0


@pytest.mark.parametrize("words", NO_UNITS)
def test_what_may_be_part_of_an_expression_is_no_unit(words: str) -> None:
    assert score({"answer": "8"}, boxed(f"8 {words}")) == 0.0


RIGHT = [
    *(("1200", boxed(f"{number} dollars")) for number in ("1200", "1,200", "$1,200", "1200.00", r"1{,}200")),
    *(
        ("1.5", boxed(text))
        for text in ("1.5 cups", "3/2 cups", "1 1/2 cups", r"\frac{3}{2} cups", r"1½\ cups", "1.5 cups.")
    ),
    ("-3", boxed("-3 points")),
    ("7", boxed("x = 3 + 4 = 7")),
    ("7", boxed("3 + 4 = 7")),
    ("0.67", boxed(r"\frac{2}{3} = 0.67")),
    ("x \\neq 3", boxed(r"x \ne 3")),
    (r"1, 2, \ldots, n", boxed(r"1, 2, \ldots, n")),
    ("1.75", boxed("1 3/4")),
    ("-1.75", "It is -1 3/4."),
    ("3000", boxed(r"3\,000")),
    ("1234", boxed("1 234")),
    ("3.5", boxed("3½")),
    ("0.75", "It is ¾."),
    ("3", boxed("３")),
    (r"\sqrt{2}", boxed("√2")),
    ("x^2", boxed("x²")),
    ("x^{-1}", boxed("x⁻¹")),
    ("x^2", boxed("x**2")),
    (r"\frac{\pi}{2}", boxed("pi/2")),
    (r"-2\pi", boxed("-2*pi")),
    ("e^{16} - 1", boxed("-1 + exp(16)")),
    (r"\ln 2", boxed("ln(2)")),
    (r"\infty", boxed("∞")),
    (r"90^\circ", boxed("90°")),
    ("5", boxed("≈ 5")),
    ("5", boxed(r"\approx 5.")),
    ("5", boxed("**5**")),
    ("5", boxed("€5")),
    ("(0,12.5)", boxed("0 < x < 12.5")),
    (r"(-\infty, 3)", boxed("x<3")),
    (r"\frac{\pi}{2}", r"\frac{\pi}{2}"),
    (r"2\sqrt{2}", "<b>\n2\\sqrt{2}"),
    (r"2\sqrt{2}", r"The answer is 2\sqrt{2}."),
    ("1.6e-19", "It is 1.6e-19 C"),
    ("73", "Final answer: *73*"),
    ("73", "Final Answer: **73**"),
    ("-1234.5", "-$1,234.50"),
    ("42", "- 41\n- 42"),
    ("42", "1. 42"),
    ("34", "Answer: 17*2"),
    ("34", "Answer: 34 (since 35-1=34)"),
    ("34", "Answer: 34\n\nCheck: 34 + 1 = 35"),
    ("34", "The answer is 34.\n\n34 + 1 = 35"),
    ("35", "I look for the answer.\n\n34 + 1 = 35"),
    ("35", "The answer (see above) is 35"),
    (r"2\sqrt{2}", "### Answer\n\n2\\sqrt{2}"),
    (r"\{1, 2\}", "1 and 2"),
    ("12", "First 20 apples.\n20 - 8 = 12"),
    *(("12", text) for text in ("3 * 4", "First\n20 - 8", "First\n3 * 4", "1) 3 * 4", "First\n(a) 3 + 9 = 12")),
    ("2x - 5", "So\n2x - 5"),
    ("6", "C(4,2) = 6"),
    ("42", "**Answer: 42**"),
    ("6", "**2 * 3 = 6**"),
    ("5", "√25 = 5"),
    *(("8", boxed(f"8{space}")) for space in (r"\,", r"\;", r"\:", r"\!", r"\ ", "~", r"\quad", r"\, \;", r"\,.")),
    *(("8", boxed(text)) for text in (r"\,8", "~8", r"\quad 8", r"$8\,$", r"\; $8\,$\;.")),
    (r"8\,", "It is 8."),
    (r"8~", boxed(r"8\;")),
    *(("ABCD", boxed(text)) for text in ("ABCD", "abcd", r"\text{ABCD}", "A B C D", "x = ABCD", r"A \cdot B C D")),
    *(("HTTH", text) for text in ("It is $HTTH$.", boxed(r"\mathrm{HTTH}"))),
    (r"\text{Evelyn}", boxed("Evelyn")),
    *(("xy", boxed(text)) for text in ("yx", "xy", "x y", r"y \cdot x")),
    *(("1001_2", boxed(text)) for text in ("1001_2", "1001_{2}", "1001", "1001_{(2)}", "9_{10} = 1001_2")),
    ("1001", boxed("1001_2")),
    ("6", boxed("110_2 = 6_{10}")),
]
WORKED = [
    *(("12", f"{text} = 12") for text in ("15% of 80", "LCM of 4 and 6", "Sum of digits of 93", "1100_2", "27 % 15")),
    *(("12", f"{text} = 12") for text in ("So 15% of 80", "The sum of 5, 7", "LCM(4, 6)", "3 times 4", "AB = 3 * 4")),
    *(("12", f"{text} = 12") for text in (r"27 \bmod 15", "(2)(6)", "2(6)", "1,200 / 100", "sin(90) * 12", "Angle 3")),
    *(
        ("12", f"{text} = 12")
        for text in (r"$27 \bmod 15$", r"$\frac{1}{2}(24)$", "<<3*4=12>>12 or 24/2", "So $5 + $7")
    ),
    *(("10", f"2 + 2 = 4{mark} 4 + 6 = 10") for mark in (",", ";", ".", " and")),
    *(("20", text) for text in ("100 - 80 = 20%", "10/50 * 100 = 20%", "10/50 = 0.20 = 20%", "100% - 80% = 20%")),
    *(("1200", text) for text in ("12 * 100 = 1,200", "She pays 12 * $100 = $1200", r"$12 \cdot 100 = 1{,}200$")),
    *(("3", text) for text in ("log2(8) = 3", r"$\log_2 8 = 3$", "2x = 6, x = 3", r"$2y = 6 \implies y = 3$")),
    ("2", "112 mod 10 = 2"),
    ("18", "She makes 9 * 2 = $18 every day at the farmer's market."),
    (r"\frac{3}{4}", r"$P(A) = \frac{6}{8} = \frac{3}{4}$"),
    (r"2\sqrt{3}", "√12 = 2√3"),
]
"""Last lines with an equation that holds, though math-verify may read something else."""
WRONG = [
    *(("6", text) for text in ("7=6", boxed("7=6"), "$7=6$", "so 7 = 6", boxed("5 = 7 = 6"), boxed("x = 7 = 6"))),
    *(("3", boxed(text)) for text in (r"\neq 3", r"x \neq 3", r"x \not= 3", "x ≠ 3", "3 \\neq 4", "4 != 3", "not 3")),
    *(("3", boxed(text)) for text in (r"4 \to 3", "4 | 3", "4 ? 3", r"\neg 3", r"4 \lor 3", r"4 \cup 3")),
    *(("2", boxed(text)) for text in (r"1, 2, \ldots, n", r"1, 2, \ldots", "1 3/4")),
    (r"1, 2, \ldots, n", boxed(r"1, 3, 5, \ldots, 2n-1")),
    ("1", boxed("1 3/4")),
    ("0", boxed(r"3\,000")),
    ("9", boxed("3 3")),
    ("7", boxed(r"3 \quad 4")),
    ("1.6", "It is 1.6e-19"),
    *(("36", text) for text in ("34 35 36", "$34$ $35$ $36$", "34 = 35 = 36", boxed("34, 35, 36"), "34, 35, 36")),
    *(("34", f"Answer: 34{rest}") for rest in (" or 35 or 36", ", 35, 36", " and 35", " + 1")),
    ("34", "3 * 4"),
    ("2x5", "So\n2x - 5"),
    *(("12", f"{text} = 12") for text in ("20 - 7", "So 20 - 7", "Hence, 20 - 7", "Note: 20 - 7", "Steps\n- 20 - 7")),
    *(("13", f"{text} = 13") for text in ("He pays $4 * $3. So $4 * $3", r"so $4 \times 3", "The answer is 4 * 3")),
    (r"\frac{1}{3}", r"So $\frac{1}{2} = \frac{1}{3}$."),
    *((answer, "27 mod 15 = 12") for answer in ("27", "15", "0")),
    *(("ABCD", boxed(text)) for text in ("DCBA", r"\text{DCBA}", "ABC", "ABDC", "A B D C", "x = DCBA", "4")),
    *(("HTTH", text) for text in ("It is $THHT$.", boxed("THHT"), boxed(r"\mathrm{HTHT}"))),
    ("AB", boxed("BA")),
    ("seat", boxed("east")),
    (r"\text{CBA}", boxed("ABC")),
    *(("1001_2", text) for text in (boxed("1001_3"), boxed("1001_{3}"), "It is $1001_3$.", "The answer is 1001_3.")),
    *((answer, "2x = 6, x = 3") for answer in ("6", "2")),
]


@pytest.mark.parametrize(("answer", "response"), [*RIGHT, *WORKED])
def test_right(answer: str, response: str) -> None:
    assert score({"answer": answer}, response) == 1.0


@pytest.mark.parametrize(("answer", "response"), WRONG)
def test_wrong(answer: str, response: str) -> None:
    assert score({"answer": answer}, response) == 0.0


@pytest.mark.parametrize(
    ("written", "latex"),
    [
        ("12 000 000", "12000000"),
        ("2e3", r"2 \times 10^{3}"),
        ("x2e3", "x2e3"),
        ("3.2.1e5", "3.2.1e5"),
        (r"\log_2 3", r"\log_2 3"),
        ("1,234", "1,234"),
        (r"\pi", r"\pi"),
        (r"\$5", "5"),
        ("$$x = 5$$", "x = 5"),
        (r"\[ 5 \]", "5"),
        (r"\, 5\;", "5"),
        (r"5 \\,", r"5 \\"),
        ("8 m", "8 m"),
        ("8 ab", "8 ab"),
        ("8 apples", "8"),
        ("2*3*4", "2*3*4"),
    ],
)
def test_plain_text_becomes_latex(written: str, latex: str) -> None:
    assert as_latex(written) == latex


@pytest.mark.parametrize("text", ["1 = 1. ", "so 1 ", "is (", "2 * ", "=", r"\times", r"\frac{1}{2}", "**", "**a"])
def test_a_long_response_without_a_box_is_scored_in_time(text: str) -> None:
    started = time.monotonic()
    score({"answer": "7"}, text * 50_000)
    score({"answer": "7"}, "Answer: " + text * 50_000)
    assert time.monotonic() - started < 5.0


def test_a_long_answer_takes_linear_time() -> None:
    for text in ("9 " * 50_000, "1 2/" * 50_000, "*" * 100_000, "$" * 100_000, "1e" * 50_000, "$" + " " * 100_000):
        as_latex(text)
    for text in ("8 ", "8,000", "8 a", "a", "m/s", "8 apples per ", "million", "abc"):
        as_latex("8 " + text * 50_000 + "!")
    for text in ("~", r"\,", r"\quad", "\\ "):
        as_latex(text * 50_000 + "x" + text * 50_000 + "y")
    as_latex("\\(" * 50_000 + "\\)" * 50_000)
