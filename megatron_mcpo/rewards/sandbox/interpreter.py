"""Run programs at level `interpreter`: in pydantic-monty, a part of Python without access to the host.

It has no files, processes, sockets or native code, and runs in a process of its own, so that one that crashes is
replaced. What it lacks (del, yield, with, files, most of the standard library, sys.stdin) is Unsupported: whether the
program is correct can't be told. Its map, zip, filter, reversed, enumerate and generator expressions are lists: a
program that uses one as anything but a sequence to go through once is Unsupported too.
"""

import ast
import builtins
import collections
import datetime
import re
import sys
import time
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import pydantic_monty

from megatron_mcpo.rewards.code_tests import AssertTests, InputTest, same_output
from megatron_mcpo.rewards.sandbox.process import OUTPUT_BYTES, VALUES_BYTES

MEMORY_BYTES = 2**28
"""Heap of a program."""

_ITERATORS = frozenset(["map", "zip", "filter", "reversed", "enumerate"])
_CONSUMERS = _ITERATORS | frozenset(
    ["list", "tuple", "set", "frozenset", "sorted", "sum", "max", "min", "any", "all", "dict", "Counter", "deque"]
)
_CONSUMING_METHODS = frozenset(
    ["join", "extend", "update", "union", "intersection", "difference", "issubset", "issuperset", "fromkeys"]
)
"""Functions and methods that go through an argument once, so that a list does as well as an iterator."""

_SPECIAL_METHODS = frozenset(
    f"__{name}__" for name in ("init", "repr", "str", "eq", "add", "call", "contains", "getitem", "iter", "next")
)
"""The special methods of a program's classes that the interpreter calls."""

# As in harness.py, in what the interpreter knows: values leave as text, so that nothing is hashed out here.
_ENCODE = """
import collections as _collections, datetime as _datetime, decimal as _decimal, json as _json
def _encode(value):
    kind = type(value)
    if value is None or kind is bool or kind is float or kind is str:
        return ["plain", value]
    if kind is int:
        return ["int", hex(value)]
    if kind is bytes:
        return ["bytes", value.hex()]
    if kind is complex:
        return ["complex", [value.real, value.imag]]
    if kind is range:
        return ["range", [int(number) for number in str(value)[6:-1].split(",")]]
    if kind is _decimal.Decimal:
        return ["Decimal", str(value)]
    if kind is _datetime.timedelta:
        return ["timedelta", [value.days, value.seconds, value.microseconds]]
    for name, moment in (("datetime", _datetime.datetime), ("date", _datetime.date), ("time", _datetime.time)):
        if kind is moment:
            return [name, value.isoformat()]
    if isinstance(value, dict):
        return ["dict", [[_encode(key), _encode(item)] for key, item in value.items()]]
    for name in ("keys", "items"):
        if str(kind) == "<class 'dict_" + name + "'>":
            return [name, [_encode(item) for item in value]]
    for name, container in (
        ("list", list), ("tuple", tuple), ("set", set), ("frozenset", frozenset), ("deque", _collections.deque)
    ):
        if isinstance(value, container):
            return [name, [_encode(item) for item in value]]
    try:
        return ["iterator", [_encode(item) for item in value]]
    except TypeError:
        return ["opaque", None]
"""
_DECODE = """
import collections as _collections, datetime as _datetime, decimal as _decimal, json as _json
class _Opaque:
    pass
def _decode(node):
    kind, data = node
    if kind == "plain":
        return data
    if kind == "opaque":
        return _Opaque()
    if kind == "int":
        return int(data, 16)
    if kind == "bytes":
        return bytes.fromhex(data)
    if kind == "complex":
        return complex(data[0], data[1])
    if kind == "range":
        return range(*data)
    if kind == "Decimal":
        return _decimal.Decimal(data)
    if kind == "timedelta":
        return _datetime.timedelta(data[0], data[1], data[2])
    if kind == "datetime":
        return _datetime.datetime.fromisoformat(data)
    if kind == "date":
        return _datetime.date.fromisoformat(data)
    if kind == "time":
        return _datetime.time.fromisoformat(data)
    if kind == "dict":
        return {_decode(key): _decode(item) for key, item in data}
    items = [_decode(item) for item in data]
    if kind == "keys":
        return {item: None for item in items}.keys()
    if kind == "items":
        return {key: item for key, item in items}.items()
    kinds = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "iterator": iter}
    return _collections.deque(items) if kind == "deque" else kinds[kind](items)
"""


