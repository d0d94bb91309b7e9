"""Divide an item's unit tests so that expected values never enter the process in which the model's code runs.

`assert f(2) == [4]` becomes the expression `f(2)`, which the program's process evaluates and hands out as data, and
the check `value_0 == [4]`, which another process makes. Pure syntax: nothing is executed here. assert_divider.py says
what the program's process evaluates.

Everything else is for the judge, who has plain data. An object of the program's is none: compared with what a test
has written down it is unequal. Tests that only objects could pass are refused, whatever the program: comparisons of
two values of the program's (`P(1) == P(1)`), and attributes that no plain data has. Tests that import what the sandbox
lacks are refused too: no program could pass them.
"""

import ast
import builtins
import contextlib
import keyword
import math
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_mcpo.rewards.assert_divider import Divider, evident_objects

_SETUP = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Expr)
_MAX_DIGITS = 100_000
"""Digits of a number in a test: reading one takes time that grows with their square."""

NUMBERS_AGREE = 1e-6
"""Relative error, below 1 absolute, of a number with a fraction in tokens and in results of calls."""

# Programs may answer a call of a function with a method of that name, as LeetCode's do. A global function comes first.
_METHOD = "def {name}(*arguments, **named):\n        return Solution().{name}(*arguments, **named)\n"
_OR_METHOD = "try:\n    {name}\nexcept NameError:\n    " + _METHOD
_METHOD_OR_BUILTIN = "try:\n    Solution.{name}\nexcept (NameError, AttributeError):\n    pass\nelse:\n    " + _METHOD


# What the judge compares a call's result by. JSON has neither tuples nor keys that are numbers; a result may be in a
# list of one; numbers with a fraction are near enough.
_SAME_DATA = f"""
def mcpo_same(found, expected):
    if isinstance(found, (list, tuple)) and isinstance(expected, list):
        return len(found) == len(expected) and all(mcpo_same(x, y) for x, y in zip(found, expected))
    if isinstance(found, dict) and isinstance(expected, dict):
        keys = {{str(key): value for key, value in found.items()}}
        return len(keys) == len(found) == len(expected) and all(
            key in keys and mcpo_same(keys[key], value) for key, value in expected.items()
        )
    if (isinstance(found, float) or isinstance(expected, float)) and isinstance(found, (int, float)):
        if not isinstance(expected, (int, float)) or isinstance(found, bool) or isinstance(expected, bool):
            return False
        return found == expected or abs(found - expected) <= {NUMBERS_AGREE} * max(1, abs(expected))
    return found == expected
def mcpo_same_or_in_list(found, expected):
    return mcpo_same(found, expected) or (
        isinstance(expected, list) and len(expected) == 1 and mcpo_same(found, expected[0])
    )
"""

# A function that returns nothing answers in its first argument, as LeetCode's do.
_CALL = (
    "(lambda given: (lambda result: given[0] if result is None and given else result)({function}(*given)))({arguments})"
)


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


def same_output(output: str, expected: str, compare: str) -> bool:
    """Tell whether two outputs are the same.

    compare: "lines": the same lines, apart from blanks around a line and around the whole; "tokens": the same words,
        however they are spaced, where a number with a fraction or an exponent agrees within NUMBERS_AGREE
    """
    if compare == "lines":
        return _lines(output) == _lines(expected)
    found, wanted = output.split(), expected.split()
    return len(found) == len(wanted) and all(map(_same_token, found, wanted))


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().split("\n")]


def _same_token(found: str, wanted: str) -> bool:
    if found == wanted or set(wanted.lower()).isdisjoint(".e"):
        return found == wanted
    try:
        number, expected = float(found), float(wanted)
    except ValueError:
        return False
    return math.isfinite(expected) and abs(number - expected) <= NUMBERS_AGREE * max(1.0, abs(expected))


@contextlib.contextmanager
def long_numbers() -> Iterator[None]:
    """Allow numbers of _MAX_DIGITS digits, where Python's own limit is 4,300, while tests are read and written."""
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(_MAX_DIGITS)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(before)


def parse_tests(entry: Mapping[str, Any]) -> tuple[list[InputTest], AssertTests]:
    """Return the tests of an item, `entry["tests"]`. Raises ValueError for a test that can't be used, with the reason.

    entry["function"], where there is one, names a function that they call; it may be a method of the program's class
    Solution. A test {"arguments": list, "result": value} of plain JSON data calls it.
    """
    with long_numbers():
        return _parsed(entry)


