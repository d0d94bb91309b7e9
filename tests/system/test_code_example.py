"""The programs of the example with code run in the sandbox, at the level that this machine allows."""

import json
from typing import Any

from megatron_mcpo.data.rows import parse_row
from megatron_mcpo.rewards import code
from megatron_mcpo.rewards.sandbox.levels import Level, available_level
from tests.support.paths import ROOT


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