_CANNOT = "the sandbox's interpreter can't run this program"
_DIGITS = "Exceeds the limit (4300 digits)"


class Unsupported(RuntimeError):
    """The program uses what this interpreter lacks and CPython has."""


class Failed(Exception):
    """The program's own failure: it raised, took too long or too much memory, or printed too much."""


class Session:
    """One fresh interpreter until `deadline` (time.monotonic). A context manager."""

    def __init__(self, deadline: float, *, output_bytes: int = OUTPUT_BYTES):
        self.output = ""
        seconds = max(deadline - time.monotonic(), 0.0)
        self._deadline = deadline
        self._output_bytes = output_bytes
        self._checkout = _pool().checkout(
            limits={
                "max_feed_duration_secs": seconds,
                "max_memory": MEMORY_BYTES,
                "max_total_sleep_secs": seconds,
                "max_suspensions": 10**9,  # calls of input: `run` ends them at the deadline
            },
            assert_message_annotations=False,
        )

    def __enter__(self) -> "Session":
        self._session = self._checkout.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._checkout.__exit__(*exception)

    def run(self, code: str, *, stdin: Iterable[str] = (), values: dict[str, Any] | None = None) -> Any:
        """Return the value of the last expression of `code`; add what it prints to `output`. stdin: lines for input().

        Raises Failed or Unsupported.
        """
        lines = iter(stdin)

        def read_line(prompt: str = "") -> str:
            self._print("stdout", str(prompt))
            line = next(lines, None)
            if line is None:
                raise EOFError("EOF when reading a line")
            return line

        def leave(code: object = None) -> None:
            raise SystemExit if code in (None, 0) else SystemExit(str(code))

        functions = {"input": read_line, "exit": leave, "quit": leave}
        try:
            state = self._session.feed_start(
                code, inputs=values or {}, external_lookup=functions, print_callback=self._print
            )
            while not isinstance(state, pydantic_monty.MontyComplete):
                if time.monotonic() > self._deadline:
                    raise Failed("too late")
                state = state.resume_auto()
            return state.output
        except pydantic_monty.MontyError as error:
            inner = error.exception()
            if isinstance(inner, SystemExit) and inner.code in (None, "", 0):
                return None
            reason = _lack(error, code)
            if reason is not None:
                raise Unsupported(f"{_CANNOT}: {reason}") from error
            raise Failed(str(error)[:200]) from error
        except ValueError as error:  # a value that the library can't hand over
            if _DIGITS in str(error):
                raise Unsupported(f"{_CANNOT}: {error}") from error
            raise Failed(str(error)[:200]) from error

    def _print(self, stream: str, text: str) -> None:
        if stream == "stdout":
            self.output += text
        if len(self.output) > self._output_bytes:
            raise ValueError("too much output")


def passes(code: str, inputs: list[InputTest], asserts: AssertTests, deadline: float, compare: str) -> bool:
    """Tell whether a program passes its tests before `deadline` (time.monotonic). Raises Unsupported."""
    program = _parsed(code)
    if program is not None:
        _check_methods(program)
        _check_iterators(program)
    try:
        return all(_prints(code, test, deadline, compare) for test in inputs) and (
            not asserts.checks or _judge(asserts, _values(code, asserts, deadline), deadline)
        )
    except Failed:
        return False


def _prints(code: str, test: InputTest, deadline: float, compare: str) -> bool:
    with Session(deadline, output_bytes=OUTPUT_BYTES + len(test.stdout)) as session:
        session.run(code, stdin=test.stdin.splitlines())
    return same_output(session.output, test.stdout, compare)


def _values(code: str, tests: AssertTests, deadline: float) -> list[str | None]:
    """Return the program's values, as JSON that it may have forged; None for an expression that raised."""
    with Session(deadline) as session:
        session.run(_without_main(code))
        session.run(_ENCODE)
        found: list[str | None] = []
        for kind, source in tests.steps:
            if kind == "do":
                session.run(source)
                continue
            try:  # whatever the program made of these names, what comes out is a str
                found.append(session.run('f"{_json.dumps(_encode((' + source + ')))}"'))
            except Failed:
                found.append(None)
    if sum(len(text) for text in found if text is not None) > VALUES_BYTES:
        raise Failed("too much output")
    return found


