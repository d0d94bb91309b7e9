"""Find out which sandbox this machine allows, by running programs in it."""

import time
from functools import cache
from typing import Literal

from megatron_mcpo.rewards.sandbox import process

Level = Literal["bubblewrap", "interpreter", "insecure"]

# Prints what of the host is within reach: nothing, if this is to be called a sandbox.
_PROBE = """
import os, socket
reached = []
for name, deed in {
    "the network": lambda: socket.socket().connect(("127.0.0.1", 1)),
    "a process of its own": os.fork,
    "the root folder": lambda: open("/probe", "w"),
    "/proc": lambda: os.listdir("/proc"),
    "root": lambda: os.setuid(0),
}.items():
    try:
        deed()
    except PermissionError:
        pass
    except OSError as error:
        if error.strerror not in ("Read-only file system", "No such file or directory", "Invalid argument"):
            reached.append(f"{name} ({error})")
    else:
        reached.append(name)
print("within reach: " + ", ".join(reached) if reached else "contained")
"""
_PROBE_SECONDS = 60.0


def available_level(setting: Literal["auto", "bubblewrap", "interpreter", "insecure"]) -> Level:
    """Return the level that `rewards.sandbox` asks for, once a program has run in it; for auto the first that works.

    Raises ValueError with the reason and what to do where there is none. `insecure` is never chosen by auto.
    """
    if setting == "insecure":
        return setting
    wanted: tuple[Literal["bubblewrap", "interpreter"], ...] = ("bubblewrap", "interpreter")
    refusals = []
    for level in wanted if setting == "auto" else (setting,):
        problem = _problem(level)
        if problem is None:
            return level
        refusals.append(f"{level}: {problem}")
    raise ValueError(
        f"rewards.sandbox = {setting!r}: code can't be run safely on this machine: {'; '.join(refusals)}. Allow "
        "unprivileged user namespaces (sysctl user.max_user_namespaces, an AppArmor profile for bwrap, or a container "
        "that may make them), pip install pydantic-monty for rewards.sandbox = 'interpreter', or take the domain out; "
        "'insecure' runs the model's code with resource limits alone"
    )


@cache
def _problem(level: Literal["bubblewrap", "interpreter"]) -> str | None:
    """Return why a level doesn't work here, or None."""
    try:
        if level == "interpreter":
            from megatron_mcpo.rewards.sandbox.interpreter import Session

            with Session(time.monotonic() + _PROBE_SECONDS) as session:
                return None if session.run("6 * 7") == 42 else "wrong result"
        job = {"mode": "program", "code": _PROBE}
        said = process.run(job, b"", level=level, seconds=_PROBE_SECONDS).output.decode(errors="replace").strip()
        return None if said == "contained" else said or "the probe said nothing"
    except (process.SandboxError, ImportError, OSError, ValueError, RuntimeError) as error:
        return str(error)
