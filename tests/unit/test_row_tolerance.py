"""What makes no row bad: repeated questions, metadata of any type, JSON text in columns; what a large file may cost.

What does make a row bad is in test_rows.py.
"""

import datetime
import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_mcpo.cli import data_check
from megatron_mcpo.cli.main import main
from megatron_mcpo.config.config import ConfigError, dump
from megatron_mcpo.config.domain_schema import SourceConfig
from megatron_mcpo.data.domains import inspect_domains
from megatron_mcpo.data.generators import ItemRequest, generate
from megatron_mcpo.data.rows import Item, RowError, parse_row
from megatron_mcpo.data.verl import from_verl, is_verl
from tests.support.data_configs import make_config
from tests.support.paths import EMBEDDED_MODEL, ROOT


def verl_row(i: int, **more: Any) -> dict[str, Any]:
    return {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": f"What is {i} + 1?"}],
        "reward_model": {"ground_truth": str(i + 1), "style": "rule"},
        "extra_info": {"index": f"uuid-{i}"},
        **more,
    }


def item_of(row: dict[str, Any]) -> Item:
    """As a row of Parquet comes to it."""
    [read] = pyarrow.Table.from_pylist([row]).to_pylist()
    return parse_row(from_verl(read, ()) if is_verl(read) else read, 0, ())


def config_of(file: Path, **data: Any) -> Any:
    config = make_config({"name": "sums", "shots": 0, "sources": [{"file": str(file)}]})
    return config.model_copy(update={"data": config.data.model_copy(update=data)})


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    if not EMBEDDED_MODEL.exists():
        pytest.skip(f"{EMBEDDED_MODEL} is missing: make model")
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    return loaded


