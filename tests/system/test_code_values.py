"""What a code verifier makes of an answer: its program, the values that tests ask for, what the program gets to see.

Not covered: programs that print (test_sandbox.py has them).
"""

import pytest

from megatron_mcpo.rewards.code import extract_code, score
from megatron_mcpo.rewards.code_tests import parse_tests
from megatron_mcpo.rewards.sandbox.levels import Level
from tests.support.sandbox import STACK, allowed, asserts

# Values that are neither numbers, texts nor containers of them, and what the program's process makes of its own.
DATES = (
    "from collections import Counter, defaultdict, deque\nfrom decimal import Decimal\nimport datetime\n"
    "def price():\n    return Decimal('1.50')\n"
    "def day():\n    return datetime.date(2020, 1, 1), datetime.datetime(2020, 1, 1, 3), datetime.time(3)\n"
    "def span():\n    return [datetime.timedelta(days=2)]\n"
    "def plain():\n    return 1+2j, b'x', frozenset([1]), range(3), deque([1])\n"
    "def counts():\n    d = defaultdict(int)\n    d['b'] += 1\n    return Counter('aa'), d\n"
)
POINT = (
    "class P:\n    def __init__(self, x):\n        self.x = x\n    def __eq__(self, other):\n        return True\n"
    "    def __str__(self):\n        return f'P{self.x}'\n    def __add__(self, other):\n"
    "        return P(self.x + other.x)\ndef f():\n    return [P(1), P(2)]\n"
)
DAY = "assert day() == (date(2020, 1, 1), datetime.datetime(2020, 1, 1, 3), datetime.time(3))"
VALUES: dict[str, tuple[str, str, float]] = {
    "decimal": (DATES, "from decimal import Decimal\nassert price() == Decimal('1.5')", 1.0),
    "decimal, not imported": (DATES, "assert price() == Decimal('1.5') and price() == decimal.Decimal('1.5')", 1.0),
    "other decimal": (DATES, "assert price() == Decimal('1.51')", 0.0),
    "dates": (DATES, DAY, 1.0),
    "other dates": (DATES, DAY.replace("2020, 1, 1, 3", "2020, 1, 1, 4"), 0.0),
    "span": (DATES, "assert span() == [timedelta(hours=48)]", 1.0),
    "plain": (DATES, "assert plain() == (1 + 2j, b'x', frozenset([1]), range(3), deque([1]))", 1.0),
    "no list": (DATES, "assert plain()[4] == [1]", 0.0),
    "counts": (DATES, "assert counts() == (Counter(a=2), {'b': 1})", 1.0),
    "text of an object": (POINT, "assert str(P(1)) == 'P1' and str(P(1) + P(2)) == 'P3'", 1.0),
    "texts of objects": (POINT, "assert [str(p) for p in f()] == ['P1', 'P2']", 1.0),
    "attributes": (POINT, "assert [p.x for p in f()] == [1, 2] and sum(p.x for p in f()) == 3", 1.0),
    "an object's class": (POINT, "assert isinstance(P(1), P) and len(f()) == 2", 1.0),
    "an object is no number": (POINT, "assert P(1) == 1", 0.0),
    "an object is no text": (POINT, "assert P(1) == 'P1'", 0.0),
    "an object is something": (POINT, "assert P(1) and P(1) is not None", 1.0),
    "many": ("def f():\n    return [5] * 10**6", "assert len(f()) == 10**6 and f()", 1.0),
    "not as many": ("def f():\n    return [5] * 10**6", "assert len(f()) == 10**6 + 1", 0.0),
    "long list": ("def f():\n    return list(range(10**5))", "assert f() == list(range(10**5))", 1.0),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("level", ["bubblewrap", "interpreter"])
def test_values_of_all_kinds_are_judged(level: Level, name: str) -> None:
    program, test, expected = VALUES[name]
    assert score({"tests": asserts(test)}, program, level=allowed(level), seconds=30.0) == expected


FRACTION = "from fractions import Fraction\ndef f():\n    return Fraction(1, 2)"
STATEFUL = STACK + "    def __len__(self):\n        return len(self.items)\n"
CPYTHON_VALUES: list[tuple[str, str, float]] = [
    (FRACTION, "assert f() == Fraction(1, 2) and f() == 0.5 and f() == fractions.Fraction(2, 4)", 1.0),
    (FRACTION, "from fractions import Fraction as F\nassert f() == F(1, 3)", 0.0),
    (STATEFUL, "assert len(Stack()) == 0 and not Stack()", 1.0),
    (STATEFUL, "assert Stack()", 0.0),
    (STATEFUL, "s = Stack()\ns.push(1)\nassert s and len(s) == 1", 1.0),
    ("from collections import OrderedDict as O\nf = lambda: O(a=1, b=2)", "assert f() == OrderedDict(b=2, a=1)", 0.0),
    ("from collections import OrderedDict as O\nf = lambda: O(a=1, b=2)", "assert f() == {'b': 2, 'a': 1}", 1.0),
    ("from datetime import *\nf = lambda: datetime(2020, 1, 1, 3, tzinfo=UTC)",
     "from datetime import datetime, timedelta, timezone\n"
     "assert f() == datetime(2020, 1, 1, 4, tzinfo=timezone(timedelta(hours=1)))", 1.0),
]  # fmt: skip


@pytest.mark.parametrize(("program", "test", "expected"), CPYTHON_VALUES)
def test_values_that_only_cpython_has_are_judged(program: str, test: str, expected: float) -> None:
    assert score({"tests": asserts(test)}, program, level=allowed("bubblewrap"), seconds=30.0) == expected


@pytest.mark.parametrize("level", ["bubblewrap", "insecure"])
def test_a_program_has_no_descriptors_but_its_own(level: Level) -> None:
    """Standard ones alone; where values are asked for, the one that they leave by."""
    find = (
        "import os\ndef f():\n    found = []\n    for fd in range(3, 256):\n        try:\n            os.fstat(fd)\n"
        "        except OSError:\n            continue\n        found.append(fd)\n    return found\n"
    )
    assert score({"tests": asserts("assert len(f()) == 1")}, find, level=allowed(level)) == 1.0
    assert score({"tests": [{"input": "", "output": "[]"}]}, find + "print(f())", level=level) == 1.0


ADD = "def {name}(a, b):\n    return a + b\n"
METHOD = (
    "class Solution:\n    def {name}(self, a, b):\n        return self.same(a) + b\n"
    "    def same(self, x):\n        return x\n"
)
BEHIND = ADD + "class Solution:\n    def {name}(self, a, b):\n        return {name}(a, b)\n"


@pytest.mark.parametrize("name", ["add", "sum"])
@pytest.mark.parametrize("level", ["bubblewrap", "interpreter"])
def test_a_function_may_be_a_method_of_solution(level: Level, name: str) -> None:
    entry = {"tests": asserts(f"assert {name}(1, 2) == 3", f"assert {name}(2, 2) in ([4], 4)"), "function": name}
    allowed(level)
    for program in (ADD, METHOD):
        assert score(entry, program.format(name=name), level=level, seconds=30.0) == 1.0
        assert score(entry, program.format(name=name).replace("+", "-"), level=level, seconds=30.0) == 0.0
    assert score(entry, "class Solution:\n    pass", level=level, seconds=30.0) == 0.0
    if name == "add":  # a global function comes first
        assert score(entry, BEHIND.format(name=name), level=level, seconds=30.0) == 1.0


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```\nbare\n```", "bare\n"),
        ("```Python3\nlabelled\n```\nIt prints:\n```\n3\n```", "labelled\n"),
        ("``` py title=x\r\none\r\n```\r\n", "one\r\n"),
        ("```python3.12\none\n```\n```sh\nls\n```", "one\n"),
        ("```\none\n```\n```text\ntwo\n```", "one\n"),
        ("```cpp\none\n```", "one\n"),
        ("```\nnever ended\n```python\none\n```", "one\n"),
        ("```python\none\n```\n```python\nnever ended", "one\n"),
        ("x = '```'\ny = `` ` ``", "x = '```'\ny = `` ` ``"),
        ("````python\none\n````", "one\n"),
    ],
)
def test_the_program_is_in_a_fenced_block(text: str, code: str) -> None:
    assert extract_code(text) == code


