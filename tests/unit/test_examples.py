"""The example configurations load, and those of one folder differ only in what they are there to show."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_mcpo.config.config import load
from megatron_mcpo.data.rows import parse_row
from megatron_mcpo.rewards import code
from megatron_mcpo.rewards.sandbox.levels import Level, available_level
from tests.support.paths import ROOT

METHODS = sorted((ROOT / "examples" / "methods").glob("*.toml"))


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.toml")), ids=lambda path: path.stem)
def test_every_example_loads(path: Path) -> None:
    assert load(path).domain


def test_methods_differ_in_the_contrastive_terms_alone() -> None:
    assert [path.stem for path in METHODS] == ["clipo", "cross_only", "grpo", "in_only", "mcpo"]
    whole = {path.stem: load(path) for path in METHODS}
    rest = [config.model_dump(exclude={"run": {"name"}, "contrastive": True}) for config in whole.values()]
    assert all(values == rest[0] for values in rest)
    assert {name: config.run.name for name, config in whole.items()} == {name: name for name in whole}
    weights = {name: (c.contrastive.cross_domain_weight, c.contrastive.in_domain_weight) for name, c in whole.items()}
    expected = {"mcpo": (0.1, 0.1), "grpo": (0, 0), "clipo": (0, 0.2), "cross_only": (0.1, 0), "in_only": (0, 0.1)}
    assert weights == expected
    clipo = whole["clipo"].contrastive
    assert (clipo.mode, clipo.temperature, clipo.denominator) == ("reward", 0.05, "all")
    assert (clipo.consolidate, clipo.negatives) == ("prompt", "prompt")


def test_programs_of_the_code_example_pass_their_own_tests_alone() -> None:
    """At whatever level this machine allows: gold answers are right, each item's answer to the next one is wrong."""
    level = available_level("auto")
    lines = (ROOT / "examples" / "five_domains" / "code.jsonl").read_text(encoding="utf-8").splitlines()
    items = [parse_row(json.loads(line), number, []) for number, line in enumerate(lines)]
    answers = [item.answer or "" for item in items]
    assert len(items) > 60
    assert [item.entry["question"] for item in items if not _passes(item.entry, answers[item.position], level)] == []
    assert [item.entry["question"] for item in items if _passes(item.entry, answers[item.position - 1], level)] == []


def _passes(entry: dict[str, Any], answer: str, level: Level) -> bool:
    return code.score(entry, answer, level=level) == 1.0
