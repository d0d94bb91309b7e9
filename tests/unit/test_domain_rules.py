"""Rules on [data], domains and sources: what is refused before anything is read, and with which words."""

from pathlib import Path
from typing import Any

import pytest

from megatron_mcpo.config.config import Config, ConfigError, dump, load
from megatron_mcpo.config.domain_rules import missing_files
from megatron_mcpo.rewards import allowlist

HEAD = """
[run]
steps = 1
[model]
path = "m"
[batch]
prompts = 4
samples = 2
[optimizer]
lr = 1e-5
[rollout]
max_response_tokens = 32
"""
GENERATED = 'name = "other"\n[[domain.sources]]\ngenerator = "chain_sum"\n'


def problems(tmp_path: Path, source: str, *, data: str = "", domain: str = "", second: str = GENERATED) -> list[str]:
    """Of a configuration with this source, in TOML."""
    path = tmp_path / "config.toml"
    other = f"[[domain]]\n{second}" if second else ""
    path.write_text(f'{HEAD}[data]\n{data}\n{other}\n[[domain]]\nname = "d"\n{domain}\n[[domain.sources]]\n{source}\n')
    try:
        config = load(path)
    except ConfigError as error:
        return error.problems
    path.write_text(dump(config))
    assert load(path) == config, "a resolved configuration is read back"
    return []


GOOD_SOURCES = [
    'generator = "chain_sum"\noptions = {min_terms = 2}',
    'file = "a.jsonl"',
    'file = "a.parquet"\nheld_out_file = "b.jsonl"',
    'dataset = "openai/gsm8k"\nsubset = "main"\nsplit = "train"\nheld_out_split = "test"',
    'dataset = "folder"\nheld_out_file = "b.parquet"',
]


@pytest.mark.parametrize("source", GOOD_SOURCES)
def test_sources_that_are_in_order(source: str, tmp_path: Path) -> None:
    assert problems(tmp_path, source) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("weight = 1.0", ": must have exactly one of generator, file and dataset (it has none of them). Keep one."),
        ('generator = "g"\nfile = "a.jsonl"', "dataset (it has generator and file). Keep one."),
        (
            'file = "a.jsonl"\noptions = {a = 1}',
            ".options = {'a': 1}: must be left out (only generators have options). Remove it.",
        ),
        ('file = "a.jsonl"\nsplit = "test"', ".split = 'test': must be left out (only datasets have splits)"),
        ('generator = "g"\nsubset = "main"', ".subset = 'main': must be left out (only datasets have subsets)"),
        (
            'file = "a.jsonl"\nheld_out_split = "test"',
            ".held_out_split = 'test': must be left out (only datasets have splits)",
        ),
        (
            'generator = "g"\nheld_out_file = "b.jsonl"',
            ".held_out_file = 'b.jsonl': must be left out (a generator makes its held-out items)",
        ),
        (
            'dataset = "a"\nheld_out_split = "t"\nheld_out_file = "b.jsonl"',
            ".held_out_file = 'b.jsonl': must be left out where held_out_split is given",
        ),
        (
            'dataset = "a"\nheld_out_split = "train"',
            ".held_out_split = 'train': must differ from split, which is trained on",
        ),
        (
            'file = "a.jsonl"\nheld_out_file = "a.jsonl"',
            ".held_out_file = 'a.jsonl': must differ from file, which is trained on",
        ),
        ('file = "a.csv"', ".file = 'a.csv': must end in .jsonl or .parquet"),
        ('file = "a.jsonl"\nheld_out_file = "b.json"', ".held_out_file = 'b.json': must end in"),
    ],
)
def test_sources_that_are_refused(source: str, expected: str, tmp_path: Path) -> None:
    [problem] = problems(tmp_path, source)
    assert problem.startswith("domain 'd': sources[0]") and expected in problem


def test_a_domains_response_limit_is_at_most_the_runs(tmp_path: Path) -> None:
    source = GOOD_SOURCES[0]
    assert problems(tmp_path, source, domain="max_response_tokens = 32\nsamples = 9") == []
    [problem] = problems(tmp_path, source, domain="max_response_tokens = 33")
    assert problem.startswith("domain 'd': max_response_tokens = 33: must be at most rollout.max_response_tokens = 32")
    [problem] = problems(tmp_path, source, domain="samples = 1")
    assert "samples" in problem and "greater than 1" in problem


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ('mixing = "temperature"\nmixing_temperature = 2.0', None),
        ('mixing = "worst"\nworst_temperature = 1.0\nwindow = 3', None),
        ('mixing = "curriculum"\nwindow = 3\nitem_curriculum = true\nresample = 2', None),
        (
            "mixing_temperature = 2.0",
            "data.mixing_temperature = 2.0: requires data.mixing = 'temperature' (it is 'weights'). Remove it.",
        ),
        (
            'mixing = "curriculum"\nworst_temperature = 1.0',
            "data.worst_temperature = 1.0: requires data.mixing = 'worst' (",
        ),
        ('mixing = "temperature"\nwindow = 3', "data.window = 3: requires data.mixing = 'curriculum' or 'worst' ("),
    ],
)
def test_keys_of_mixing_that_do_not_apply(data: str, expected: str | None, tmp_path: Path) -> None:
    found = problems(tmp_path, GOOD_SOURCES[0], data=data)
    assert len(found) == (expected is not None) and all(expected in problem for problem in found if expected)


def test_one_domain_is_not_mixed(tmp_path: Path) -> None:
    [problem] = problems(tmp_path, GOOD_SOURCES[0], data='mixing = "worst"', second="")
    assert problem == "data.mixing = 'worst': requires at least two domains. Set it to 'weights'."
    assert problems(tmp_path, GOOD_SOURCES[0], second="") == []


def test_files_that_are_not_there_are_found_before_the_run(tmp_path: Path) -> None:
    there = tmp_path / "there.jsonl"
    there.write_text("")
    sources: list[dict[str, Any]] = [
        {"file": str(there), "held_out_file": str(tmp_path / "gone.parquet")},
        {"file": str(tmp_path), "weight": 2.0},
        {"generator": "chain_sum"},
        {"dataset": "openai/gsm8k"},
    ]
    config = Config.model_validate(
        {
            "run": {"steps": 1},
            "model": {"path": "m"},
            "batch": {"prompts": 4, "samples": 2},
            "optimizer": {"lr": 1e-5},
            "domain": [{"name": "d", "sources": sources}],
        }
    )
    first, second = missing_files(config)
    assert first.startswith(
        f"domain 'd': sources[0].held_out_file = '{tmp_path / 'gone.parquet'}': must be a file (no such file)"
    )
    assert second.startswith("domain 'd': sources[1].file")
    assert allowlist.problems(config) == [], "files and datasets have no generator to judge"