def test_rows_that_repeat_a_question_are_left_out_and_counted(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One published set has every row a hundred times."""
    rows = [verl_row(i % 20) for i in range(2000)] + [verl_row(3, reward_model={"ground_truth": "5", "style": "rule"})]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "dup.parquet")
    inspection = inspect_domains(config_of(tmp_path / "dup.parquet", max_bad_rows=0.0), tokenizer, cache_dir=tmp_path)
    [statistics] = inspection.row_statistics
    assert inspection.problems == []
    assert (statistics.rows, statistics.repeated, statistics.contradicting, statistics.bad) == (2001, 1981, 1, 0)
    [domain] = inspection.domains
    assert len(domain.sources[0].train) + len(domain.held_out) == 20
    [three] = [p for p in [*domain.sources[0].train, *domain.held_out] if p.entry["question"] == "What is 3 + 1?"]
    assert three.entry["answer"] == "4"
    assert domain.notes[0] == (
        "domain 'sums', source 'dup.parquet': 1981 of 2001 rows repeat the question of an earlier row and are left "
        "out, 1 with another answer, of which the first counts"
    )
    config = config_of(tmp_path / "dup.parquet", max_bad_rows=0.0)
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(EMBEDDED_MODEL)})})
    (tmp_path / "config.toml").write_text(dump(config))
    assert data_check.main([str(tmp_path / "config.toml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["repeated"] == 1981


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (float("nan"), None),
        (float("-inf"), None),
        (datetime.datetime(2024, 1, 2, 3, 4), "2024-01-02T03:04:00"),
        (datetime.date(2024, 1, 2), "2024-01-02"),
        (datetime.timedelta(hours=1), "1:00:00"),
        (Decimal("1.50"), "1.50"),
        (b"\x00\x01", "AAE="),
        ([{"a": float("nan")}], [{"a": None}]),
        ("text", "text"),
        ('{"a": 1}', '{"a": 1}'),
        (True, True),
        (7, 7),
    ],
)
def test_no_value_in_metadata_refuses_a_row(value: Any, plain: Any) -> None:
    ours = {"question": "q", "answer": "2", "verifier": "math", "metadata": {"x": value}}
    assert item_of(ours).entry["metadata"] == {"x": plain}
    assert item_of(verl_row(1, extra_info={"x": value})).entry["metadata"] == {"x": plain, "data_source": "math_dapo"}
    json.dumps(item_of(ours).entry, allow_nan=False)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ('{"index": 3, "nan": NaN}', {"index": 3, "nan": None}),
        ("a note", {"extra_info": "a note"}),
        ("{broken", {"extra_info": "{broken"}),
        ([1, 2], {"extra_info": [1, 2]}),
        (None, {}),
        ("[" * 100_000, {"extra_info": "[" * 100_000}),
    ],
)
def test_metadata_need_not_be_an_object(value: Any, expected: dict[str, Any]) -> None:
    found = item_of(verl_row(1, extra_info=value)).entry["metadata"]
    assert found == {**expected, "data_source": "math_dapo"}


def test_metadata_may_be_deep_or_have_half_a_character() -> None:
    deep: Any = 1
    for _ in range(500):
        deep = [deep]
    row = {
        "question": "q",
        "answer": "2",
        "verifier": "math",
        "metadata": {"a\ud800": "b\udfff", "deep": deep, "n": 9**9999},
    }
    metadata = parse_row(row, 0, ()).entry["metadata"]
    assert metadata["a?"] == "b?" and metadata["n"] is None
    json.dumps(metadata, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    "more",
    [
        {"prompt": json.dumps(verl_row(1)["prompt"])},
        {"reward_model": json.dumps(verl_row(1)["reward_model"])},
        {"reward_model": {"ground_truth": ["2"]}},
        {"reward_model": {"ground_truth": 2}},
        {
            "prompt": [
                {"role": "user", "content": [{"type": "text", "text": "What is 1"}, {"type": "text", "text": " + 1?"}]}
            ]
        },
        {"prompt": "What is 1 + 1?"},
    ],
)
def test_columns_of_verl_come_in_several_forms(more: dict[str, Any]) -> None:
    found = item_of(verl_row(1, **more))
    assert found.messages == item_of(verl_row(1)).messages
    assert found.answer == "2"


def test_a_question_that_is_json_but_no_conversation_stays_text() -> None:
    for text in ("[1, 2]", "[]", '{"a": 1}', "[x"):
        row = {"prompt": text, "answer": "2", "verifier": "math"}
        assert parse_row(row, 0, ()).messages == ({"role": "user", "content": text},)


@pytest.mark.parametrize(
    "more",
    [
        {"choices": ["a", "\ud800"], "answer": "A", "verifier": "choice"},
        {"tests": [{"input": "\ud800", "output": ""}], "verifier": "code"},
        {"tests": [{"assert": "assert f('\ud800')"}], "verifier": "code", "function": "f"},
        {"answer": "\ud800"},
        {"prompt": [{"role": "system", "content": "\ud800"}, {"role": "user", "content": "q"}]},
    ],
)
def test_half_a_character_anywhere_else_makes_a_row_bad(more: dict[str, Any]) -> None:
    row = {"prompt": "q", "answer": "2", "verifier": "exact", **more}
    with pytest.raises(RowError):
        parse_row(row, 0, ())


def test_a_small_file_of_many_large_rows_takes_little_memory(tmp_path: Path) -> None:
    """The first has 4 GB of text in a kilobyte; of the second, no row may be held whole."""
    for name, characters, rows in (("many", 4_000_000, 1024), ("huge", 40_000_000, 8)):
        one = pyarrow.DictionaryArray.from_arrays(
            pyarrow.array([0] * rows, pyarrow.int32()), pyarrow.array(["x" * characters])
        )
        columns = {"question": one, "answer": ["1"] * rows, "verifier": ["math"] * rows}
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / f"{name}.parquet", compression="zstd")
    code = f"""
import resource, sys
from pathlib import Path
from megatron_mcpo.data.item_pools import read_pools
from tests.unit.test_row_tolerance import config_of
resource.setrlimit(resource.RLIMIT_DATA, (4 << 30,) * 2)
for name in ("many", "huge"):
    [[pools]] = read_pools(config_of(Path({str(tmp_path)!r}) / (name + ".parquet")), cache_dir=Path("/nonexistent"))
    print(dict(pools.train.row_statistics.reasons), len(pools.train.items))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    )
    many, huge, peak = done.stdout.splitlines()
    assert (many, huge) == ("{'too long': 1024} 0", "{'malformed': 8} 0")
    assert int(peak) < 2048, "MiB, with torch's own"


def test_a_cache_that_can_not_be_written_is_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    request = ItemRequest(domain="d", source=SourceConfig(generator="chain_sum"), size=1, seed=0)
    with pytest.raises(ConfigError) as refused:
        generate([request], cache_dir=tmp_path / "file" / "cache")
    [problem] = refused.value.problems
    assert problem == (
        f"domain.sources: generators need the folder {str(tmp_path / 'file' / 'cache')!r}, which can't be written "
        "(Not a directory). Start in a folder that you may write to"
    )


@pytest.mark.parametrize("command", ["train", "evaluate", "convert check"])
@pytest.mark.parametrize(
    ("left_over", "reason"),
    [
        ({"RANK": "1"}, "WORLD_SIZE, LOCAL_RANK not set"),
        ({"LOCAL_RANK": "1"}, "RANK, WORLD_SIZE not set"),
        ({"WORLD_SIZE": "abc"}, "RANK, LOCAL_RANK not set"),
        ({"RANK": "0", "WORLD_SIZE": "abc", "LOCAL_RANK": "0"}, "must be numbers from 0 to WORLD_SIZE - 1"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "must be numbers from 0 to WORLD_SIZE - 1"),
    ],
)
def test_a_rank_left_over_in_the_shell_is_a_line(
    command: str,
    left_over: dict[str, str],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)
    assert main([*command.split(), "config.toml", "--dry-run"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert reason in line and all(f"{name} = {value!r}" in line for name, value in left_over.items())