def _judge(tests: AssertTests, values: list[str | None], deadline: float) -> bool:
    """Tell whether all checks are true of the values, in an interpreter that has seen no code of the model."""
    with Session(deadline) as session:
        session.run(tests.setup + "".join(f"import {name}\n" for name in sorted(tests.modules)) + _DECODE)
        for number, text in enumerate(values):
            if text is not None:  # else it has no name: a check that comes to it fails
                session.run(f"value_{number} = _decode(_json.loads(text))", values={"text": text})
        return all(session.run(f"bool({check})") is True for check in tests.checks)


@cache
def _pool() -> pydantic_monty.Monty:
    """Start the interpreter's process, one per worker; it ends with its parent, when its input is closed."""
    return pydantic_monty.Monty(max_processes=1).__enter__()


def _lack(error: pydantic_monty.MontyError, code: str) -> str | None:
    """Return what CPython has and this interpreter lacks, where the error says that; else None."""
    text = str(error)
    inner = error.exception()
    if isinstance(error, pydantic_monty.MontySyntaxError):
        return f"syntax: {text}" if _parsed(code) is not None else None
    if isinstance(inner, TimeoutError):
        return None
    if isinstance(inner, OSError) or any(phrase in text for phrase in _LACKS):
        return text
    names = re.findall(r"'(\w+)'", text)
    if isinstance(inner, ImportError):
        return text if any(name in sys.stdlib_module_names for name in names) else None
    if isinstance(inner, NameError):
        return text if any(hasattr(builtins, name) for name in names) else None
    if isinstance(inner, AttributeError):
        return text if _has_attribute(text) else None
    return None


_LACKS = (
    "not yet support",
    "Internal error in monty",
    "'list' object is not an iterator",  # a generator expression is a list here
    "'typing._SpecialForm' object is not subscriptable",
    "os.PathLike object",  # open(0)
    "object to bytes",  # bytes([1])
    _DIGITS,
)
"""What errors say of things that CPython can do."""


def _has_attribute(error: str) -> bool:
    """Tell whether CPython would have found the attribute, or may have, where the owner is not known here."""
    found = re.search(r"'([\w.]+)'(?: object)? has no attribute '(\w+)'", error)
    if found is None:
        return False
    owner, attribute = found.groups()
    if "module" in error or "." in owner:
        return owner.partition(".")[0] in sys.stdlib_module_names
    known = [getattr(module, owner) for module in (builtins, collections, datetime) if hasattr(module, owner)]
    return any(hasattr(kind, attribute) for kind in known)


def _check_methods(program: ast.Module) -> None:
    """Raise Unsupported for a class with a special method that the interpreter ignores, some of them silently."""
    classes = (node for node in ast.walk(program) if isinstance(node, ast.ClassDef))
    for method in (statement for node in classes for statement in node.body):
        if not isinstance(method, ast.FunctionDef) or not re.fullmatch(r"__\w+__", method.name):
            continue
        if method.name not in _SPECIAL_METHODS:
            raise Unsupported(f"{_CANNOT}: it ignores {method.name}")


def _check_iterators(program: ast.Module) -> None:
    """Raise Unsupported where the program may notice that the interpreter has lists for iterators."""
    consumed = {id(node) for parent in ast.walk(program) for node in _gone_through(parent)}
    for node in ast.walk(program):
        if (isinstance(node, ast.GeneratorExp) or _called(node) in _ITERATORS) and id(node) not in consumed:
            raise Unsupported(f"{_CANNOT}: {ast.unparse(node)[:60]!r} is a list there")


def _gone_through(node: ast.AST) -> Iterator[ast.expr]:
    """Yield the operands of a node that it goes through once."""
    if isinstance(node, ast.For | ast.comprehension):
        yield node.iter
    elif isinstance(node, ast.Starred | ast.Assign):
        is_unpacked = isinstance(node, ast.Starred) or isinstance(node.targets[0], ast.Tuple | ast.List)
        yield from [node.value] if is_unpacked else []
    elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
        yield node.comparators[0]
    elif isinstance(node, ast.Call):
        is_method = isinstance(node.func, ast.Attribute) and node.func.attr in _CONSUMING_METHODS
        yield from node.args if is_method or _called(node) in _CONSUMERS else []


def _called(node: ast.AST) -> str | None:
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None


def _without_main(code: str) -> str:
    """Return the program as a module, without its main block: here `__name__` is always "__main__"."""
    program = _parsed(code)
    if program is None:
        return code
    program.body = [
        statement
        for statement in program.body
        if not (isinstance(statement, ast.If) and ast.unparse(statement.test) == "__name__ == '__main__'")
    ]
    return ast.unparse(program)


def _parsed(code: str) -> ast.Module | None:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
