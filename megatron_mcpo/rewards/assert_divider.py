"""Replace what the program alone makes in a check by value_0, value_1 ...: pure syntax, nothing is executed here.

The program's process evaluates the largest expressions that come from the program alone: its names, their calls,
attributes and items, and what builtins, operators and comprehensions make of these without any value of the test's.
So of `len(primes(10**6)) == 78498` a number comes out and no list, of `str(P(1)) == "P1"` a text and no object. A
program that lies about them must still know what is expected, as one must that returns it.

A method that plain data has, called with arguments of the test's, is the judge's: of `f(7).startswith("ab")` the
program evaluates `f(7)`. What the test itself shows to be an object (`Cache(2).get(1)`) keeps its own methods.
"""

import ast
import builtins
import collections
import datetime
import decimal
import fractions
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

_COMPUTING = """
bisect cmath collections copy datetime decimal fractions functools heapq itertools json math numbers operator random re
statistics string types
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
    ["all", "any", "bool", "bytes", "callable", "complex", "dir", "float", "format", "hasattr", "int", "isinstance",
     "issubclass", "len", "repr", "str"]
)  # fmt: skip
"""Builtins whose results are plain data."""

_PURE = _PLAIN | frozenset(
    ["abs", "dict", "enumerate", "frozenset", "getattr", "list", "max", "min", "reversed", "round", "set", "sorted",
     "sum", "tuple", "vars", "zip"]
)  # fmt: skip
"""Builtins that the program's process may apply to the program's values."""

_OF_OBJECTS = frozenset(["hasattr", "getattr", "isinstance", "issubclass"])
"""Builtins whose first argument alone is asked, with a name or a class in the second."""

_JUDGED_TYPES = frozenset(
    ["bool", "int", "float", "complex", "str", "bytes", "list", "tuple", "dict", "set", "frozenset"]
)
"""Types that a value still has when it reaches the judge."""

_PLAIN_TYPES = (
    bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, range, collections.deque,
    collections.Counter, collections.OrderedDict, fractions.Fraction, decimal.Decimal, datetime.datetime, datetime.time,
    datetime.timedelta, re.Match,
)  # fmt: skip
_PLAIN_ATTRIBUTES = frozenset(name for kind in _PLAIN_TYPES for name in dir(kind))
"""Attributes of what the judge may have: plain data (harness.py), and what `re` finds in it."""

_CHANGES = frozenset(
    ["add", "append", "appendleft", "clear", "discard", "extend", "extendleft", "insert", "remove", "reverse", "sort",
     "update"]
)  # fmt: skip
"""Methods that return nothing where plain data has them: what an assert calls them for is an object's."""


