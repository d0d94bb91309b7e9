"""Run verifiers in worker processes that can be killed: the trainer's side of worker.py.

Plain subprocesses, not multiprocessing: its children import the trainer's main module again, torch and all.

A worker is not trusted: a verifier that was led astray can write to its socket what it likes. A reply counts only where
it names the message that it answers, and is a score from 0 to 1 or an error; a worker that says anything else is
replaced, and the response in its hands is an error.
"""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_mcpo import progress
from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.config.domain_schema import RewardsConfig
from megatron_mcpo.rewards.verifier_queue import Verdict, VerifierQueue
from megatron_mcpo.rewards.worker import checked_score, printable

STARTUP_SECONDS = 300.0
"""A worker may take so long to import a verifier on a crowded machine."""

NUM_STARTS = 3
"""How many workers in a row may die while they start: one may have been killed from outside."""

MAX_REPLY_BYTES = 2**16

_GIB = 2**30

_KILL_SECONDS = 5.0
"""How long processes of a worker are looked for, where they fork on while they are killed."""

_MARK = "MCPO_WORKER"
"""Variable in the environment of a worker, by which a process that left its session is still known as its own."""


class VerificationError(RuntimeError):
    """One verification failed: the verifier raised, or returned something that is not a score."""

    def __init__(self, message: str, *, timed_out: bool):
        super().__init__(message)
        self.timed_out = timed_out


class UnexpectedReply(ConnectionError):
    """A worker sent what no worker sends: its verifier writes to the socket."""


class VerifierUnavailable(ConfigError):
    """No worker can be started, or a verifier doesn't import: for the user to correct."""

    def __init__(self, problem: str):
        super().__init__([problem])


@dataclass(frozen=True, kw_only=True)
class Task:
    """One response for one verifier.

    item: tasks of an item that has failed are not tried
    lane: tasks of a lane share a verifier; see verifier_queue.py
    function: "module:name", called in a worker as name(entry, response, **options)
    """

    item: Hashable
    lane: Hashable
    function: str
    entry: dict[str, Any]
    response: str
    options: dict[str, Any] = field(default_factory=dict)


class _Worker:
    """One process and the socket to it. Used by one thread at a time."""

    def __init__(self, functions: Sequence[str], *, memory_bytes: int):
        """functions: imported at once"""
        self._requested: set[str] = set()
        self._importing: deque[str] = deque()
        self._buffer = b""
        self._num_sent = self._num_received = 0
        self._mark = secrets.token_hex(16)
        self._socket, far_end = socket.socketpair()
        with far_end:
            command = [sys.executable, "-W", "ignore", "-m", "megatron_mcpo.rewards.worker"]
            self._process = subprocess.Popen(
                [*command, str(far_end.fileno()), str(memory_bytes)],
                pass_fds=[far_end.fileno()],
                stdin=subprocess.DEVNULL,
                env=_worker_environment() | {_MARK: self._mark},
                start_new_session=True,  # so that processes that the verifier forks are killed with it
            )
        for function in functions:
            self._request(function)

    def wait_ready(self, function: str | None = None) -> None:
        """Wait for all imports, with that of `function`.

        Raises VerifierUnavailable where one fails or takes too long, ConnectionError where the worker died.
        """
        if function is not None and function not in self._requested:
            self._request(function)
        while self._importing:
            name = self._importing[0]
            try:
                reply = self._receive(time.monotonic() + STARTUP_SECONDS)
            except TimeoutError as error:
                raise VerifierUnavailable(f"verifier {name!r}: its worker did not start: {error}") from error
            if "error" in reply:
                raise VerifierUnavailable(printable(str(reply["error"])))
            self._importing.popleft()

    def ask(self, task: Task, *, timeout: float) -> float:
        """Return the score of one response.

        Raises VerificationError; TimeoutError or ConnectionError where the worker is lost.
        """
        deadline = time.monotonic() + timeout
        self._send(
            {
                "function": task.function,
                "options": task.options,
                "entry": task.entry,
                "response": task.response,
                "deadline": timeout,
            },
            timeout,
        )
        reply = self._receive(deadline)
        if set(reply) == {"task", "error", "timed_out"}:
            raise VerificationError(printable(str(reply["error"])), timed_out=reply["timed_out"] is True)
        if set(reply) != {"task", "score"} or not isinstance(reply["score"], float):
            raise UnexpectedReply(f"it sent {printable(str(reply))[:80]}")
        try:
            return checked_score(reply["score"])
        except ValueError as error:
            raise UnexpectedReply(f"it sent no score: {error}") from error

    def kill(self) -> int:
        """End the process and everything that it started; return its exit code (negative: the signal)."""
        exit_code = self._process.poll()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        deadline = time.monotonic() + _KILL_SECONDS
        while (left := list(self._left_behind())) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._socket.close()
        return self._process.returncode if exit_code is None else exit_code

    def _request(self, function: str) -> None:
        self._requested.add(function)
        self._importing.append(function)
        with contextlib.suppress(ConnectionError):  # a worker that has died is noticed when its reply is awaited
            self._send({"import": function}, STARTUP_SECONDS)

    def _left_behind(self) -> Iterator[int]:
        """Yield the processes of the worker's session, and those that left it and have the worker's environment."""
        mark = f"{_MARK}={self._mark}".encode()
        for folder in Path("/proc").iterdir():
            try:
                is_left = mark in (folder / "environ").read_bytes() or os.getsid(int(folder.name)) == self._process.pid
                if is_left and (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    yield int(folder.name)
            except (OSError, ValueError):  # another user's, one that has ended, or no process
                continue

    def _send(self, message: dict[str, Any], timeout: float) -> None:
        self._num_sent += 1
        self._socket.settimeout(timeout)
        self._socket.sendall(json.dumps({**message, "task": self._num_sent}).encode() + b"\n")

    def _receive(self, deadline: float) -> dict[str, Any]:
        """Return the reply to the oldest message without one.

        Raises TimeoutError, ConnectionError, or UnexpectedReply for anything but one JSON object that names it.
        """
        self._num_received += 1
        while b"\n" not in self._buffer:
            if len(self._buffer) > MAX_REPLY_BYTES:
                raise UnexpectedReply(f"it sent more than {MAX_REPLY_BYTES} bytes")
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            chunk = self._socket.recv(65536)
            if not chunk:
                raise ConnectionResetError("it closed the connection")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict) or reply.get("task") != self._num_received:
            raise UnexpectedReply(f"it sent {printable(line[:80].decode(errors='replace'))}")
        return reply


