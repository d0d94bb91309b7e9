"""Start an engine server for tests and checks."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from megatron_mcpo.rollout.server_client import Client, ServerError
from tests.support.paths import ROOT

START_SECONDS = 400


class Server:
    """A server that starts at once on a free port of this host; `wait_ready` waits for it."""

    def __init__(self, config: Path, log: Path, environment: dict[str, str] | None = None):
        """Start the server. environment: variables besides those of this process"""
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self._port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self.log = log
        self._config = config
        self._variables = {**os.environ, **(environment or {})}
        self.start()

    def start(self) -> None:
        """Start the server, also again after `kill`."""
        command = [sys.executable, "-m", "megatron_mcpo", "serve", str(self._config), "--port", str(self._port)]
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=self._variables, stdout=file, stderr=file, start_new_session=True
            )

    def wait_ready(self) -> None:
        """Wait until the server answers. Raises RuntimeError with the end of its log if it dies or takes too long."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start:\n{self.log.read_text()[-3000:]}")
            try:
                return Client(self.url).get("/health")
            except ServerError:
                time.sleep(0.5)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to all its processes."""
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """Kill all its processes, as a failure of its host would."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
