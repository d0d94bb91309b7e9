"""Verifiers for test_rewards.py, most of which misbehave, and what else it runs in other processes."""

import inspect
import math
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any


def misbehave(entry: dict[str, Any], response: str) -> Any:
    """Do what the response says; one that names no action is correct when it is the item's answer."""
    if response in _RETURNS:
        return _RETURNS[response]
    if response in _ACTIONS:
        return _ACTIONS[response]()
    return float(response == entry["answer"])


def record(entry: dict[str, Any], response: str) -> float:
    """Leave a line for every call."""
    with Path(entry["log"]).open("a") as file:
        file.write(f"{entry['question']} {response}\n")
    return 1.0


def record_and_misbehave(entry: dict[str, Any], response: str) -> Any:
    """Leave a line for every call, also for one that never ends."""
    record(entry, response)
    return misbehave(entry, response)


def slow(entry: dict[str, Any], response: str) -> float:
    time.sleep(entry["seconds"])
    return 1.0


def graded(entry: dict[str, Any], response: str) -> float:
    """Return the number that the response is."""
    return float(response)


def give_up(entry: dict[str, Any], response: str) -> float:
    """End in time, without a score."""
    raise TimeoutError("somebody else is slow")


def fork(entry: dict[str, Any], response: str) -> float:
    """Leave a child behind and write down its id."""
    child = os.fork()
    if child == 0:
        time.sleep(600)
        os._exit(0)
    Path(entry["pid_file"]).write_text(str(child))
    return 1.0


def leave_the_session(entry: dict[str, Any], response: str) -> float:
    """Leave a grandchild behind, in a session and a process group of its own, and write down its id."""
    child = os.fork()
    if child == 0:
        os.setsid()
        grandchild = os.fork()
        if grandchild == 0:
            time.sleep(600)
        else:
            Path(entry["pid_file"]).write_text(str(grandchild))
        os._exit(0)
    os.waitpid(child, 0)
    if response == "and die":
        os._exit(3)
    return 1.0


def say(entry: dict[str, Any], response: str) -> float:
    """Write the response to the worker's own socket, with a new line for every ¶."""
    os.write(int(sys.argv[1]), response.replace("¶", "\n").encode())
    return 0.0


def flood(entry: dict[str, Any], response: str) -> float:
    """Write to the worker's own socket without end."""
    while True:
        os.write(int(sys.argv[1]), b"x" * 2**16)


def heavy_modules(entry: dict[str, Any], response: str) -> float:
    """Raise when the worker holds a module that it must not pay for."""
    heavy = sorted({"torch", "vllm", "megatron", "transformers"} & set(sys.modules))
    if heavy:
        raise RuntimeError(f"the worker imported {heavy}")
    return 1.0


def scoring_sources() -> dict[str, str]:
    """Return for every reasoning-gym dataset the source of score_answer, in all classes, and of its helper methods."""
    from reasoning_gym.factory import DATASETS

    return {name: _scoring_source(dataset) for name, (dataset, _) in DATASETS.items()}


def _scoring_source(dataset: type) -> str:
    classes = [c for c in dataset.__mro__ if "score_answer" in vars(c)]
    source = "".join(inspect.getsource(vars(c)["score_answer"]) for c in classes)
    helpers = [getattr(dataset, name, None) for name in set(re.findall(r"self\.(\w+)\(", source))]
    return source + "".join(inspect.getsource(helper) for helper in helpers if inspect.isroutine(helper))


def _raise() -> None:
    raise KeyError("\x1b]0;title\x07 quoted from the model")


def _sleep() -> None:
    time.sleep(600)


def _loop_in_c() -> None:
    re.match(r"(a+)+$", "a" * 60 + "b")


def _ignore_signals() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)


def _exit_quietly() -> None:
    os._exit(0)


def _exit_loudly() -> None:
    os._exit(3)


def _system_exit() -> None:
    sys.exit(0)


def _interrupt() -> None:
    raise KeyboardInterrupt


def _eat_memory() -> None:
    bytearray(10 * 2**30)


def _print_a_lot() -> float:
    print("x" * 10_000_000, flush=True)
    print("x" * 10_000_000, file=sys.stderr, flush=True)
    return 1.0


_RETURNS: dict[str, Any] = {
    "nan": math.nan,
    "inf": math.inf,
    "none": None,
    "text": "1",
    "list": [[1.0]],
    "negative": -0.5,
    "above": 1.5,
    "dust": 1 + 1e-9,
    "partial": 0.98,
}
_ACTIONS: dict[str, Any] = {
    "raise": _raise,
    "sleep": _sleep,
    "loop in C": _loop_in_c,
    "ignore signals": _ignore_signals,
    "exit quietly": _exit_quietly,
    "exit loudly": _exit_loudly,
    "system exit": _system_exit,
    "interrupt": _interrupt,
    "eat memory": _eat_memory,
    "print a lot": _print_a_lot,
}
