"""What tests of code accept: styles of asserts, calls with plain data, output by words, what programs take for granted.

Not covered: containment and verdicts of whole programs in the sandbox (tests/system/test_sandbox.py and
test_code_programs.py).
"""

import json
import time
from collections import Counter
from functools import partial
from typing import Any

import pytest

from megatron_mcpo.rewards.code import extract_code, score
from megatron_mcpo.rewards.code_prelude import with_prelude
from megatron_mcpo.rewards.code_tests import parse_tests, same_output
from megatron_mcpo.rewards.sandbox.interpreter import Unsupported
from megatron_mcpo.rewards.sandbox.levels import Level
from tests.support.code_table import STYLES, outcome, passes_here, style_passes
from tests.support.paths import ROOT
from tests.support.sandbox import allowed, asserts

RECORDED = json.loads((ROOT / "benchmarks/results/code_styles.json").read_text())
LEVELS: tuple[Level, ...] = ("bubblewrap", "interpreter")


@pytest.mark.parametrize("level", LEVELS)
def test_no_style_of_a_test_is_silently_incorrect_for_a_right_program(level: Level) -> None:
    if level == "interpreter":
        allowed(level)
    counts = Counter(outcome(partial(style_passes, style, level), style) for style in STYLES)
    assert len(STYLES) == 188 and dict(counts) == RECORDED[level]["styles"] and not counts["silently_incorrect"]


CACHE = (
    "class Cache:\n    def __init__(self, n):\n        self.d = {}\n"
    "    def get(self, k):\n        return self.d.get(k, -1)\n"
    "    def put(self, k, v):\n        self.d[k] = v\n"
    "    def add(self, k):\n        self.d[k] = k\n        return self\n"
)
SAME = "def f(x):\n    return x\n"
ASSERTS: list[tuple[str, str, bool]] = [
    (CACHE, "c = Cache(2)\nc.put(1, 5)\nassert c.get(1) == 5", True),
    (CACHE, "c = Cache(2)\nc.put(1, 5)\nassert c.get(1) == 6", False),
    (CACHE + "def make(n):\n    return Cache(n)\n", "c = make(2)\nc.put(1, 5)\nassert c.get(1) == 5", True),
    (CACHE, "assert Cache(2).add(3).get(3) == 3", True),
    (CACHE, "assert type(Cache(2)).__name__ == 'Cache' and f'{Cache(2)!r:.5}' != ''", True),
    (SAME, "r = f('ab')\nassert r.count('a') == 1 and r[0] == 'a'", True),
    (SAME, "r = f('ab')\nassert r.startswith('b')", False),
    (SAME, "assert f(None) is None or f(None).x == 1", True),
    (SAME, "assert f(None) is not None and f(None).x == 1", False),
    (SAME, "assert f(None).x != 1", False),
    (SAME, "assert list(map(f, [1, 2])) == [1, 2]", True),
    (SAME, "assert list(map(f, [1, 2])) == [1, 3]", False),
    (SAME, "assert isinstance(f(ValueError('x')), Exception)", True),
    (SAME, "assert isinstance(f(True), int) and not isinstance(f('1'), int)", True),
    (SAME, "assert f({'a': 1}).items() == {('a', 1)} and f({'a': 1}).keys() == {'a'}", True),
    (SAME, "assert f({'a': 1}).keys() == {'b'}", False),
    (SAME, "from solution import f as g\nassert g(1) == 1", True),
    (SAME, "from solution import f\nassert f(1) == 2", False),
    (SAME, f"assert f(10**5000) == {'1' + '0' * 5000}", True),
    (SAME, f"assert f(10**5000) == {'2' + '0' * 5000}", False),
]


