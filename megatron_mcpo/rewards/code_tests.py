"""Divide an item's unit tests so that expected values never enter the process in which the model's code runs.

`assert f(2) == [4]` becomes the expression `f(2)`, which the program's process evaluates and hands out as data, and
the check `value_0 == [4]`, which another process makes. Pure syntax: nothing is executed here.

The program's process evaluates the largest expressions that come from the program alone: its names, their calls,
attributes and items, and what builtins, operators and comprehensions make of these without any value of the test's.
So of `len(primes(10**6)) == 78498` a number comes out and no list, of `str(P(1)) == "P1"` a text and no object. A
program that lies about them must still know what is expected, as one must that returns it.

Everything else is for the judge, who has plain data. An object of the program's is none: compared with what a test
has written down it is unequal. Tests that only objects could pass are refused, whatever the program: comparisons of
two values of the program's (`P(1) == P(1)`), and attributes that no plain data has.
"""

import ast
import builtins
import collections
import datetime
import decimal
import fractions
import keyword
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

_SETUP = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Expr)
_COMPUTING = """
bisect cmath collections copy datetime decimal fractions functools heapq itertools json math operator random re
statistics string
"""
_MODULES = frozenset(_COMPUTING.split())
"""Names that are modules where an assert takes an attribute of them, imported or not."""

_CLASSES = {
    "Fraction": "fractions", "Decimal": "decimal", "Counter": "collections", "OrderedDict": "collections",
    "defaultdict": "collections", "deque": "collections", "date": "datetime", "timedelta": "datetime",
}  # fmt: skip
"""Names that are these modules' classes in what a program's value is compared with, imported or not."""

_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.GeneratorExp)
_BUILTINS = frozenset(dir(builtins))
_LEAVES = (ast.Constant, ast.expr_context, ast.operator, ast.unaryop, ast.boolop, ast.cmpop)
_SCOPES = (ast.Lambda, ast.DictComp, *_COMPREHENSIONS)

_PLAIN = frozenset(
    ["all", "any", "bool", "bytes", "callable", "complex", "float", "int", "isinstance", "issubclass", "len", "repr",
     "str"]
)  # fmt: skip
"""Builtins whose results are plain data."""

_PURE = _PLAIN | frozenset(
    ["abs", "dict", "enumerate", "frozenset", "list", "max", "min", "reversed", "round", "set", "sorted", "sum",
     "tuple", "zip"]
)  # fmt: skip
"""Builtins that the program's process may apply to the program's values."""

_PLAIN_TYPES = (
    bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, range, collections.deque,
    collections.Counter, collections.OrderedDict, fractions.Fraction, decimal.Decimal, datetime.datetime, datetime.time,
    datetime.timedelta, re.Match,
)  # fmt: skip
_PLAIN_ATTRIBUTES = frozenset(name for kind in _PLAIN_TYPES for name in dir(kind))
"""Attributes of what the judge may have: plain data (harness.py), and what `re` finds in it."""

# Programs may answer a call of a function with a method of that name, as LeetCode's do. A global function comes first.
_METHOD = "def {name}(*arguments, **named):\n        return Solution().{name}(*arguments, **named)\n"
_OR_METHOD = "try:\n    {name}\nexcept NameError:\n    " + _METHOD
_METHOD_OR_BUILTIN = "try:\n    Solution.{name}\nexcept (NameError, AttributeError):\n    pass\nelse:\n    " + _METHOD


@dataclass(frozen=True)
class InputTest:
    """Standard input, and the standard output that is expected for it."""

    stdin: str
    stdout: str


@dataclass
class AssertTests:
    """The asserts of an item.

    steps: ["do", statements] and ["value", expression] for the program's process, in order
    setup, modules, checks: import statements, modules and expressions over value_0, value_1 ... for the judge
    """

    steps: list[list[str]] = field(default_factory=list)
    setup: str = ""
    modules: set[str] = field(default_factory=set)
    checks: list[str] = field(default_factory=list)
    num_values: int = 0
    defined: set[str] = field(default_factory=set)
    """Names that are the program's even where a builtin has them."""


def same_lines(output: str, expected: str) -> bool:
    """Tell whether two outputs have the same lines, apart from blanks around a line and around the whole."""
    return _lines(output) == _lines(expected)


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().split("\n")]


