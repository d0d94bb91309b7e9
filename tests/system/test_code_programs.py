"""Right and wrong programs of many kinds in the sandbox, level by level: none that is right is silently incorrect.

Not covered: styles of tests (tests/unit/test_code_tests.py).
"""

from collections import Counter
from functools import partial

import pytest

from megatron_mcpo.rewards.sandbox.levels import Level
from tests.support.code_table import BY_RULE, PROGRAMS, outcome, program_passes
from tests.support.sandbox import allowed
from tests.unit.test_code_tests import RECORDED

LEVELS: tuple[Level, ...] = ("bubblewrap", "interpreter")


@pytest.mark.parametrize("level", LEVELS)
def test_right_programs_are_right_or_refused(level: Level) -> None:
    allowed(level)
    right = [row for row in PROGRAMS if row["right"]]
    outcomes = {row["name"]: outcome(partial(program_passes, row, level), row["name"]) for row in right}
    silent = [name for name, found in outcomes.items() if found == "silently_incorrect"]
    assert len(right) == 64 and silent == [] and Counter(outcomes.values()) == RECORDED[level]["programs"]
    assert {name for name, found in outcomes.items() if found == "incorrect_by_rule"} <= BY_RULE.keys()


@pytest.mark.parametrize("level", LEVELS)
def test_wrong_programs_are_never_right(level: Level) -> None:
    allowed(level)
    wrong = [row for row in PROGRAMS if not row["right"]]
    passed = [row["name"] for row in wrong if outcome(partial(program_passes, row, level, seconds=8.0), "") == "right"]
    assert len(wrong) == 40 and passed == []
