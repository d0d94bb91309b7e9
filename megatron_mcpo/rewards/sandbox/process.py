"""Run one program in one sandboxed process: start it, watch it, end it with everything that it started."""

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from megatron_mcpo.rewards.sandbox import bubblewrap, harness
from megatron_mcpo.rewards.sandbox.seccomp import filter_bytes

ProcessLevel = Literal["bubblewrap", "insecure"]

MEMORY_BYTES = 2**30
"""Address space of a program."""

OUTPUT_BYTES = 2**20
"""Bytes of standard output after which a program is ended, beyond the length of its test's expected output."""

VALUES_BYTES = 2**22
"""Bytes of encoded values after which a program is ended: some 200,000 numbers."""

MAX_FILES = 4096
"""Files, folders and links of a program after which it is ended: each takes a KiB of the kernel's memory.

They are counted from outside: bubblewrap can't limit them in its tmpfs (nr_inodes), and where AppArmor allows mounts to
bubblewrap alone no other process can.
"""

MAX_PENDING = 1024
"""Signals and timers of a program that may wait; the kernel's default grows with the host's memory."""

COUNT_SECONDS = 0.05
"""How often the files are counted."""

START_SECONDS = 2.0
"""Where a program has less time than this and did not start, it timed out; with more time the sandbox failed."""


class SandboxError(RuntimeError):
    """The sandbox itself failed: nothing is known about the program."""


@dataclass(frozen=True)
class Outcome:
    """The result of a program. exit_code: None where it was stopped; `stopped` says why."""

    output: bytes
    exit_code: int | None
    stopped: Literal["", "time", "output", "files"] = ""


def run(
    job: dict[str, Any], stdin: bytes, *, level: ProcessLevel, seconds: float, output_bytes: int = OUTPUT_BYTES
) -> Outcome:
    """Run `job` (see harness.py) for at most `seconds`; when this returns no process of it is left.

    Ends with its parent: bubblewrap by --die-with-parent, the insecure level by PR_SET_PDEATHSIG.
    Raises SandboxError where the program was not even started.
    """
    as_root = level == "bubblewrap" and os.geteuid() == 0
    limits = {
        "RLIMIT_AS": MEMORY_BYTES,
        "RLIMIT_CPU": math.ceil(seconds) + 1,
        "RLIMIT_FSIZE": bubblewrap.TEMPORARY_BYTES,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_SIGPENDING": MAX_PENDING,
        "RLIMIT_CORE": 0,
    }
    if level == "bubblewrap":  # elsewhere it counts the user's other processes too
        limits["RLIMIT_NPROC"] = 64
    shell = {"user": bubblewrap.NOBODY if as_root else None, "limits": limits, "die_with_parent": level == "insecure"}
    with contextlib.ExitStack() as stack:
        job_fd = _readable(stack, "job", json.dumps({**job, **shell}).encode())
        stdin_fd = _readable(stack, "stdin", stdin)
        shown = stdin if job["mode"] == "program" else b""
        complaints = stack.enter_context(os.fdopen(os.memfd_create("stderr"), "r+b"))
        info, info_fd = os.pipe()
        namespace = stack.enter_context(_Namespace(info))
        with os.fdopen(info_fd, "wb") as far_end:
            command, fds = _command(stack, level, shown, info_fd=info_fd, as_root=as_root)
            process = subprocess.Popen(
                [*command, "-I", "-S", "-B", "-X", "utf8", "-c", _harness(), str(job_fd)],
                pass_fds=[job_fd, far_end.fileno(), *fds],
                stdin=stdin_fd,
                stdout=subprocess.PIPE,
                stderr=complaints,
                cwd="/",
                env={},
                start_new_session=level == "insecure",
                group=bubblewrap.NOBODY if as_root else None,
                extra_groups=[] if as_root else None,
            )
        try:
            until = time.monotonic() + seconds
            outcome = _watch(process, None if level == "insecure" else namespace, until, output_bytes=output_bytes)
        finally:
            _end(process, level, namespace)
        too_late = outcome.stopped == "time" and seconds < START_SECONDS
        if not outcome.output.startswith(harness.STARTED) and not too_late:
            complaints.seek(0)
            reason = complaints.read(2000).decode(errors="replace").strip() or f"no start within {seconds:.1f} s"
            raise SandboxError(f"sandbox {level}: {reason}")
    return Outcome(outcome.output.removeprefix(harness.STARTED), outcome.exit_code, outcome.stopped)