def parse_tests(entry: Mapping[str, Any]) -> tuple[list[InputTest], AssertTests]:
    """Return the tests of an item, `entry["tests"]`. Raises ValueError for a test that can't be used, with the reason.

    entry["function"], where there is one, names a function that they call; it may be a method of the program's class
    Solution.
    """
    tests, function = entry.get("tests"), entry.get("function")
    if not isinstance(tests, list) or not tests:
        raise ValueError("tests: must be a list with at least one test")
    inputs, asserts = [], AssertTests()
    if function is not None:
        if not isinstance(function, str) or not function.isidentifier() or keyword.iskeyword(function):
            raise ValueError(f"function = {function!r}: must be the name of a function")
        method = _METHOD_OR_BUILTIN if hasattr(builtins, function) else _OR_METHOD
        asserts.steps.append(["do", method.format(name=function)])
        asserts.defined.add(function)
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of doubtful escapes in a data set's tests nobody needs a line each
        statements = ast.parse(source).body
    if ":=" in source and any(isinstance(node, ast.NamedExpr) for tree in statements for node in ast.walk(tree)):
        raise ValueError(f"must not have := in a test: {source[:60]!r}")
    for statement in statements:
        if isinstance(statement, ast.Assert):
            _divide_assert(statement, into, imported=imported, assigned=assigned)
            continue
        text = ast.unparse(statement)
        if isinstance(statement, ast.Import | ast.ImportFrom):
            if any(alias.name == "*" for alias in statement.names):
                raise ValueError(f"{text!r} hides which names are the program's; import them by name")
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
        raise ValueError(f"must have an assert: {source[:60]!r}")


def _divide_assert(statement: ast.Assert, into: AssertTests, *, imported: set[str], assigned: set[str]) -> None:
    divider = _Divider(imported, assigned, into.defined, first=into.num_values)
    check = divider.visit(divider.as_truth(statement.test))
    if not divider.values:
        raise ValueError(f"must call what the program defines: {ast.unparse(check)[:100]!r}")
    if len(divider.atoms) > 1 and (names := assigned & divider.atoms):
        raise ValueError(
            f"{min(names)!r}, which the test sets, is compared with a value of the program, which could read it there: "
            "where it is what is expected, write it into the assert"
        )
    into.steps += [["value", value] for value in divider.values]
    into.num_values += len(divider.values)
    into.modules |= divider.modules
    into.checks.append(ast.unparse(check))


