"""Run attacks on the code sandbox and watch the host.

An attack is contained when its program does not pass its tests, the host's files, processes and sockets are unchanged,
it left neither a process nor a file, it took no more memory than allowed, and it ended in time.
"""

import contextlib
import ctypes
import os
import resource
import secrets
import select
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil

import megatron_mcpo
from megatron_mcpo.rewards.code import score
from megatron_mcpo.rewards.sandbox.attacks import ATTACKS, HARMLESS
from megatron_mcpo.rewards.sandbox.interpreter import Unsupported
from megatron_mcpo.rewards.sandbox.levels import Level
from megatron_mcpo.rewards.sandbox.process import MEMORY_BYTES, SandboxError

SECONDS = 3.0
"""Time for the program of an attack."""

GRACE_SECONDS = 20.0
"""An attack that takes so much longer than its time has worked; less may be due to other load on the machine."""

SPARE_BYTES = 2**28
"""Memory that a process may hold beside its address space: its page tables, Python's files."""

_ANSWER_SECONDS = 5.0
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Result:
    """The outcome of one attack. problems: what of the host it reached; empty where it was contained."""

    name: str
    verdict: str
    problems: tuple[str, ...]
    seconds: float


class Victim:
    """A process that answers: for a while after a process was killed, the kernel still says that it lives."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self.pid = self._process.pid

    def answers(self) -> bool:
        """Tell whether the process is alive."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(b"?")
        except BrokenPipeError:
            return False
        readable, _, _ = select.select([self._process.stdout], [], [], _ANSWER_SECONDS)
        return bool(readable and self._process.stdout.read(1))

    def end(self) -> None:
        """End the process."""
        with self._process:  # waits for it and closes its pipes
            self._process.kill()


class Host:
    """The targets of attacks: a secret in a file, in the environment and behind a descriptor, sockets, a process.

    Its process must start nothing else: other processes count as left over by an attack.
    """

    def __enter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="mcpo-host-"))
        self.folder.chmod(0o755)
        self.secret = f"secret-{secrets.token_hex(16)}"
        self.canary = self.folder / "canary.txt"
        self.canary.write_text(self.secret)
        os.environ["MCPO_SECRET"] = self.secret
        self._inherited = os.open(self.canary, os.O_RDONLY)
        os.set_inheritable(self._inherited, True)
        tcp = socket.create_server(("127.0.0.1", 0))
        self.port = tcp.getsockname()[1]
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind(("127.0.0.1", self.port))
        self.unix_path = f"{self.folder}/socket"
        self._sockets = [tcp, udp, _unix_server(self.unix_path), _unix_server(f"\0{self.unix_path}")]
        for endpoint in self._sockets:
            endpoint.setblocking(False)
        self.victim = Victim()
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphans of this process's children become its own
        return self

    def __exit__(self, *exception: object) -> None:
        self.victim.end()
        for endpoint in self._sockets:
            endpoint.close()
        os.close(self._inherited)
        del os.environ["MCPO_SECRET"]
        shutil.rmtree(self.folder)

    def program(self, text: str) -> str:
        """Return an attack's program with this host's targets in place of the placeholders."""
        targets = {
            "@CANARY@": self.canary,
            "@PACKAGE@": Path(megatron_mcpo.__file__).parent,
            "@HOME@": Path.home(),
            "@PORT@": self.port,
            "@SOCKET@": self.unix_path,
            "@PARENT@": os.getpid(),
            "@VICTIM@": self.victim.pid,
        }
        for placeholder, target in targets.items():
            text = text.replace(placeholder, str(target))
        return text

    def damage(self) -> Iterator[str]:
        """Yield what has changed, and restore it."""
        if not self.canary.exists() or self.canary.read_text() != self.secret:
            self.canary.write_text(self.secret)
            yield "a file of the host was changed"
        if not self.victim.answers():
            self.victim.end()
            self.victim = Victim()
            yield "another process was ended"
        if any(_was_touched(endpoint) for endpoint in self._sockets):
            yield "a socket was reached"
        for place in ("/", "/dev/shm", "/tmp", os.path.dirname(os.__file__)):
            for left in Path(place).glob("mcpo_attack*"):
                left.unlink()
                yield f"{left} was left"
        if left_over := _left_processes(keep=self.victim.pid):
            yield f"processes were left: {left_over}"


