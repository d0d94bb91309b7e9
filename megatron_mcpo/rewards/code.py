"""Score programs by unit tests: 1 for a program that passes all tests of its item, else 0; no partial credit.

The verdict can't be forged from inside: what is expected never enters the process in which the model's code runs
(code_tests.py), which can only hand out text or values; they are compared in this process or in another sandboxed
one. Exit codes, patched builtins, exit handlers and objects that equal everything decide nothing.
"""

import re
import time
from collections.abc import Iterator
from typing import Any, Literal

from megatron_mcpo.rewards.code_prelude import with_prelude
from megatron_mcpo.rewards.code_tests import AssertTests, InputTest, parse_tests, same_output
from megatron_mcpo.rewards.sandbox import harness, process
from megatron_mcpo.rewards.sandbox.levels import Level

_FENCE = re.compile(r"(?P<indentation>[ \t]*)`{3,}[ \t]*(?P<label>[^\s`]*)[^`]*")
"""A line of Markdown that begins or ends a block of code."""

_PYTHON = re.compile(r"py(thon)?[0-9.]*", re.IGNORECASE)
"""What programs in Python are labelled with."""

MAX_CODE_BYTES = 2**18

type Comparison = Literal["lines", "tokens"]


def score(
    entry: dict[str, Any], response: str, *, level: Level, seconds: float = 8.0, compare: Comparison = "lines"
) -> float:
    """Return 1.0 if the program in `response` passes every test of `entry["tests"]`, else 0.0.

    `extract_code` says which part of the response is the program. A test is
    {"input": text, "output": text}, judged by standard output and an exit code of 0, {"assert": statements}
    (code_tests.py says what it may hold), or {"arguments": list, "result": value} for the function entry["function"].
    Args:
        entry: the item
        response: the model's text
        level: as available_level found it; the trainer's process asks, once, so that no probe takes a response's time
        compare: how outputs are compared, see code_tests.same_output
        seconds: for all the tests together; a program that takes longer is incorrect. They must be fewer than the
            deadline of the worker process that this runs in.

    Raises:
        ValueError: the item's tests can't be used
        SandboxError: the sandbox failed
        Unsupported: at the level interpreter, CPython might run the program
        None of these says that the response is incorrect.
    """
    inputs, asserts = parse_tests(entry)
    function = entry.get("function")
    code = with_prelude(extract_code(response, function), function)
    if len(code.encode(errors="replace")) > MAX_CODE_BYTES or "\0" in code:
        return 0.0
    code = code.encode(errors="replace").decode()
    deadline = time.monotonic() + seconds
    if level == "interpreter":
        from megatron_mcpo.rewards.sandbox import interpreter

        return float(interpreter.passes(code, inputs, asserts, deadline, compare))
    return float(
        all(_prints(code, test, level, deadline, compare) for test in inputs)
        and (not asserts.checks or _asserts_hold(code, asserts, level, deadline))
    )


def extract_code(response: str, function: str | None = None) -> str:
    """Return the last fenced block that is labelled as Python, else the last without a label, else the last.

    Where there is no complete block, return the whole text. function: where some blocks define it, these alone count:
    what follows may be an example of its use.
    """
    blocks = list(_blocks(response))
    if function is not None:
        defines = re.compile(
            rf"^[ \t]*(?:async[ \t]+)?def[ \t]+{re.escape(function)}\b|^{re.escape(function)}[ \t]*=", re.M
        )
        blocks = [block for block in blocks if defines.search(block[1])] or blocks
    python = [code for label, code in blocks if _PYTHON.fullmatch(label)]
    bare = [code for label, code in blocks if not label]
    return (python or bare or [code for _, code in blocks] or [response])[-1]


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """Yield label and content of every fenced block; a labelled fence begins one even in a block that never ended."""
    label: str | None = None
    indentation = 0
    lines: list[str] = []
    for line in re.findall(r"[^\n]*\n|[^\n]+", text):
        fence = _FENCE.fullmatch(line)
        if fence is None:
            lines.append(line)
            continue
        if label is not None:
            yield label, _without_indentation(lines, indentation)
        indentation = len(fence["indentation"])
        label = fence["label"] if label is None or fence["label"] else None
        lines = []


def _without_indentation(lines: list[str], fence: int) -> str:
    """Return lines without as much indentation as their fence has, as in CommonMark: it may be part of a list.

    Where the first line has less, they lose no more than that.
    """
    first = next((line for line in lines if line.strip()), "")
    width = min(fence, len(first) - len(first.lstrip(" \t")))
    return "".join(line[:width].lstrip(" \t") + line[width:] for line in lines)


def _left(deadline: float) -> float:
    return deadline - time.monotonic()


def _prints(code: str, test: InputTest, level: process.ProcessLevel, deadline: float, compare: Comparison) -> bool:
    """Tell whether the program turns the test's input into its output."""
    if _left(deadline) <= 0:
        return False
    outcome = process.run(
        {"mode": "program", "code": code},
        test.stdin.encode(),
        level=level,
        seconds=_left(deadline),
        output_bytes=process.OUTPUT_BYTES + len(test.stdout.encode()),
    )
    found = outcome.output.decode(errors="replace")
    return outcome.exit_code == 0 and same_output(found, test.stdout, compare)


def _asserts_hold(code: str, tests: AssertTests, level: process.ProcessLevel, deadline: float) -> bool:
    """Tell whether the values that one process hands out satisfy the checks that another makes."""
    if _left(deadline) <= 0:
        return False
    job: dict[str, Any] = {"mode": "values", "code": code, "steps": tests.steps}
    values = process.run(job, b"", level=level, seconds=_left(deadline), output_bytes=process.VALUES_BYTES)
    if values.stopped or _left(deadline) <= 0:
        return False
    job = {"mode": "judge", "setup": tests.setup, "modules": sorted(tests.modules), "checks": tests.checks}
    return process.run(job, values.output, level=level, seconds=_left(deadline)).output == harness.PASS