class _Divider(ast.NodeTransformer):
    """The replacement of what the program alone makes, the largest such expressions, by value_0, value_1 ..."""

    def __init__(self, imported: set[str], assigned: set[str], defined: set[str], *, first: int):
        self.values: list[str] = []
        self.atoms: set[str] = set()
        """What the values are made of: names, calls, attributes and items of the program."""
        self.modules: set[str] = set()
        self._own = imported | _BUILTINS - assigned - defined
        self._pure = _PURE - imported - assigned - defined
        self._modules = _MODULES - assigned - imported
        self._classes = _CLASSES.keys() - assigned - imported - defined
        self._first = first
        self._bound: set[str] = set()

    def as_truth(self, node: ast.expr) -> ast.expr:
        """Return a condition that the program's process decides for its own values: the judge can't ask objects."""
        if isinstance(node, ast.BoolOp):
            return ast.BoolOp(node.op, [self.as_truth(value) for value in node.values])
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ast.UnaryOp(node.op, self.as_truth(node.operand))
        if self._is_of_program(node) and not self._is_plain(node):
            return ast.Call(ast.Name("bool", ast.Load()), [node], [])
        return node

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, _LEAVES) or self._is_of_module(node):
            return node
        if isinstance(node, ast.expr) and self._is_of_program(node):
            return self._take(node)
        if isinstance(node, _SCOPES):
            return self._visit_scope(node)
        return super().visit(node)

    def visit_Compare(self, node: ast.Compare) -> Any:
        sides = self._with_library(node.left, *node.comparators)
        if any(self._may_be_object(left) and self._may_be_object(right) for left, right in pairwise(sides)):
            raise ValueError(
                f"both sides of {ast.unparse(node)[:60]!r} come from the program, and its objects can't be compared "
                "here; what is expected must not come from it: write it into the assert, as plain data"
            )
        return self.generic_visit(ast.Compare(sides[0], node.ops, sides[1:]))

    def visit_Attribute(self, node: ast.Attribute) -> Any:
        if node.attr not in _PLAIN_ATTRIBUTES and _root(node) in self._bound:
            raise ValueError(
                f"no plain data has an attribute {node.attr!r}, as {ast.unparse(node)[:60]!r} asks for, and objects "
                "can't be taken out of the program"
            )
        return self.generic_visit(node)

    def _take(self, node: ast.expr) -> ast.Name:
        if self._bound & _names(node):
            raise ValueError(
                f"the program is called with a loop's variable in {ast.unparse(node)[:60]!r}: its value can't be "
                "taken out of there; write an assert for each value"
            )
        self.values.append(ast.unparse(node))
        self.atoms |= set(map(ast.unparse, self._atoms_of(node)))
        return ast.Name(f"value_{self._first + len(self.values) - 1}", ast.Load())

    def _visit_scope(self, node: ast.AST) -> Any:
        outer = self._bound
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        self._bound = outer | names | {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
        try:
            return self.generic_visit(node)
        finally:
            self._bound = outer

    def _is_of_module(self, node: ast.AST) -> bool:
        """Tell whether it is `math.pi`: an attribute of a module, which the judge then imports."""
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in self._modules:
            self.modules.add(node.value.id)
            return True
        return False

    def _is_of_program(self, node: ast.expr, loop: frozenset[str] = frozenset()) -> bool:
        """Tell whether the program alone makes it. loop: variables of a comprehension over a value of the program's."""
        if isinstance(node, ast.Name):
            return node.id in loop or node.id not in self._own | self._bound
        if isinstance(node, ast.Attribute | ast.Subscript):
            return not self._is_of_module(node) and self._is_of_program(node.value, loop)
        if isinstance(node, _COMPREHENSIONS):
            return self._is_loop_of_program(node, loop)
        parts = _operands(node)
        if isinstance(node, ast.Call) and not self._is_call_of(node, self._pure):
            # A method of what was made of values may have what is expected as its argument: str(f(1)).endswith("x").
            is_called_with_its_own = not node.keywords and all(self._is_of_program(part, loop) for part in parts)
            is_its_own = is_called_with_its_own or _root(node) not in {None, *loop, *self._pure}
            return is_its_own and self._is_of_program(node.func, loop)
        return bool(parts) and all(self._is_of_program(part, loop) for part in parts)

    def _is_loop_of_program(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp, loop: frozenset[str]) -> bool:
        for generator in node.generators:
            if generator.ifs or generator.is_async or not self._is_of_program(generator.iter, loop):
                return False
            loop |= _names(generator.target)
        return self._is_of_program(node.elt, loop)

    def _is_call_of(self, node: ast.AST, names: frozenset[str]) -> bool:
        return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names - self._bound

    def _is_plain(self, node: ast.AST) -> bool:
        return self._is_call_of(node, self._pure & _PLAIN)

    def _may_be_object(self, node: ast.AST) -> bool:
        """Tell whether an object of the program's may be in what the judge compares here."""
        if isinstance(node, _LEAVES) or self._is_plain(node) or self._is_of_module(node):
            return False
        if isinstance(node, ast.expr) and self._is_of_program(node):
            return True
        return any(map(self._may_be_object, ast.iter_child_nodes(node)))

    def _atoms_of(self, node: ast.expr) -> Iterator[ast.expr]:
        if isinstance(node, _COMPREHENSIONS):
            parts = [generator.iter for generator in node.generators]
        else:
            parts = _operands(node) if not isinstance(node, ast.Call) or self._is_call_of(node, self._pure) else []
        if not parts:
            yield node
        for part in parts:
            yield from self._atoms_of(part)

    def _with_library(self, *sides: ast.expr) -> list[ast.expr]:
        """`f() == Fraction(1, 2)` means the library's, imported or not, unless both sides have the name."""
        named = [_names(side) for side in sides]
        if not self._classes & set().union(*named):
            return list(sides)
        with_module = []
        for number, side in enumerate(sides):
            others = set().union(*named[:number], *named[number + 1 :])
            of_library = named[number] & self._classes - others if others - self._own - self._modules else set()
            with_module.append(_Qualified(of_library).visit(side))
        return with_module


class _Qualified(ast.NodeTransformer):
    """The insertion of the module in front of a library's classes."""

    def __init__(self, names: set[str]):
        self._names = names

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id not in self._names:
            return node
        return ast.Attribute(ast.Name(_CLASSES[node.id], ast.Load()), node.id, ast.Load())


def _operands(node: ast.expr) -> list[ast.expr]:
    """Return the operand nodes of operators, displays and positional calls; an empty list for other expressions."""
    if isinstance(node, ast.BinOp):
        return [node.left, node.right]
    if isinstance(node, ast.UnaryOp) and not isinstance(node.op, ast.Not):
        return [node.operand]
    if isinstance(node, ast.Tuple | ast.List):
        return node.elts
    return node.args if isinstance(node, ast.Call) and not node.keywords else []


def _root(node: ast.expr) -> str | None:
    """Return the name at the start of a chain of calls, attributes and items; None where it is not a name."""
    while isinstance(node, ast.Call | ast.Attribute | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def _names(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Name):
        return {node.id}
    inner = (child for child in ast.iter_child_nodes(node) if not isinstance(child, _LEAVES))
    return set().union(*map(_names, inner))
