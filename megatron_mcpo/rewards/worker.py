"""The process that runs one verifier, one task at a time, at the far end of a socket.

Run as `python -m megatron_mcpo.rewards.worker FD MODULE:FUNCTION`. A message is one line of JSON: never a pickle, so
that a verifier which was led astray cannot run code in the trainer. The first line out says {"ready": true} or
{"error": text}; afterwards each {"entry", "answer", "deadline"} is answered by {"score": number} or {"error": text}.
Imports neither torch nor types.py: a worker starts as fast as its verifier imports.
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

MEMORY_BYTES = 4 * 2**30
"""Address space of a worker; importing reasoning-gym takes less than half of it."""

DUST = 1e-6
"""Rounding error by which a score may leave [0, 1]."""


def load_verifier(name: str) -> Callable[[dict[str, Any], str], Any]:
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


def answer_task(verifier: Callable[[dict[str, Any], str], Any], task: dict[str, Any]) -> dict[str, Any]:
    """The reply to one task; whatever the verifier raises becomes an error reply."""
    try:
        return {"score": checked_score(verifier(task["entry"], task["answer"]))}
    except BaseException as error:  # SystemExit and MemoryError are the verifier's failures too
        return {"error": describe(error)}


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    inbox = connection.makefile("r", encoding="utf-8")

    def send(message: dict[str, Any]) -> None:
        connection.sendall(json.dumps(message).encode() + b"\n")

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        verifier = load_verifier(sys.argv[2])
    except BaseException as error:  # a module may raise anything while it is imported
        send({"error": describe(error)})
        return
    silence_output()
    send({"ready": True})
    for line in inbox:
        task = json.loads(line)
        # Its default action ends the process, even in a C loop: a worker doesn't outlive a killed trainer for long.
        signal.alarm(math.ceil(task["deadline"]) + 5)
        reply = answer_task(verifier, task)
        signal.alarm(0)
        send(reply)


def silence_output() -> None:
    """Verifiers may print: not into the trainer's log."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


if __name__ == "__main__":
    main()
