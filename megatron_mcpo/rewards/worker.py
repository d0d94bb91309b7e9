"""The process that runs verifiers, one task at a time, at the far end of a socket.

Run as `python -m megatron_mcpo.rewards.worker FD MEMORY_BYTES` (its address space). A message is one line of JSON:
never a pickle, so that a verifier which was led astray cannot run code in the trainer.
  {"import": "module:name"}  is answered by {"ready": true} or {"error": text}
  {"function", "options", "entry", "answer", "deadline"}  by {"score": number} or {"error": text, "timed_out": bool}
Imports neither torch nor types.py: a worker starts as fast as its verifiers import.
"""

import importlib
import json
import math
import numbers
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

DUST = 1e-6
"""Rounding error by which a score may leave [0, 1]."""


def load_verifier(name: str) -> Callable[..., Any]:
    """The function that "package.module:function" names. Raises ValueError when there is none."""
    module_name, colon, function_name = name.partition(":")
    if not colon:
        raise ValueError(f"verifier {name!r}: must look like package.module:function")
    try:
        verifier = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"verifier {name!r}: can't be imported: {error}") from error
    if not callable(verifier):
        raise ValueError(f"verifier {name!r}: is a {type(verifier).__name__}, not a function")
    return verifier


def checked_score(value: Any) -> float:
    """`value` as a float in [0, 1]. Raises ValueError for anything that is not such a number."""
    if not isinstance(value, numbers.Real):
        raise ValueError(f"verifier returned a {type(value).__name__}, not a number")
    score = float(value)
    if not math.isfinite(score) or not -DUST <= score <= 1 + DUST:
        raise ValueError(f"verifier returned {score}, not a number from 0 to 1")
    return min(max(score, 0.0), 1.0)


def describe(error: BaseException) -> str:
    """Type and message, safe to print: the message may quote the model's text."""
    text = str(error).encode("unicode_escape", "backslashreplace").decode("ascii")
    return f"{type(error).__name__}: {text[:500]}"


def answer_task(verifier: Callable[..., Any], task: dict[str, Any]) -> dict[str, Any]:
    """The reply to one task; whatever the verifier raises becomes an error reply, TimeoutError one that timed out."""
    try:
        return {"score": checked_score(verifier(task["entry"], task["answer"], **task["options"]))}
    except BaseException as error:  # SystemExit and MemoryError are the verifier's failures too
        return {"error": describe(error), "timed_out": isinstance(error, TimeoutError)}


class _Desk:
    """Replies to messages; keeps the verifiers that were imported."""

    def __init__(self) -> None:
        self._verifiers: dict[str, Callable[..., Any]] = {}
        self._silent = False

    def reply(self, message: dict[str, Any]) -> dict[str, Any]:
        if "import" in message:
            return self._import(message["import"])
        if not self._silent:
            silence_output()
            self._silent = True
        # Its default action ends the process, even in a C loop: a worker doesn't outlive a killed trainer for long.
        signal.alarm(math.ceil(message["deadline"]) + 5)
        reply = answer_task(self._verifiers[message["function"]], message)
        signal.alarm(0)
        return reply

    def _import(self, name: str) -> dict[str, Any]:
        try:
            self._verifiers[name] = load_verifier(name)
        except BaseException as error:  # a module may raise anything while it is imported
            return {"error": describe(error)}
        return {"ready": True}


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    memory_bytes = int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    desk = _Desk()
    for line in connection.makefile("r", encoding="utf-8"):
        connection.sendall(json.dumps(desk.reply(json.loads(line))).encode() + b"\n")


def silence_output() -> None:
    """Verifiers may print: not into the trainer's log."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


if __name__ == "__main__":
    main()
