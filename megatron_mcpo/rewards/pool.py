"""Worker processes that can be killed: the parent's half of worker.py.

Plain subprocesses, not multiprocessing: its children import the trainer's main module again, torch and all.
"""

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

STARTUP_SECONDS = 300.0
"""How long a worker may take to import its verifier, on a crowded machine."""


class VerificationError(RuntimeError):
    """One verification failed: the verifier raised, hung, died, or returned something that is no score."""


class VerifierUnavailable(RuntimeError):
    """No worker can be started: the verifier doesn't import."""


class _Worker:
    """One process and the socket to it. Used by one thread at a time."""

    def __init__(self, verifier: str):
        self.verifier = verifier
        self.ready = False
        self._buffer = b""
        self._socket, far_end = socket.socketpair()
        with far_end:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "megatron_mcpo.rewards.worker", str(far_end.fileno()), verifier],
                pass_fds=[far_end.fileno()],
                stdin=subprocess.DEVNULL,
                env=_worker_environment(),
                start_new_session=True,  # so that what the verifier forks can be killed with it
            )

    def wait_ready(self) -> None:
        if self.ready:
            return
        try:
            reply = self._receive(time.monotonic() + STARTUP_SECONDS)
        except (TimeoutError, ConnectionError) as error:
            raise VerifierUnavailable(f"verifier {self.verifier!r}: its worker did not start: {error}") from error
        if "error" in reply:
            raise VerifierUnavailable(reply["error"])
        self.ready = True

    def ask(self, entry: dict[str, Any], answer: str, *, timeout: float) -> float:
        """The score of one answer. Raises VerificationError; TimeoutError or ConnectionError: the worker is lost."""
        deadline = time.monotonic() + timeout
        message = json.dumps({"entry": entry, "answer": answer, "deadline": timeout}).encode() + b"\n"
        self._socket.settimeout(timeout)
        self._socket.sendall(message)
        reply = self._receive(deadline)
        if "error" in reply:
            raise VerificationError(reply["error"])
        return reply["score"]

    def kill(self) -> int:
        """End the process, with everything that it started; returns its exit code (negative: the signal)."""
        exit_code = self._process.poll()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._socket.close()
        return self._process.returncode if exit_code is None else exit_code

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            chunk = self._socket.recv(65536)
            if not chunk:
                raise ConnectionResetError("it closed the connection")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)


def _worker_environment() -> dict[str, str]:
    """The parent's, with its import path, and one thread: a thread per core would not fit the address space."""
    one_thread = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    return {**os.environ, **one_thread, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


class WorkerPool:
    """`num_workers` processes that run `verifier` ("package.module:function"), started at once, replaced when lost.

    A call's deadline starts when a worker gets it: neither the queue nor the worker's start-up counts.
    """

    def __init__(self, verifier: str, *, num_workers: int, timeout: float):
        self.verifier = verifier
        self.timeout = timeout
        self._closed = False
        self._workers = [_Worker(verifier) for _ in range(num_workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="verifier")

    def submit(self, subject: "Subject", answer: str) -> "Future[float]":
        """A future of the score; it raises VerificationError or VerifierUnavailable."""
        return self._threads.submit(self._verify, subject, answer)

    def wait_ready(self) -> None:
        """Wait until a worker has imported the verifier. Raises VerifierUnavailable."""
        worker = self._idle.get()
        try:
            worker.wait_ready()
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Kill the workers; calls under way fail."""
        self._closed = True
        for worker in self._workers:
            worker.kill()
        self._threads.shutdown(cancel_futures=True)

    def _verify(self, subject: "Subject", answer: str) -> float:
        if subject.error is not None:
            raise VerificationError(subject.error)
        worker = self._idle.get()
        try:
            worker.wait_ready()
            return worker.ask(subject.entry, answer, timeout=self.timeout)
        except VerificationError as error:
            subject.error = str(error)
            raise
        except (TimeoutError, ConnectionError) as error:
            worker, subject.error = self._replace(worker, error)
            raise VerificationError(subject.error) from error
        finally:
            self._idle.put(worker)

    def _replace(self, lost: _Worker, error: Exception) -> tuple[_Worker, str]:
        exit_code = lost.kill()
        reason = f"worker died (exit code {exit_code})"
        if isinstance(error, TimeoutError):
            reason = f"no answer within {self.timeout:g} s, worker killed"
        if self._closed:
            return lost, reason
        fresh = _Worker(self.verifier)
        self._workers[self._workers.index(lost)] = fresh
        return fresh, reason


class Subject:
    """The item whose answers are verified. After a first failure the rest of its answers is not tried."""

    def __init__(self, entry: dict[str, Any]):
        self.entry = entry
        self.error: str | None = None