def _unix_server(address: str) -> socket.socket:
    server = socket.socket(socket.AF_UNIX)
    server.bind(address)
    server.listen()
    return server


def _was_touched(endpoint: socket.socket) -> bool:
    try:
        if endpoint.type == socket.SOCK_DGRAM:
            endpoint.recv(16)
        else:
            endpoint.accept()[0].close()
    except BlockingIOError:
        return False
    return True


def _left_processes(*, keep: int) -> list[str]:
    """Return names of descendants other than `keep` and the interpreter's process, after a moment to end."""
    deadline = time.monotonic() + 5.0
    while True:
        others = (child for child in psutil.Process().children(recursive=True) if child.pid != keep)
        found = [name for name in map(_name_if_running, others) if name not in (None, "monty")]
        if not found or time.monotonic() > deadline:
            return [name for name in found if name is not None]
        time.sleep(0.05)


def _name_if_running(process: psutil.Process) -> str | None:
    """Return a process's name, None where it has ended; an orphan that has ended is removed from the table."""
    try:
        if process.status() != psutil.STATUS_ZOMBIE:
            return process.name()
        if process.ppid() == os.getpid():
            os.waitpid(process.pid, os.WNOHANG)
    except (psutil.NoSuchProcess, ChildProcessError):
        pass
    return None


def _peak_bytes() -> int:
    """Return the most memory of any one descendant so far: once it is too much, all later attacks are reported too."""
    peaks = [resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{process.pid}/status").read_text()
            peaks += [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")]
    return max(peaks) * 1024


def _tests(kind: str, secret: str) -> list[dict[str, str]]:
    """Return tests that the attack passes exactly where it succeeds."""
    if kind == "escape":
        return [{"input": "", "output": "ESCAPED"}]
    if kind == "secret":
        return [{"input": "", "output": secret}]
    if kind == "forge":
        return [{"input": "", "output": f"nonce-{secrets.token_hex(16)}"}]
    if kind == "twice":
        return [{"input": "1", "output": "first"}, {"input": "2", "output": "ESCAPED"}]
    if kind == "method":
        return [{"assert": f"assert f(7).startswith('{secrets.token_hex(16)}')"}]
    assert kind == "assert", kind
    return [{"assert": f"assert f(7) == {10**11 + secrets.randbelow(9 * 10**11)}"}]


def attack(name: str, host: Host, level: Level) -> Result:
    """Run one attack at `level` against `host`; return its outcome."""
    kind, program = ATTACKS[name]
    started = time.monotonic()
    problems = []
    try:
        entry: dict[str, Any] = {"tests": _tests(kind, host.secret)}
        try:
            passed = score(entry, host.program(program), level=level, seconds=SECONDS)
        except SandboxError:  # a crowded machine did not start it in time: it has done nothing yet
            passed = score(entry, host.program(program), level=level, seconds=4 * SECONDS)
        verdict = "passed" if passed else "failed"
        problems += ["the program passed its tests"] if passed else []
    except Unsupported:
        verdict = "refused"
    except Exception as error:  # the sandbox must not fail for what a program does
        verdict = "error"
        problems.append(f"{type(error).__name__}: {error}")
    seconds = time.monotonic() - started
    if seconds > SECONDS + GRACE_SECONDS:
        problems.append(f"it took {seconds:.0f} s")
    problems += host.damage()
    if _peak_bytes() > MEMORY_BYTES + SPARE_BYTES:
        problems.append("a process took more memory than it may")
    return Result(name, verdict, tuple(problems), seconds)


def attacks_for(level: Level) -> tuple[str, ...]:
    """Return the names of the attacks that may be run at a level."""
    return HARMLESS if level == "insecure" else tuple(ATTACKS)
