"""Public data sets in the shape their hubs give them, made into rows that the trainer takes.

Not covered: the sets themselves, which no test can download; each has two rows here, written as theirs are.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron_mcpo.cli import data_prepare
from megatron_mcpo.data.rows import parse_row

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


@pytest.mark.parametrize("name", data_prepare.SETS)
@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_a_set_becomes_rows_of_our_schema(
    name: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / f"source.{form}", tmp_path / "data" / "out.jsonl"
    if form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[name]), source)
    else:
        source.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
    assert data_prepare.main([name, str(source), "--out", str(out)]) == 0
    assert f"{name}: 1 rows, 1 skipped" in capsys.readouterr().out
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
    assert data_prepare.main(["mbpp", str(source), "--out", str(tmp_path / "out.jsonl")]) == 2
    printed = capsys.readouterr()
    assert "1 skipped; 1: other columns than this set has (no column 'test_list')" in printed.out
    assert "not written, since no row can be used" in printed.err
    assert not (tmp_path / "out.jsonl").exists()


def test_a_file_that_is_not_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "no.parquet"
    assert data_prepare.main(["mbpp", str(missing), "--out", str(tmp_path / "out.jsonl")]) == 2
    assert f"{missing}: can't be read" in capsys.readouterr().err


def test_a_folder_that_can_not_be_written_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "so #### 2"}))
    out = tmp_path / "rows.jsonl" / "out.jsonl"
    assert data_prepare.main(["gsm8k", str(tmp_path / "rows.jsonl"), "--out", str(out)]) == 2
    assert f"--out {out}: can't be written (" in capsys.readouterr().err


def test_a_broken_line_is_told_by_its_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source.jsonl"
    source.write_text(json.dumps(ROWS["gsm8k"][0]) + "\n\n{\n")
    assert data_prepare.main(["gsm8k", str(source), "--out", str(tmp_path / "out.jsonl")]) == 2
    assert f"{source}: can't be read (line 3 is not JSON)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("source.jsonl", "must not be one of the files that are read"),
        ("out", "ends in .jsonl"),
        ("folder.jsonl", "ends in .jsonl"),
    ],
)
def test_no_source_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str, said: str) -> None:
    source = tmp_path / "source.jsonl"
    source.write_text(json.dumps(ROWS["gsm8k"][0]) + "\n")
    before = source.read_text()
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(SystemExit) as left:
        data_prepare.main(["gsm8k", str(source), "--out", str(tmp_path / out)])
    assert left.value.code == 2 and said in capsys.readouterr().err
    assert source.read_text() == before