@pytest.mark.parametrize(
    "test",
    [
        "assert len(f(2)) == 1717",
        "assert max(f(2), 1717) == 1717",
        "assert round(f(2) - 1717, 2) == 0",
        "assert str(f(2)).endswith('1717')",
        "assert sorted(f(2)).index(1717) == 3",
        "assert not f(2) - 1717",
        "assert f(2) and (1717 in f(2) or f(3) == 1717)",
        "assert [x + 1717 for x in f(2)] == [g(3)] or len(f(2)) == 1717".replace("[g(3)]", "[3]"),
        "assert [x for x in f(2) if x > 1717] == []",
        "assert (f(2), 1717) == (1717, 1717)",
        "assert set(f(2)).issuperset({1717})",
        "assert f(2) == Fraction(1717)",
        "assert sum(f(2), 1717) == 0",
        "assert sorted(f(2), key=lambda x: x % 1717) == []",
        "assert f(2).startswith('1717') and not f(2).lower().endswith('1717')",
        "assert f(2)[0].startswith('1717') == True",
        "assert f(2).split(sep='1717') == f(2).strip('1717').replace('1717', '')".replace("f(2).strip", "'x'.strip"),
        "assert f(2).count(1717) == 1 and f(2).index(1717) == 0 and f(2).get(1717) == 5",
        "assert f(2).issubset({1717}) or f(2).__eq__(1717)",
        "assert getattr(f(2), 'x', 1717) == 1717",
        "assert isinstance(f(2), int) and f'{f(2):>5}' == ' 1717'",
    ],
)
def test_nothing_that_is_expected_is_in_what_the_program_evaluates(test: str) -> None:
    _, tests = parse_tests({"tests": asserts(test)})
    assert tests.steps and "1717" in "".join(tests.checks) and "1717" not in str(tests.steps)
