"""Run verifiers in a process of their own, one task at a time, at the far end of a socket.

Run as `python -m megatron_mcpo.rewards.worker FD MEMORY_BYTES` (its address space). A message is one line of JSON:
never a pickle, so that a verifier which was led astray cannot run code in the trainer.
  {"import": "module:name"}  gets the reply {"ready": true} or {"error": text}
  {"function", "options", "entry", "response", "deadline"}  {"score": number} or {"error": text, "timed_out": bool}
Every message has a number, "task", which its reply repeats.
What a verifier of your own gets and returns: `score_response`.
Imports neither torch nor types.py: a worker starts as fast as its verifiers import.
"""

import contextlib
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
    """Return the function that "package.module:function" names.

    Raises ValueError where there is none, or where it can't be called with an item and a response.
    """
    module_name, colon, function_name = name.partition(":")
    if not colon:
        raise ValueError(f"verifier {name!r}: must look like package.module:function")
    try:
        verifier = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"verifier {name!r}: can't be imported: {error}") from error
    if not callable(verifier):
        raise ValueError(f"verifier {name!r}: is a {type(verifier).__name__}, not a function")
    if not module_name.startswith("megatron_mcpo."):
        _check_signature(name, verifier)
    return verifier


def _check_signature(name: str, verifier: Callable[..., Any]) -> None:
    """Raise ValueError where a function can't be called with two positional arguments.

    Functions of this package may need options too; some of C's have no signature.
    """
    import inspect  # a worker whose verifier is not a user's starts without it

    try:
        signature = inspect.signature(verifier)
    except (ValueError, TypeError):
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise ValueError(
            f"verifier {name!r}: its signature is {signature}; it must be callable with two positional arguments, as "
            f"function(entry, response): {error}"
        ) from None


def checked_score(value: Any) -> float:
    """Return `value` as a float from 0 to 1. Raises ValueError for anything else."""
    if not isinstance(value, numbers.Real):
        raise ValueError(f"verifier returned a {type(value).__name__}, not a number")
    score = float(value)
    if not math.isfinite(score) or not -DUST <= score <= 1 + DUST:
        raise ValueError(f"verifier returned {score}, not a number from 0 to 1")
    return min(max(score, 0.0), 1.0)


def describe(error: BaseException) -> str:
    """Return type and message, safe to print: the message may quote the model's text."""
    return f"{type(error).__name__}: {printable(str(error))}"


def printable(text: str) -> str:
    """Return the beginning of a text that somebody else wrote, without control characters."""
    return text.encode("unicode_escape", "backslashreplace").decode("ascii")[:500]


def score_response(verifier: Callable[..., Any], task: dict[str, Any]) -> dict[str, Any]:
    """Call a verifier and return the reply to its task. This is the contract of a reward function of your own.

    It is called as `function(entry, response)`, in this process, which has no torch and at most rewards.memory_gib of
    address space. What it prints is dropped. A call that takes longer than rewards.timeout ends with its process.

    Args:
        verifier: returns the score: a real number from 0 to 1 (int, float, numpy's; True and False are 1 and 0).
            Anything else, NaN and numbers outside of that range by more than DUST included, is an error.
        task: its `entry` and `response` are the two arguments.
            entry: the item, plain JSON data. Always `question` (text of the last message), `answer` (text, None where
            the row has none) and `metadata` (an object, perhaps empty); where the row has them `choices` (texts),
            `tests`, `function` and `verifier`. A change to it is lost after the call.
            response: the model's text without the blanks around it, never empty: responses that are blank or were
            cut at the limit get 0 without a call. Equal responses to one item are scored once.

    An exception, of any class, is an error of the verifier and never a score: the item's whole group is left out of
    the step, TimeoutError counts as timed out, and the run stops where more than rewards.max_error_rate of a step's
    groups fail.
    """
    try:
        return {"score": checked_score(verifier(task["entry"], task["response"], **task["options"]))}
    except BaseException as error:  # SystemExit and MemoryError are the verifier's failures too
        return {"error": describe(error), "timed_out": isinstance(error, TimeoutError)}


class _Replies:
    """Replies to messages, with the verifiers that were imported so far."""

    def __init__(self) -> None:
        self._verifiers: dict[str, Callable[..., Any]] = {}
        self._silent = False

    def to(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return the reply to one message."""
        if "import" in message:
            return self._import(message["import"])
        if not self._silent:
            silence_output()
            self._silent = True
        # Its default action ends the process, even in a C loop: a worker doesn't outlive a killed trainer for long.
        signal.alarm(math.ceil(message["deadline"]) + 5)
        reply = score_response(self._verifiers[message["function"]], message)
        signal.alarm(0)
        return reply

    def _import(self, name: str) -> dict[str, Any]:
        try:
            self._verifiers[name] = load_verifier(name)
        except BaseException as error:  # a module may raise anything while it is imported
            return {"error": describe(error)}
        return {"ready": True}


def main() -> None:
    """Reply to messages until the trainer closes the socket."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    memory_bytes = int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = _Replies()
    with contextlib.suppress(ConnectionError):  # the trainer was killed
        for line in connection.makefile("r", encoding="utf-8"):
            message = json.loads(line)
            connection.sendall(json.dumps({**replies.to(message), "task": message["task"]}).encode() + b"\n")


def silence_output() -> None:
    """Drop what verifiers print, which must not reach the trainer's log."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


if __name__ == "__main__":
    main()