def _command(
    stack: contextlib.ExitStack, level: ProcessLevel, stdin: bytes, *, info_fd: int, as_root: bool
) -> tuple[list[str], list[int]]:
    """Return the start of the command line, and the descriptors that it names."""
    if level == "insecure":
        return [sys.executable], []
    seccomp_fd = _readable(stack, "seccomp", filter_bytes())
    stdin_fd = _readable(stack, "/dev/stdin", stdin)
    user_fd = bubblewrap.root_user_namespace() if as_root else None
    command = bubblewrap.command(
        bubblewrap.usable(), info_fd=info_fd, seccomp_fd=seccomp_fd, user_namespace_fd=user_fd, stdin_fd=stdin_fd
    )
    return command, [seccomp_fd, stdin_fd] if user_fd is None else [seccomp_fd, stdin_fd, user_fd]


def _readable(stack: contextlib.ExitStack, name: str, content: bytes) -> int:
    """Open a descriptor from which `content` can be read, and to which nothing can be written."""
    with os.fdopen(os.memfd_create(name), "wb") as file:
        file.write(content)
        file.flush()
        fd = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY)
    stack.callback(os.close, fd)
    return fd


@cache
def _harness() -> str:
    return Path(harness.__file__).read_text(encoding="utf-8")


class _Namespace:
    """The process namespace of one sandbox, seen from outside. A context manager."""

    def __init__(self, info: int):
        """info: the end of a pipe to which bubblewrap writes which process is the namespace's first"""
        self._info = info
        self._temporary: int | None = None

    def __enter__(self) -> "_Namespace":
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._info)
        self.release()

    @cached_property
    def first_process(self) -> int | None:
        """Return the process with which the namespace ends; None before bubblewrap has said which."""
        os.set_blocking(self._info, False)
        with contextlib.suppress(BlockingIOError, ValueError):
            return json.loads(os.read(self._info, 4096))["child-pid"]
        return None

    def num_files(self) -> int:
        """Return how many files, folders and links are in /tmp there. Call it once the harness has STARTED.

        Raises SandboxError where this machine does not let them be counted.
        """
        if self._temporary is None:
            try:
                self._temporary = os.open(f"/proc/{self.first_process}/root/tmp", os.O_PATH)
            except (FileNotFoundError, ProcessLookupError):  # it has ended
                return 0
            except OSError as error:
                raise SandboxError(f"the files of the sandbox can't be counted: {error}") from error
        found = os.fstatvfs(self._temporary)
        return found.f_files - found.f_ffree

    def release(self) -> None:
        """Let the files end with the namespace."""
        if self._temporary is not None:
            os.close(self._temporary)
            self._temporary = None


def _watch(
    process: subprocess.Popen[bytes], namespace: _Namespace | None, deadline: float, *, output_bytes: int
) -> Outcome:
    """Read its output to the end, or until it is too long or too late, or has too many files in its namespace."""
    assert process.stdout is not None
    output = bytearray()
    fd = process.stdout.fileno()
    while True:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return Outcome(bytes(output), None, "time")
        is_ready = select.select([fd], [], [], min(remaining, COUNT_SECONDS))[0]
        if namespace is not None and output.startswith(harness.STARTED) and namespace.num_files() > MAX_FILES:
            return Outcome(bytes(output), None, "files")
        if not is_ready:
            continue
        chunk = os.read(fd, 65536)
        if not chunk:
            break
        output += chunk
        if len(output) > output_bytes:
            return Outcome(bytes(output), None, "output")
    try:
        return Outcome(bytes(output), process.wait(max(deadline - time.monotonic(), 0.0)))
    except subprocess.TimeoutExpired:
        return Outcome(bytes(output), None, "time")


def _end(process: subprocess.Popen[bytes], level: ProcessLevel, namespace: _Namespace) -> None:
    """End it with all that it started."""
    namespace.release()
    if level == "insecure":
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    elif process.poll() is None and namespace.first_process is not None:
        # With its first process a PID namespace ends, and then bubblewrap itself, which waits for that.
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.kill(namespace.first_process, signal.SIGKILL)
            process.wait(5.0)
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
