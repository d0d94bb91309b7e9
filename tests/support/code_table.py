"""How many right programs are scored 1, by the style of their test and by their own: the table of docs/sandbox.md.

tests/data/code_styles.txt has 188 conditions that the functions and classes of PROGRAM meet, as data sets write them;
tests/data/code_programs.jsonl has 64 right and 40 wrong programs with their tests.
`python -m tests.support.code_table > benchmarks/results/code_styles.json` counts again.
"""

import ast
import json
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron_mcpo.rewards.code import score
from megatron_mcpo.rewards.code_tests import long_numbers, parse_tests
from megatron_mcpo.rewards.sandbox import harness, interpreter
from megatron_mcpo.rewards.sandbox.levels import Level
from tests.support.paths import ROOT

PROGRAM = """
from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum
import re
class Color(Enum):
    RED = 1
@dataclass
class Pt:
    x: int = 1
    y: int = 2
    def dist(self): return 5.0
class Stack:
    def __init__(self): self.items = []
    def push(self, x):
        self.items.append(x)
        return self
    def pop(self): return self.items.pop()
    def peek(self): return self.items[-1]
    def is_empty(self): return not self.items
    def __len__(self): return len(self.items)
    def __contains__(self, x): return x in self.items
    def __getitem__(self, i): return self.items[i]
    def __iter__(self): return iter(self.items)
    def __eq__(self, o): return self.items == getattr(o, "items", o)
    def __repr__(self): return f"Stack({self.items})"
class Node:
    def __init__(self, v, n=None): self.val, self.next = v, n
class LRU:
    def __init__(self, c): self.c, self.d = c, OrderedDict()
    def get(self, k): return self.d.get(k, -1)
    def put(self, k, v): self.d[k] = v
def add(a, b): return a + b
def words(s): return s.split()
def text(s): return s.upper()
def ident(x): return x
def d(): return {"a": [1, 2], "b": {"c": 3}}
def s(): return {1, 2, 3}
def gen(n): yield from range(n)
def fl(): return 0.1 + 0.2
def none(): return None
def big(): return 10**30
def pt(): return Pt()
def st(): return Stack().push(1).push(2)
def color(): return Color.RED
def mat(): return [[1, 2], [3, 4]]
def fn(): return lambda x: x + 1
def mt(): return re.match("a+", "aab")
def tup(): return (1, "a", None)
def b(): return b"ab"
def ll(): return Node(1, Node(2))
CONST = 7
"""

BY_RULE = {
    "st() == [1, 2]": "an object is unequal to plain data, whatever its own __eq__ says",
    "memoized deep recursion": "a RecursionError in CPython 3.12 too: lru_cache is written in C",
    "numpy program": "the sandbox has the standard library alone",
}
"""Right programs that are incorrect by a rule of the sandbox's page."""

STYLES = (ROOT / "tests/data/code_styles.txt").read_text().splitlines()
PROGRAMS: list[dict[str, Any]] = [
    json.loads(line) for line in (ROOT / "tests/data/code_programs.jsonl").read_text().splitlines()
]


def outcome(passes: Callable[[], bool | float], name: str) -> str:
    """Return right, refused, incorrect_by_rule or silently_incorrect for a right program."""
    try:
        passed = bool(passes())
    except (ValueError, interpreter.Unsupported):
        return "refused"
    if passed:
        return "right"
    return "incorrect_by_rule" if name in BY_RULE else "silently_incorrect"


def style_passes(style: str, level: Level) -> bool:
    """Tell whether PROGRAM passes a test of this style."""
    return passes_here(_used_by(style), {"tests": [{"assert": f"assert {style}"}]}, level)


def passes_here(program: str, entry: dict[str, Any], level: Level) -> bool:
    """Tell whether a program passes tests without standard input, divided and judged as at this level.

    CPython's harness runs in this process: what is tried is the division, not the containment.
    """
    inputs, tests = parse_tests(entry)
    if level == "interpreter":
        return interpreter.passes(program, inputs, tests, time.monotonic() + 20, "lines")
    found = json.loads(json.dumps(harness.values(program, tests.steps)))
    try:
        with long_numbers():
            return harness.judge(found, tests.setup, sorted(tests.modules), tests.checks)
    except Exception:  # the judge's process would end without a verdict: incorrect
        return False


def program_passes(row: dict[str, Any], level: Level, *, seconds: float = 30.0) -> bool:
    """Tell whether a program passes its tests in the sandbox."""
    return score(row, f"```python\n{row['program']}\n```", level=level, seconds=seconds) == 1.0


def _used_by(style: str) -> str:
    """Return the parts of PROGRAM that a test needs: an interpreter that lacks one thing need not refuse all."""
    parts = ast.parse(PROGRAM).body
    wanted = _names(ast.parse(style))
    while True:
        kept = [part for part in parts if _bound(part) & wanted]
        names = wanted.union(*map(_names, kept))
        if names == wanted:
            return "\n".join(map(ast.unparse, kept))
        wanted = names


def _names(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _bound(part: ast.stmt) -> set[str]:
    if isinstance(part, ast.FunctionDef | ast.ClassDef):
        return {part.name}
    if isinstance(part, ast.Import | ast.ImportFrom):
        return {alias.name for alias in part.names}
    return {node.id for node in ast.walk(part) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def table(level: Level) -> dict[str, dict[str, int]]:
    """Count the outcomes of the styles of tests, and of the right programs in the sandbox."""
    styles = Counter(outcome(partial(style_passes, style, level), style) for style in STYLES)
    right = [row for row in PROGRAMS if row["right"]]
    programs = Counter(outcome(partial(program_passes, row, level), row["name"]) for row in right)
    return {"styles": dict(styles), "programs": dict(programs)}


if __name__ == "__main__":
    print(json.dumps({"bubblewrap": table("bubblewrap"), "interpreter": table("interpreter")}, indent=1))
