"""Run one job inside the sandbox. Python gets this file as text; it imports the standard library only.

Argument: a file descriptor with the job (JSON). The process gives up its privileges, writes STARTED to standard output
and does what the job's "mode" says:

program  runs "code" as __main__: standard input is the test's, standard output goes to the parent.
values   runs "code" as a module, then each of "steps" in it: ["do", statements] or ["value", expression]. Standard
         output gets one JSON list with the encoded values in order. The program can forge any of it: nothing here
         knows which values are expected.
judge    reads such a list from standard input and prints PASS where all of "checks", expressions over value_0,
         value_1 ..., are true of it. No code of the model runs in this process.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import resource
import site
import sys
import types
from collections import deque

TYPE_CHECKING = False  # typing itself takes too long to import
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

STARTED = b"started\n"
PASS = b"pass"
MAX_ITEMS = 100_000  # of an iterator that are looked at
MAX_DESCRIPTORS = 2**20  # the kernel's own ceiling (fs.nr_open)

# Classes of the library whose values are rebuilt, and the arguments from which they are; of dates and times, for
# `fromisoformat`. None of them is imported before the program has imported it: that takes longer than a program.
REBUILT: dict[str, Callable[[Any], list]] = {
    "fractions.Fraction": lambda value: [value.numerator, value.denominator],
    "decimal.Decimal": lambda value: [str(value)],
    "datetime.datetime": lambda value: [value.isoformat()],
    "datetime.date": lambda value: [value.isoformat()],
    "datetime.time": lambda value: [value.isoformat()],
    "datetime.timedelta": lambda value: [value.days, value.seconds, value.microseconds],
    "collections.Counter": lambda value: [dict(value)],
    "collections.OrderedDict": lambda value: [dict(value)],
}


def main() -> None:
    with os.fdopen(int(sys.argv[1]), "rb") as file:
        job = json.load(file)
    drop_privileges(job)
    site.setquit()  # exit and quit, which -S leaves out
    sys.set_int_max_str_digits(0)  # time is limited anyway
    os.closerange(3, MAX_DESCRIPTORS)  # bubblewrap leaves some behind: root's user namespace
    silence = os.open(os.devnull, os.O_WRONLY)
    os.write(1, STARTED)
    os.dup2(silence, 2)
    report = os.dup(1) if job["mode"] == "values" else None
    if report is not None:
        os.dup2(silence, 1)
    os.close(silence)
    if job["mode"] == "program":
        run_program(job["code"])
    elif report is not None:
        text = json.dumps(values(job["code"], job["steps"])).encode()
        while text:
            text = text[os.write(report, text) :]
        os._exit(0)  # threads and exit handlers of the program have nothing left to say
    else:
        if judge(json.load(sys.stdin), job["setup"], job["modules"], job["checks"]):
            os.write(1, PASS)


def drop_privileges(job: dict) -> None:
    if job["user"] is not None:  # the parent is root, and so is this process until here
        os.setresgid(job["user"], job["user"], job["user"])
        os.setresuid(job["user"], job["user"], job["user"])
    if job["die_with_parent"]:
        import ctypes

        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
    for name, value in job["limits"].items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(kind, (value, value))


def run_program(code: str) -> None:
    namespace = vars(sys.modules["__main__"])
    for name in [name for name in namespace if not name.startswith("__")]:
        del namespace[name]
    program = compile(code, "main.py", "exec")
    exec(program, namespace)


def values(code: str, steps: list) -> list:
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    found = []
    try:
        exec(compile(code, "solution.py", "exec"), vars(module))
        for kind, source in steps:
            if kind == "do":
                exec(source, vars(module))
            else:
                found.append(value_of(source, vars(module)))
    except BaseException:  # SystemExit and KeyboardInterrupt too: the rest has no value
        pass
    return found


def value_of(source: str, namespace: dict) -> list:
    try:
        return encode(eval(source, namespace))  # noqa: S307 -- that is what the sandbox is for
    except BaseException as error:
        return ["error", type(error).__name__]


def encode(value: Any) -> list:
    """Return [kind, ...]: plain data and classes of the library by value, all else as something that equals nothing."""
    if value is None or isinstance(value, bool):
        return ["plain", value]
    if isinstance(value, int):
        return ["int", hex(int(value))]  # no limit on digits, no quadratic time
    if isinstance(value, float):
        return ["plain", float(value)]
    if isinstance(value, str):
        return ["plain", str.__str__(value)]
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, bytes | bytearray):
        return ["bytes", bytes(value).hex()]
    kind: Any
    for kind in (list, tuple, set, frozenset, deque):
        if isinstance(value, kind):
            return [kind.__name__, [encode(item) for item in kind.__iter__(value)]]
    if isinstance(value, range):
        return ["range", value.start, value.stop, value.step]
    for view, kind in (("keys", type({}.keys())), ("items", type({}.items()))):
        if isinstance(value, kind):
            return [view, [encode(item) for item in value]]
    for base in type(value).__mro__:
        name = f"{base.__module__}.{base.__qualname__}"
        if name in REBUILT:
            return ["rebuilt", name, [encode(part) for part in REBUILT[name](value)]]
    if isinstance(value, dict):
        return ["dict", [[encode(key), encode(item)] for key, item in dict.items(value)]]
    if hasattr(type(value), "__iter__"):
        return ["iterator", [encode(item) for item in itertools.islice(value, MAX_ITEMS)]]
    return ["opaque", type(value).__name__]


def decode(node: list) -> Any:
    """Return the value that `encode` described, of built-in types alone."""
    kind, *rest = node
    if kind == "plain":
        return rest[0]
    if kind == "int":
        return int(rest[0], 16)
    if kind == "complex":
        return complex(*rest)
    if kind == "bytes":
        return bytes.fromhex(rest[0])
    if kind == "dict":
        return {decode(key): decode(item) for key, item in rest[0]}
    if kind == "range":
        return range(*rest)
    if kind == "opaque":
        return object()
    if kind == "rebuilt":
        return rebuild(*rest)
    if kind == "keys":
        return dict.fromkeys(decode(item) for item in rest[0]).keys()
    if kind == "items":
        return dict(decode(item) for item in rest[0]).items()
    containers: dict[str, Any] = {
        "list": list,
        "tuple": tuple,
        "set": set,
        "frozenset": frozenset,
        "deque": deque,
        "iterator": iter,
    }
    return containers[kind]([decode(item) for item in rest[0]])


def rebuild(name: str, parts: list) -> Any:
    """Build a value of a class of REBUILT, whatever name the program sent, from data of built-in types."""
    if name not in REBUILT:
        raise ValueError(name)
    module, _, kind = name.partition(".")
    maker = getattr(importlib.import_module(module), kind)
    return getattr(maker, "fromisoformat", maker)(*[decode(part) for part in parts])


def judge(found: list, setup: str, modules: list, checks: list) -> bool:
    namespace: dict[str, Any] = {name: importlib.import_module(name) for name in modules}
    exec(setup, namespace)
    # A value whose expression raised has no name: a check that comes to it fails, `f(0) is None or f(0).x` may not.
    namespace |= {f"value_{number}": decode(node) for number, node in enumerate(found) if node[0] != "error"}
    for check in checks:
        exec(f"verdict = bool({check})", namespace)
        if namespace["verdict"] is not True:
            return False
    return True


if __name__ == "__main__":
    main()
