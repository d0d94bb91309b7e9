"""An item's unit tests, divided so that the expected values never enter the process in which the model's code runs.

`assert f(2) == [4]` becomes the expression `f(2)`, which the program's process evaluates and hands out as data, and
the check `value_0 == [4]`, which another process makes. Pure syntax: nothing is executed here.
"""

import ast
import builtins
from dataclasses import dataclass, field
from typing import Any

_SETUP = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Expr)
_COMPUTING = """
bisect cmath collections copy datetime decimal fractions functools heapq itertools json math operator random re
statistics string
"""
_MODULES = frozenset(_COMPUTING.split())
"""Names that are modules where an assert takes an attribute of them, imported or not."""

_SCOPES = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass(frozen=True)
class InputTest:
    """Standard input, and the standard output that is expected for it."""

    stdin: str
    stdout: str


@dataclass
class AssertTests:
    """All asserts of an item. steps: ["do", statements] and ["value", expression] for the program's process, in order;
    setup, modules, checks: import statements, modules and expressions over value_0, value_1 ... for the judge."""

    steps: list[list[str]] = field(default_factory=list)
    setup: str = ""
    modules: set[str] = field(default_factory=set)
    checks: list[str] = field(default_factory=list)
    num_values: int = 0


def same_lines(output: str, expected: str) -> bool:
    """Whether two outputs have the same lines, but for blanks around a line and around the whole."""
    return _lines(output) == _lines(expected)


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().split("\n")]


def parse_tests(entry: dict[str, Any]) -> tuple[list[InputTest], AssertTests]:
    """The tests of an item, `entry["tests"]`. Raises ValueError for a test that can't be used, with the reason."""
    tests = entry.get("tests")
    if not isinstance(tests, list) or not tests:
        raise ValueError("tests: must be a list with at least one test")
    inputs, asserts = [], AssertTests()
    for index, test in enumerate(tests):
        keys = set(test) if isinstance(test, dict) else set()
        if keys not in ({"input", "output"}, {"assert"}) or not all(isinstance(text, str) for text in test.values()):
            raise ValueError(f'tests[{index}]: must be {{"input": text, "output": text}} or {{"assert": statements}}')
        try:
            if keys == {"assert"}:
                _divide(test["assert"], asserts)
            else:
                inputs.append(InputTest(test["input"], test["output"]))
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise ValueError(f"tests[{index}]: {error}") from error
    return inputs, asserts


def _divide(source: str, into: AssertTests) -> None:
    """Add the statements of one test: imports, setup that the program's process runs, and asserts."""
    imported: set[str] = set()
    assigned: set[str] = set()
    checks = len(into.checks)
    for statement in ast.parse(source).body:
        text = ast.unparse(statement)
        if isinstance(statement, ast.Assert):
            _divide_assert(statement, into, imported=imported, assigned=assigned)
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            imported |= {alias.asname or alias.name.partition(".")[0] for alias in statement.names}
            into.setup += text + "\n"
            into.steps.append(["do", text])
        elif isinstance(statement, _SETUP):
            stored = (node for node in ast.walk(statement) if isinstance(node, ast.Name))
            assigned |= {node.id for node in stored if isinstance(node.ctx, ast.Store)}
            into.steps.append(["do", text])
        else:
            raise ValueError(f"only import, assignments, calls and assert at the top level, not {text[:60]!r}")
    if len(into.checks) == checks:
        raise ValueError(f"no assert in {source[:60]!r}")


def _divide_assert(statement: ast.Assert, into: AssertTests, *, imported: set[str], assigned: set[str]) -> None:
    text = ast.unparse(statement)[:100]
    divider = _Divider(imported, assigned, first=into.num_values)
    check = divider.visit(statement.test)
    if not divider.values:
        raise ValueError(f"nothing that the program defines is called in {text!r}")
    if len(divider.values) > 1 and any(value in assigned for value in divider.values):
        raise ValueError(
            f"a name that the test sets is compared with a value of the program in {text!r}: the program could read "
            "what is expected; write it into the assert"
        )
    into.steps += [["value", value] for value in divider.values]
    into.num_values += len(divider.values)
    into.modules |= divider.modules
    into.checks.append(ast.unparse(check))


class _Divider(ast.NodeTransformer):
    """Replaces what only the program can evaluate by value_0, value_1 ..., as little of an expression as possible."""

    def __init__(self, imported: set[str], assigned: set[str], *, first: int):
        self.values: list[str] = []
        self.modules: set[str] = set()
        self._own = imported | set(dir(builtins)) - assigned
        self._modules = _MODULES - assigned - imported
        self._first = first
        self._bound: set[str] = set()

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, _SCOPES):
            return self._visit_scope(node)
        if isinstance(node, ast.NamedExpr):
            raise ValueError(f"no := in an assert: {ast.unparse(node)[:60]!r}")
        if self._is_of_module(node):
            return node
        if isinstance(node, ast.expr) and self._is_of_program(node):
            if self._bound & {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}:
                raise ValueError(
                    f"the program is called with a loop's variable in {ast.unparse(node)[:60]!r}: its value can't be "
                    "taken out of there; write an assert for each value"
                )
            self.values.append(ast.unparse(node))
            return ast.Name(f"value_{self._first + len(self.values) - 1}", ast.Load())
        return super().visit(node)

    def _visit_scope(self, node: ast.AST) -> Any:
        outer = self._bound
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        self._bound = outer | names | {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
        try:
            return self.generic_visit(node)
        finally:
            self._bound = outer

    def _is_of_module(self, node: ast.AST) -> bool:
        """Whether it is `math.pi`: an attribute of a module, which the judge then imports."""
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in self._modules:
            self.modules.add(node.value.id)
            return True
        return False

    def _is_of_program(self, node: ast.expr) -> bool:
        """Whether it is a name of the program's, or a call, an attribute or an item of one."""
        while isinstance(node, ast.Call | ast.Attribute | ast.Subscript):
            if self._is_of_module(node):
                return False
            node = node.func if isinstance(node, ast.Call) else node.value
        return isinstance(node, ast.Name) and node.id not in self._own | self._bound
