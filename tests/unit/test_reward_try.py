"""The command `mcpo reward try`: every kind of verifier of rows, rows and pairs from files, errors, exit codes."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_mcpo.cli.main import main
from megatron_mcpo.rewards.registry import ROW_VERIFIERS

CODE = {"verifier": "code", "function": "f", "tests": [{"assert": "assert f(2) == 4"}]}
GENERATED = {"answer": "16", "metadata": {"source_dataset": "count_bits"}}


def tried(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    code = main(["reward", "try", *arguments, "--json"])
    return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def outcome(score: float | None, extracted: str | None, error: str | None = None) -> dict[str, Any]:
    return {"score": score, "correct": None if score is None else score == 1.0, "extracted": extracted, "error": error}


PAIRS = [
    ({"verifier": "math", "answer": "6"}, "<think>so 7</think>It is \\boxed{6}.", outcome(1.0, "6")),
    ({"verifier": "math", "answer": "6"}, "<think>..6..</think>I don't know", outcome(0.0, "")),
    ({"verifier": "math", "answer": "6"}, "<think>it is 6", outcome(0.0, "")),
    ({"verifier": "math", "answer": "6"}, "\\boxed{7 = 6}", outcome(0.0, "")),
    ({"verifier": "math", "answer": "0.5"}, "It is $\\frac{1}{2}$.", outcome(1.0, "\\frac{1}{2}")),
    ({"verifier": "numeric", "answer": "9999999"}, "9,999,990", outcome(0.0, "9999990")),
    ({"verifier": "numeric", "answer": "6"}, "<answer>6 km</answer>", outcome(1.0, "6")),
    ({"verifier": "choice", "answer": "B"}, "Option B is correct.", outcome(1.0, "B")),
    ({"verifier": "choice", "answer": "bank", "choices": ["mall", "bank"]}, "(b)", outcome(1.0, "B")),
    ({"verifier": "exact", "answer": "a b"}, "x</think> a b ", outcome(1.0, "a b")),
    ({"verifier": "text", "answer": "The Sky"}, "sky!", outcome(1.0, "sky")),
    ({"verifier": "reasoning_gym", **GENERATED}, "<think>a</think>\\boxed{16}", outcome(1.0, "16")),
    (
        CODE,
        "<think>```python\nx\n```</think>```python\ndef f(n): return 2 * n\n```",
        outcome(1.0, "def f(n): return 2 * n\n"),
    ),
    (CODE, "def f(n): return n", outcome(0.0, "def f(n): return n")),
    (
        {"verifier": "numeric", "answer": "10^5"},
        "5",
        outcome(
            None,
            None,
            "the item can't be scored by verifier 'numeric': the item's answer, '10^5', does not end in a number that "
            "stands for itself (10^5 does not)",
        ),
    ),
    (
        {"answer": "6"},
        "6",
        outcome(None, None, "the item names no verifier, and the domain has no [[domain.verifiers]]"),
    ),
    ({**CODE, "tests": []}, "6", outcome(None, None, "the item's tests must be a list that is not empty")),
    (
        {**CODE, "tests": [{}]},
        "6",
        outcome(
            None,
            None,
            "the item can't be used: tests[0] has neither input and output nor assert, as texts, nor arguments",
        ),
    ),
    (
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": "?"}],
            "reward_model": {"ground_truth": "6"},
        },
        "#### 6",
        outcome(1.0, "6"),
    ),
]


def test_pairs_of_a_file_are_judged_as_in_a_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert {row.get("verifier") for row, _, _ in PAIRS} >= set(ROW_VERIFIERS)
    lines = [json.dumps({**row, "response": response}) for row, response, _ in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("\n".join([*lines, '{"answer": "6"}', "{"]))
    code, printed = tried(capsys, "--pairs", str(tmp_path / "pairs.jsonl"))
    assert code == 1
    for (row, response, expected), found in zip(PAIRS, printed, strict=False):
        assert found == expected, (row, response)
    no_response, no_json = printed[len(PAIRS) :]
    assert no_response["error"] == "the item has no column `response` with a text"
    assert "is not JSON" in no_json["error"]


def test_one_response_needs_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--kind", "choice", "--answer", "B", "--response")
    assert tried(capsys, *given, "The correct option is (B).") == (0, [outcome(1.0, "B")])
    assert tried(capsys, *given, "C") == (0, [outcome(0.0, "C")])
    assert main(["reward", "try", *given, "<think>B</think>C"]) == 0
    assert capsys.readouterr() == ("score 0, incorrect, extracted 'C'\n", "")
    assert main(["reward", "try", "--kind", "math", "--answer", "6", "--response", "It is 6."]) == 0
    assert capsys.readouterr() == ("score 1, correct, extracted '6'\n", "")


def test_kind_and_answer_replace_those_of_a_row(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    row = tmp_path / "row.json"
    row.write_text(json.dumps({"question": "?", "verifier": "exact", "answer": "7"}))
    assert tried(capsys, "--row", str(row), "--response", "07")[1] == [outcome(0.0, "07")]
    assert tried(capsys, "--row", str(row), "--kind", "numeric", "--response", "07")[1] == [outcome(1.0, "7")]
    assert tried(capsys, "--row", str(row), "--answer", "07", "--response", "07")[1] == [outcome(1.0, "07")]


def test_a_verifier_that_fails_is_no_zero(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    row = tmp_path / "row.json"
    row.write_text(json.dumps({"answer": "x", "metadata": {"source_dataset": "sudoku"}}))
    code, [found] = tried(capsys, "--row", str(row), "--kind", "reasoning_gym", "--response", "1 2")
    assert code == 1 and found["score"] is None and found["correct"] is None and "KeyError" in found["error"]


@pytest.mark.parametrize(
    ("content", "says"),
    [("[1]", "must be a JSON object (it is a list)"), ("{", "one JSON object"), (None, "No such file")],
)
def test_a_row_that_can_not_be_read_is_refused_in_a_line(
    content: str | None, says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    row = tmp_path / "row.json"
    if content is not None:
        row.write_text(content)
    assert main(["reward", "try", "--row", str(row), "--response", "6"]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.parquet"])
def test_a_file_of_pairs_that_is_missing_is_named(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["reward", "try", "--pairs", str(tmp_path / name)]) == 2
    message = capsys.readouterr().err
    assert f"--pairs '{tmp_path / name}' can't be read" in message and "domain" not in message