def evident_objects(statements: list[ast.stmt]) -> frozenset[str]:
    """Return the names that a test makes objects of the program's, as far as the test shows it.

    They get an instance of a class (a call of a name that begins with a capital), or the test uses an attribute of
    theirs that plain data has not.
    """
    found = set()
    for node in (node for statement in statements for node in ast.walk(statement)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found |= {node.value.id} if node.attr not in _PLAIN_ATTRIBUTES else set()
        if isinstance(node, ast.Assign) and _is_instance(node.value):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return frozenset(found)


def _is_instance(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    if isinstance(node.func, ast.Attribute):
        return node.func.attr in _CHANGES and _is_instance(node.func.value)
    return isinstance(node.func, ast.Name) and node.func.id[:1].isupper() and node.func.id not in _CLASSES


class Divider(ast.NodeTransformer):
    """The replacement of what the program alone makes, the largest such expressions, by value_0, value_1 ..."""

    def __init__(
        self, imported: set[str], assigned: set[str], defined: set[str], objects: frozenset[str], *, first: int
    ):
        """Begin with the names of a test.

        imported, assigned: those that the test has bound; defined: those that are the program's in any case
        objects: see evident_objects; first: the number of the next value
        """
        self.values: list[str] = []
        self.atoms: set[str] = set()
        """What the values are made of: names, calls, attributes and items of the program."""
        self.modules: set[str] = set()
        self._own = imported | _BUILTINS - assigned - defined
        self._pure = _PURE - imported - assigned - defined
        self._modules = _MODULES - assigned - imported
        self._classes = _CLASSES.keys() - assigned - imported - defined
        self._assigned = assigned
        self._objects = objects
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
        self._check_attribute(node)
        return self.generic_visit(node)

    def _check_attribute(self, node: ast.Attribute) -> None:
        if node.attr not in _PLAIN_ATTRIBUTES and _root(node) in self._bound:
            raise ValueError(
                f"no plain data has an attribute {node.attr!r}, as {ast.unparse(node)[:60]!r} asks for, and objects "
                "can't be taken out of the program"
            )

    def visit_Call(self, node: ast.Call) -> Any:
        """Leave a method to the judge with the value that it belongs to: a bound method is no plain data."""
        functions = [keyword.value for keyword in node.keywords if keyword.arg == "key"]
        functions += node.args[:1] if ast.unparse(node.func) in ("reduce", "functools.reduce") else []
        if any(map(self._is_function_of_program, functions)):
            raise ValueError(
                f"a function of the program is handed to the test's own data in {ast.unparse(node)[:60]!r}; write an "
                "assert for each value"
            )
        if not isinstance(node.func, ast.Attribute) or self._is_of_module(node.func):
            return self.generic_visit(node)
        self._check_attribute(node.func)
        method = ast.Attribute(self.visit(node.func.value), node.func.attr, ast.Load())
        keywords = [ast.keyword(keyword.arg, self.visit(keyword.value)) for keyword in node.keywords]
        return ast.Call(method, [self.visit(argument) for argument in node.args], keywords)

    def visit_FormattedValue(self, node: ast.FormattedValue) -> Any:
        """Have the program's process turn its own values into text: the judge can't format objects."""
        parts = node.format_spec.values if isinstance(node.format_spec, ast.JoinedStr) else []
        literals = [str(part.value) for part in parts if isinstance(part, ast.Constant)]
        if not self._is_of_program(node.value) or len(literals) < len(parts):
            return self.generic_visit(node)
        conversion = {115: "str", 114: "repr", 97: "ascii"}.get(node.conversion)
        text = node.value if conversion is None else _call(conversion, node.value)
        return ast.FormattedValue(self._take(_call("format", text, ast.Constant("".join(literals)))), -1, None)

    def _take(self, node: ast.expr) -> ast.Name:
        if self._bound & _names(node):
            raise ValueError(
                f"the program is called with a loop's variable in {ast.unparse(node)[:60]!r}: its value can't be "
                "taken out of there; write an assert for each value"
            )
        self.values.append(ast.unparse(_ModulesByName(self._modules).visit(_copy(node))))
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
            if isinstance(node, ast.Attribute) and self._is_call_of(node.value, frozenset({"type"}) - self._assigned):
                return self._all_of_program(_operands(node.value), loop)  # type(P(1)).__name__
            return not self._is_of_module(node) and self._is_of_program(node.value, loop)
        if isinstance(node, _COMPREHENSIONS):
            return self._is_loop_of_program(node, loop)
        if isinstance(node, ast.Call) and not self._is_call_of(node, self._pure):
            return self._is_call_of_program(node, loop)
        return self._all_of_program(_operands(node), loop)

    def _all_of_program(self, nodes: list[ast.expr], loop: frozenset[str]) -> bool:
        return bool(nodes) and all(self._is_of_program(node, loop) for node in nodes)

    def _is_call_of_program(self, node: ast.Call, loop: frozenset[str]) -> bool:
        """Tell whether the program makes a call of anything but a pure builtin.

        Not of a method of plain data: its argument may be what is expected, f(1).endswith("x").
        """
        if self._is_call_of(node, frozenset({"map", "filter"}) - self._assigned) and node.args:
            return self._is_function_of_program(node.args[0])
        if not self._is_of_program(node.func, loop):
            return False
        if not node.keywords and all(self._is_of_program(part, loop) for part in node.args):
            return True
        if _root(node) in {None, *loop, *self._pure}:
            return False
        if isinstance(node.func, ast.Attribute) and node.func.attr in _PLAIN_ATTRIBUTES - _CHANGES:
            return self._is_object(node.func.value)
        return True

    def _is_object(self, node: ast.expr) -> bool:
        return _is_instance(node) or (isinstance(node, ast.Name) and node.id in self._objects)

    def _is_function_of_program(self, node: ast.expr) -> bool:
        """Tell whether it is a name of the program's that is not called; a name that the test has set is its data."""
        if isinstance(node, ast.Attribute):
            return self._is_of_program(node) and _root(node) not in self._assigned
        return isinstance(node, ast.Name) and self._is_of_program(node) and node.id not in self._assigned

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


class _ModulesByName(ast.NodeTransformer):
    """The import of modules where the program's process needs their attributes: types.GeneratorType."""

    def __init__(self, modules: frozenset[str]):
        self._modules = modules

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        if isinstance(node.value, ast.Name) and node.value.id in self._modules:
            imported = _call("__import__", ast.Constant(node.value.id))
            return ast.Attribute(imported, node.attr, ast.Load())
        self.generic_visit(node)
        return node


def _call(function: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(function, ast.Load()), list(arguments), [])


def _copy(node: ast.expr) -> ast.expr:
    return ast.parse(ast.unparse(node), mode="eval").body


def _operands(node: ast.expr) -> list[ast.expr]:
    """Return the operand nodes of operators, displays and positional calls; an empty list for other expressions."""
    if isinstance(node, ast.BinOp):
        return [node.left, node.right]
    if isinstance(node, ast.UnaryOp) and not isinstance(node.op, ast.Not):
        return [node.operand]
    if isinstance(node, ast.Tuple | ast.List):
        return node.elts
    if not isinstance(node, ast.Call) or node.keywords:
        return []
    is_question = isinstance(node.func, ast.Name) and node.func.id in _OF_OBJECTS and _asks_the_object(node)
    return node.args[:1] if is_question else node.args


def _asks_the_object(node: ast.Call) -> bool:
    """Tell whether only the program's process can answer: hasattr(P(), "x"), isinstance(f(), ValueError)."""
    asked = node.args[1:]
    if ast.unparse(node.func) in ("hasattr", "getattr"):
        is_named = bool(asked) and isinstance(asked[0], ast.Constant) and isinstance(asked[0].value, str)
        return is_named and all(isinstance(rest, ast.Constant) and rest.value is None for rest in asked[1:])
    names = {name.id for part in asked for name in ast.walk(part) if isinstance(name, ast.Name)}
    return len(asked) == 1 and not names <= _JUDGED_TYPES


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
