"""Public data sets in the shape their hubs give them, made into rows that the trainer takes.

Not covered: the sets themselves, which no test can download; each has two rows here, written as theirs are.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron_mcpo.data.rows import parse_row
from tools import prepare_data

LABELS = {"label": ["A", "B", "C"], "text": ["a shelf", "the sea", "a book"]}
ROWS: dict[str, list[dict[str, Any]]] = {
    "gsm8k": [
        {"question": "Two and two?", "answer": "2 + 2 = <<2+2=4>>4\n#### 1,004"},
        {"question": "And?", "answer": "unknown"},
    ],
    "math": [
        {"problem": "Half?", "level": "1", "solution": r"So \boxed{2}, no: \boxed{\frac{1}{2}}."},
        {"problem": "Half?", "level": "1", "solution": r"\boxed{2"},
    ],
    "commonsense_qa": [
        {"question": "Fish live in", "choices": LABELS, "answerKey": "B"},
        {"question": "Fish live in", "choices": LABELS, "answerKey": ""},
    ],
    "ai2_arc": [
        {"question": "Fish live in", "choices": {**LABELS, "label": ["1", "2", "3"]}, "answerKey": "2"},
        {"question": "Fish live in", "choices": LABELS, "answerKey": "9"},
    ],
    "openbookqa": [
        {"question_stem": "Fish live in", "choices": LABELS, "answerKey": "B"},
        {"question_stem": "Fish live in", "choices": LABELS, "answerKey": "E"},
    ],
    "mmlu": [
        {"question": "Fish live in", "subject": "biology", "choices": LABELS["text"], "answer": 1},
        {"question": "Fish live in", "subject": "biology", "choices": LABELS["text"], "answer": 3},
    ],
    "mbpp": [
        {"text": "Add.", "code": "def add(a, b):\r\n  return a+b", "test_list": ["assert add(1, 2) == 3"],
         "test_setup_code": ""},
        {"text": "Root.", "code": "x", "test_list": ["assert root(4) == 2"], "test_setup_code": "import math"},
    ],
}  # fmt: skip
ANSWERS = {"gsm8k": "1004", "math": r"\frac{1}{2}", "mbpp": "```python\ndef add(a, b):\n  return a+b\n```"}


@pytest.mark.parametrize("name", prepare_data.SETS)
@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_a_set_becomes_rows_of_our_schema(
    name: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / f"source.{form}", tmp_path / "data" / "out.jsonl"
    if form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[name]), source)
    else:
        source.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
    assert prepare_data.main([name, str(source), "--out", str(out)]) == 0
    assert f"{name}: 1 rows, 1 left out" in capsys.readouterr().out
    (line,) = out.read_text().splitlines()
    item = parse_row(json.loads(line), 0, [])
    assert item.answer == ANSWERS.get(name, "B")
    first = str(next(iter(ROWS[name][0].values())))
    assert item.entry["question"].splitlines()[0] == {"mbpp": "Add."}.get(name, first)
    if item.entry["verifier"] == "choice":
        assert item.entry["question"].splitlines()[1:] == ["A. a shelf", "B. the sea", "C. a book"]


def test_another_set_s_file_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source.jsonl"
    source.write_text(json.dumps(ROWS["gsm8k"][0]) + "\n")
    assert prepare_data.main(["mbpp", str(source), "--out", str(tmp_path / "out.jsonl")]) == 1
    assert "other columns than this set has (KeyError('test_list'))" in capsys.readouterr().out
    assert not (tmp_path / "out.jsonl").exists()


def test_a_file_that_is_not_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "no.parquet"
    assert prepare_data.main(["mbpp", str(missing), "--out", str(tmp_path / "out.jsonl")]) == 1
    assert f"{missing}: can't be read" in capsys.readouterr().err