def _parsed(entry: Mapping[str, Any]) -> tuple[list[InputTest], AssertTests]:
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
        is_call = keys == {"arguments", "result"} and isinstance(test["arguments"], list) and bool(function)
        are_texts = keys in ({"input", "output"}, {"assert"}) and all(isinstance(text, str) for text in test.values())
        if not is_call and not are_texts:
            raise ValueError(
                f'tests[{index}]: must be {{"input": text, "output": text}}, {{"assert": statements}}, or, in an item '
                'with a function, {"arguments": list, "result": value}'
            )
        try:
            if is_call:
                _add_call(str(function), test["arguments"], test["result"], asserts)
            elif keys == {"assert"}:
                _divide(test["assert"], asserts)
            else:
                inputs.append(InputTest(test["input"], test["output"]))
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise ValueError(f"tests[{index}]: {error}") from error
    return inputs, asserts


def _add_call(function: str, arguments: list[Any], result: Any, into: AssertTests) -> None:
    """Add one call with plain data: the program's process makes it, the judge compares its result."""
    given = f"[{', '.join(_literal(_with_number_keys(argument)) for argument in arguments)}]"
    call = f"{function}(*{given})" if result is None else _CALL.format(function=function, arguments=given)
    if _SAME_DATA not in into.setup:
        into.setup += _SAME_DATA
    into.steps.append(["value", call])
    into.checks.append(f"mcpo_same_or_in_list(value_{into.num_values}, {_literal(result)})")
    into.num_values += 1


def _with_number_keys(argument: Any) -> Any:
    """Return an object whose keys are all texts of whole numbers with these as its keys: JSON has no other keys."""
    try:
        return {int(key): value for key, value in argument.items()} if isinstance(argument, dict) else argument
    except ValueError:
        return argument


def _literal(value: Any) -> str:
    """Return the source of plain JSON data. Raises ValueError for anything else."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    raise ValueError(f"arguments and results must be plain JSON data, not {type(value).__name__}")


def _check_import(statement: ast.Import | ast.ImportFrom) -> None:
    """Raise ValueError for an import of what the sandbox lacks, or of everything."""
    text = ast.unparse(statement)
    if any(alias.name == "*" for alias in statement.names):
        raise ValueError(f"{text!r} hides which names are the program's; import them by name")
    of_module = [statement.module or ""] if isinstance(statement, ast.ImportFrom) else []
    for name in of_module or [alias.name for alias in statement.names]:
        if name.partition(".")[0] not in sys.stdlib_module_names:
            raise ValueError(
                f"{text!r}: no program can pass it, as the sandbox has the standard library alone; test without it"
            )


def _divide(source: str, into: AssertTests) -> None:
    """Add the statements of one test: imports, setup that the program's process runs, and asserts."""
    imported: set[str] = set()
    assigned: set[str] = set()
    given: set[str] = set()
    checks = len(into.checks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of doubtful escapes in a data set's tests nobody needs a line each
        statements = ast.parse(source).body
    if ":=" in source and any(isinstance(node, ast.NamedExpr) for tree in statements for node in ast.walk(tree)):
        raise ValueError(f"must not have := in a test: {source[:60]!r}")
    for statement in statements:
        if isinstance(statement, ast.Assert):
            divider = Divider(imported, assigned, into.defined, evident_objects(statements), first=into.num_values)
            _divide_assert(statement, divider, into, given=given)
            continue
        text = ast.unparse(statement)
        if isinstance(statement, ast.Import | ast.ImportFrom):
            if isinstance(statement, ast.ImportFrom) and statement.module == "solution":  # the program itself
                renamed = [(alias.asname, alias.name) for alias in statement.names if alias.asname]
                into.steps += [["do", f"{new} = {old}"] for new, old in renamed]
                continue
            _check_import(statement)
            imported |= {alias.asname or alias.name.partition(".")[0] for alias in statement.names}
            into.setup += text + "\n"
            into.steps.append(["do", text])
        elif isinstance(statement, _SETUP):
            names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
            stored = {node.id for node in names if isinstance(node.ctx, ast.Store)}
            loaded = {node.id for node in names if isinstance(node.ctx, ast.Load)}
            # What a value of the program's is assigned to is not what is expected of it.
            given |= stored if loaded <= given | imported | set(dir(builtins)) - into.defined else set()
            assigned |= stored
            into.steps.append(["do", text])
        else:
            raise ValueError(f"only import, assignments, calls and assert at the top level, not {text[:60]!r}")
    if len(into.checks) == checks:
        raise ValueError(f"must have an assert: {source[:60]!r}")


def _divide_assert(statement: ast.Assert, divider: Divider, into: AssertTests, *, given: set[str]) -> None:
    """given: the names of data that the test has written down"""
    check = divider.visit(divider.as_truth(statement.test))
    if not divider.values:
        raise ValueError(f"must call what the program defines: {ast.unparse(check)[:100]!r}")
    if len(divider.atoms) > 1 and (names := given & divider.atoms):
        raise ValueError(
            f"{min(names)!r}, which the test sets, is compared with a value of the program, which could read it there: "
            "where it is what is expected, write it into the assert"
        )
    into.steps += [["value", value] for value in divider.values]
    into.num_values += len(divider.values)
    into.modules |= divider.modules
    into.checks.append(ast.unparse(check))