@pytest.mark.parametrize(("program", "test", "expected"), ASSERTS)
def test_asserts_are_judged_as_they_are_written(program: str, test: str, expected: bool) -> None:
    assert passes_here(program, {"tests": asserts(test)}, "bubblewrap") == expected


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ("import numpy as np\nassert np.allclose(f([1]), [2])", "no program can pass it"),
        ("from pandas.testing import assert_frame_equal\nassert f(1) == 1", "no program can pass it"),
        ("import solution\nassert solution.f(1) == 1", "no program can pass it"),
        ("assert sorted([2, 1], key=f) == [1, 2]", "a function of the program is handed"),
        ("assert functools.reduce(f, [1, 2]) == 3", "a function of the program is handed"),
    ],
)
def test_asserts_that_no_right_program_can_pass_are_refused(test: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_tests({"tests": asserts(test)})
    parse_tests({"tests": asserts("import os.path, json\nfrom solution import f\nassert f(1) == json.loads('1')")})


CALLS: list[tuple[str, list[Any], Any, bool]] = [
    ("def f(x):\n    return min(x), max(x)", [[3, 1]], [1, 3], True),
    ("def f(x):\n    return [(1, 2), (3, 4)]", [1], [[1, 2], [3, 4]], True),
    ("def f(x):\n    return (1, 2)", [1], [[1, 2]], True),
    ("def f(x):\n    return {1: 2}", [1], {"1": 2}, True),
    ("def f(x):\n    return {1: 2, '1': 2}", [1], {"1": 2}, False),
    ("def f(x):\n    return x[3]", [{"3": 4}], 4, True),
    ("def f(x):\n    return 0.1 * x", [3], 0.3, True),
    ("def f(x):\n    return 0.1 * x + 1e-5", [3], 0.3, False),
    ("def f(x):\n    return x + 1", [10**15], 10**15 + 2, False),
    ("def f(x):\n    return 1e9", [1], 10**9 + 1, True),
    ("def f(x):\n    return True", [1], 1.0, False),
    ("def f(x):\n    x.sort()", [[3, 1]], [1, 3], True),
    ("def f(x):\n    x.sort(reverse=True)", [[1, 3]], [1, 3], False),
    ("def f(x):\n    pass", [[1, 3]], None, True),
    ("def f(x):\n    return 7", [3], [7], True),
    ("def f(x):\n    return [7, 7]", [3], [7], False),
    ("def f(x):\n    return {1, 2}", [3], [1, 2], False),
    ("def f(x):\n    return 'abc'", [3], ["a", "b", "c"], False),
    ("def f(x):\n    return x", [float("inf")], float("inf"), True),
    ("def f(*x):\n    return len(x)", [], 0, True),
]


@pytest.mark.parametrize(("program", "arguments", "result", "expected"), CALLS)
@pytest.mark.parametrize("level", LEVELS)
def test_results_of_calls_are_compared_as_plain_data(
    level: Level, program: str, arguments: list[Any], result: Any, expected: bool
) -> None:
    entry = {"tests": [{"arguments": arguments, "result": result}], "function": "f"}
    if level == "interpreter":
        allowed(level)
    assert passes_here(program, entry, level) == expected


def test_a_result_is_not_in_what_the_program_evaluates() -> None:
    _, tests = parse_tests({"tests": [{"arguments": [5], "result": [1717]}], "function": "f"})
    assert "1717" in str(tests.checks) and "1717" not in str(tests.steps) and "5" in str(tests.steps)
    for test in ({"arguments": [5]}, {"arguments": 5, "result": 1}, {"arguments": [{1, 2}], "result": 1}):
        with pytest.raises(ValueError, match=r"tests\[0\]"):
            parse_tests({"tests": [test], "function": "f"})
    with pytest.raises(ValueError, match="with a function"):
        parse_tests({"tests": [{"arguments": [5], "result": 1}]})


@pytest.mark.parametrize(
    ("output", "expected", "by_lines", "by_words"),
    [
        ("1 2\n3\n", "1 2 \n3", True, True),
        ("1\n2", "1  2", False, True),
        ("0.5", "0.5000000000", False, True),
        ("0.3333333333333333", "0.333333333333", False, True),
        ("3", "3.0", False, True),
        ("3.0", "3", False, False),
        ("1000001", "1000000", False, False),
        ("1.00001", "1.0", False, False),
        ("1e-9", "0.0", False, True),
        ("yes", "YES", False, False),
        ("nan", "nan", True, True),
        ("inf", "1e400", False, False),
        ("1 2 3", "1 2", False, False),
        ("", "", True, True),
    ],
)
def test_outputs_are_compared_by_lines_or_by_words(output: str, expected: str, by_lines: bool, by_words: bool) -> None:
    assert same_output(output, expected, "lines") == by_lines
    assert same_output(output, expected, "tokens") == by_words


SOLUTION = "class Solution:\n    def f(self, xs{annotation}):\n        {body}\n"


@pytest.mark.parametrize(
    ("annotation", "body", "expected"),
    [
        (": List[int]", "return sum(xs)", 4),
        (": Optional[ListNode]", "return max(Counter(xs).values())", 1),
        ("", "d = collections.defaultdict(int)\n        for x in xs: d[x] += 1\n        return len(d)", 2),
        ("", "best = inf\n        for x in xs: best = min(best, x)\n        return best", 1),
        ("", "heapq.heapify(xs)\n        return heappop(xs)", 1),
        ("", "return undefined_name", None),
    ],
)
def test_imports_that_leetcode_makes_are_made(annotation: str, body: str, expected: int | None) -> None:
    program = SOLUTION.format(annotation=annotation, body=body)
    for code in (program, "from __future__ import annotations\n" + program):
        entry = {"tests": asserts(f"assert Solution().f([3, 1]) == {expected}")}
        assert passes_here(with_prelude(code, None), entry, "bubblewrap") == (expected is not None)


def test_what_a_program_binds_or_does_not_use_is_left_alone() -> None:
    for code in (
        "class Solution:\n    count = 1\n    def f(self, inf):\n        return inf, self.count\n",
        "class Solution(:",
    ):
        assert with_prelude(code, "f") == code
    assert with_prelude("print(inf)", None) == "print(inf)"
    assert with_prelude("print(inf)", "f") == "from math import inf\nprint(inf)"


def test_an_example_of_the_function_s_use_is_not_the_program() -> None:
    text = "```python\ndef f(x):\n    return x\n```\nExample:\n```python\nprint(f(3))\n```"
    assert extract_code(text, "f") == "def f(x):\n    return x\n"
    assert extract_code(text, "g") == extract_code(text) == "print(f(3))\n"


@pytest.mark.parametrize(
    "text",
    [
        "1. Do:\n   ```python\n   def f(x):\n       return x\n   ```\n2. Done.",
        "- Do:\n\n\t```python\n\tdef f(x):\n\t    return x\n\t```",
        "   ```\ndef f(x):\n    return x\n   ```",
        "  ```py\n\n def f(x):\n     return x\n```\n",
        "    ```sh\n    ls\n    ```\n```python\ndef f(x):\n    return x\n```",
    ],
)
def test_a_block_loses_the_indentation_of_its_fence(text: str) -> None:
    assert extract_code(text).lstrip("\n") == "def f(x):\n    return x\n"


ONE = [{"input": "3\n", "output": "3"}]


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("print(input())\nexit()", 1.0),
        ("print(input())\nquit(0)", 1.0),
        ("print(input())\nexit(1)", 0.0),
        ("print(input())\nraise SystemExit('no')", 0.0),
        ("print(input('n: '))", 0.0),
        ("input('3')", 1.0),
        ("a, b = map(int, ['1', '2'])\nprint(sum(x for x in [a, b]))", 1.0),
        ("print(*map(str, [3]), sep='')", 1.0),
    ],
)
def test_the_interpreter_ends_and_prints_as_cpython_does(program: str, expected: float) -> None:
    assert score({"tests": ONE}, program, level=allowed("interpreter")) == expected


@pytest.mark.parametrize(
    "program",
    [
        "print(map(int, [1]) == [1])",
        "def f(x):\n    return zip(x, x)",
        "g = (x for x in [1])",
        "r = reversed([1])\nprint(list(r), list(r))",
        "print(open(0).read())",
        "print(open('/dev/stdin').read())",
        "print(10**5000)",
        "print(int('1' * 5000) % 7)",
        "import sys\nsys.stdout.write('3')",
        "from typing import List\nprint(List[int])",
    ],
)
def test_what_the_interpreter_would_get_wrong_is_unsupported(program: str) -> None:
    with pytest.raises(Unsupported, match="can't run this program"):
        score({"tests": ONE}, program, level=allowed("interpreter"))


@pytest.mark.parametrize(
    "program", ["while True:\n    try:\n        input()\n    except:\n        pass", "while True: pass"]
)
def test_the_interpreter_ends_at_its_deadline(program: str) -> None:
    level, started = allowed("interpreter"), time.monotonic()
    assert score({"tests": ONE}, program, level=level, seconds=1.0) == 0.0
    assert time.monotonic() - started < 10.0