def _worker_environment() -> dict[str, str]:
    """Return the trainer's environment, with its import path and one thread: more would not fit the address space."""
    one_thread = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    return {**os.environ, **one_thread, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


class WorkerPool:
    """Processes that run any verifier, started at once, replaced when lost.

    A call's deadline starts when a worker gets it: neither the queue nor the worker's start-up counts.
    """

    def __init__(self, functions: Sequence[str], rewards: RewardsConfig):
        """functions: "module:name" of the verifiers that every worker imports at its start; others when first used

        rewards: how many workers there are, and their limits
        """
        self.timeout = rewards.timeout
        self._functions = tuple(dict.fromkeys(functions))
        self._memory_bytes = int(rewards.memory_gib * _GIB)
        self._closed = False
        self._lock = threading.Lock()
        self._workers = [self._start() for _ in range(rewards.workers)]
        self._threads = ThreadPoolExecutor(rewards.workers, thread_name_prefix="verifier")

    def wait_ready(self) -> None:
        """Wait until a worker has imported its verifiers. Raises VerifierUnavailable."""
        self._ready(0)

    def run(self, tasks: Sequence[Task], *, max_error_rate: float) -> list[Verdict]:
        """Return a verdict for every task, in order; verifier_queue.py says which are not tried.

        Raises VerifierUnavailable.
        """
        queue = VerifierQueue(
            [task.lane for task in tasks],
            [task.item for task in tasks],
            num_workers=len(self._workers),
            max_error_rate=max_error_rate,
        )
        serving = [self._threads.submit(self._serve, slot, tasks, queue) for slot in range(len(self._workers))]
        for future in serving:
            future.result()
        return queue.verdicts()

    def close(self) -> None:
        """Kill the workers; calls under way fail."""
        with self._lock:
            self._closed = True
            for worker in self._workers:
                worker.kill()
        self._threads.shutdown(cancel_futures=True)

    def _serve(self, slot: int, tasks: Sequence[Task], queue: VerifierQueue) -> None:
        try:
            while (number := queue.take()) is not None:
                queue.settle(number, self._verify(slot, tasks[number]))
                progress.tick()
        except BaseException:
            queue.stop()
            raise

    def _verify(self, slot: int, task: Task) -> Verdict:
        worker = self._ready(slot, task.function)
        try:
            return Verdict(score=worker.ask(task, timeout=self.timeout))
        except VerificationError as error:
            return Verdict(error=str(error), timed_out=error.timed_out)
        except TimeoutError:
            self._replace(slot)
            return Verdict(error=f"no answer within {self.timeout:g} s, worker killed", timed_out=True)
        except UnexpectedReply as error:
            self._replace(slot)
            return Verdict(error=f"worker killed: {error}")
        except ConnectionError:
            return Verdict(error=f"worker died (exit code {self._replace(slot)})")

    def _ready(self, slot: int, function: str | None = None) -> _Worker:
        """Return a worker that has imported its verifiers, with `function`. One that dies meanwhile is replaced."""
        for _ in range(NUM_STARTS):
            worker = self._workers[slot]
            try:
                worker.wait_ready(function)
            except ConnectionError:
                exit_code = self._replace(slot)
            else:
                return worker
        names = ", ".join(map(repr, dict.fromkeys([*self._functions, *([function] if function else [])])))
        raise VerifierUnavailable(
            f"verifier {names}: {NUM_STARTS} workers died while they imported it (exit code {exit_code}); import it in "
            "a Python of your own, with rewards.memory_gib of address space"
        )

    def _replace(self, slot: int) -> int:
        """Kill a lost worker, start another, and return the exit code of the first."""
        with self._lock:
            exit_code = self._workers[slot].kill()
            if not self._closed:
                self._workers[slot] = self._start()
        return exit_code

    def _start(self) -> _Worker:
        return _Worker(self._functions, memory_bytes=self._memory_bytes)
