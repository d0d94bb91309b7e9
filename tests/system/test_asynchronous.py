"""Rollouts ahead of the trainer, on two real servers: how old they are, what a push does to them, what outlives what.

Not covered: GPUs, servers on other hosts; which prompts a step learns from (tests/unit/test_rollout_stream.py).
"""

import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_mcpo.rollout import server, vllm_server
from megatron_mcpo.trainer import server_sync
from tests.support import faults, tiny_run
from tests.support.engine_server import Server
from tests.support.program import CONFIG, metrics, train_forked
from tests.support.resumed_runs import figures

pytestmark = pytest.mark.timeout(900)
WAIT = ("--engine.staleness", "1", "--engine.in_flight", "wait")
NO_EVALUATION = ("--evaluation.every", "100000")
LONG, SHORT = 56, 4
"""The most tokens of a response in the two domains, which the untrained model needs."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide a model in a/, which answers with one digit, one in b/ that seldom ends, and config.toml."""
    folder = tmp_path_factory.mktemp("asynchronous")
    tiny_run.save_chat_model(folder / "a")
    tiny_run.save_chat_model(folder / "b", trained=False)
    text = CONFIG.format(runs=folder / "runs", model=folder / "a")
    text = text.replace("max_response_tokens = 4", f"max_response_tokens = {LONG}")
    text = text.replace('name = "letters"', f'name = "letters"\nmax_response_tokens = {SHORT}')
    (folder / "config.toml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def servers(folder: Path) -> Iterator[list[Server]]:
    running = [Server(folder / "config.toml", folder / f"server{number}.log") for number in range(2)]
    try:
        for each in running:
            each.wait_ready()
        yield running
    finally:
        for each in running:
            each.kill()


def options(name: str, servers: list[Server], *others: str) -> list[str]:
    return ["--run.name", name, "--engine.servers", json.dumps([server.url for server in servers]), *others]


class Run:
    """A run of one rank that can be looked at. It is killed at the end of a `with` block."""

    def __init__(self, ranks: faults.Ranks, folder: Path):
        self._ranks = ranks
        self.folder = folder

    @classmethod
    @contextmanager
    def of(
        cls, folder: Path, name: str, servers: list[Server], *others: str, prepare: Callable[[], None] | None = None
    ) -> "Iterator[Run]":
        words = ["train", str(folder / "config.toml"), *options(name, servers, *others)]
        with faults.running(words, ranks=1, log=folder / f"{name}.log", prepare=prepare) as ranks:
            yield cls(ranks, folder / "runs" / name)

    @property
    def steps(self) -> int:
        return len(metrics(self.folder)) if (self.folder / "metrics.jsonl").exists() else 0

    @property
    def said(self) -> str:
        """Return what it printed, as one line."""
        return " ".join(self._ranks.output.split())

    def wait_for(self, condition: Callable[[], bool], *, seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self._ranks.codes(timeout=0) == [None], self._ranks.output[-3000:]
            assert time.monotonic() < deadline, self._ranks.output[-3000:]
            time.sleep(0.05)

    def wait_for_steps(self, number: int) -> None:
        """Wait until it has taken so many more steps."""
        goal = self.steps + number
        self.wait_for(lambda: self.steps >= goal)

    def code(self, *, seconds: float) -> int | None:
        """Wait for its end; return the exit code."""
        return self._ranks.codes(timeout=seconds)[0]


@contextmanager
def slowed(server: Server) -> Iterator[None]:
    """Let a server run a fifth of the time only."""
    over = threading.Event()

    def stop_and_go() -> None:
        while not over.wait(0.05):
            server.send(signal.SIGSTOP)
            over.wait(0.2)
            server.send(signal.SIGCONT)

    thread = threading.Thread(target=stop_and_go)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def be_impatient() -> None:
    """Look at the servers more often than usual."""
    server.Server.patience, vllm_server.WATCH_SECONDS, server_sync.LOOK_SECONDS = 3.0, 1.0, 0.5


def test_a_killed_run_goes_on_with_the_rollouts_that_were_under_way(folder: Path, servers: list[Server]) -> None:
    """Compare two runs with in_flight = "wait", whose figures do not depend on time, to the last rollout."""
    settings = (*WAIT, "--run.steps", "12", *NO_EVALUATION)
    whole = train_forked(folder / "config.toml", *options("whole", servers, *settings))
    assert whole.returncode == 0, whole.stderr[-3000:]
    rows = metrics(folder / "runs" / "whole")
    assert [(row["staleness/mean"], row["staleness/max"]) for row in rows] == [(0, 0)] + [(1, 1)] * 11
    assert all(0 <= row["engine/busy"] <= 1 and row["time/wait_for_rollouts"] > 0 for row in rows)
    assert sum(row["engine/busy"] for row in rows) > 1

    with Run.of(folder, "killed", servers, *settings) as run:
        run.wait_for(lambda: run.steps >= 5)
    assert run.steps < 12
    with Run.of(folder, "killed", servers, *settings) as run:
        assert run.code(seconds=300) == 0, run.said[-3000:]
    assert "16 prompts were under way at the checkpoint and go on" in run.said
    assert _without_busy(figures(folder / "runs" / "killed")) == _without_busy(figures(folder / "runs" / "whole"))


def _without_busy(found: Any) -> Any:
    rows, evaluations, rollouts = found
    return [{key: value for key, value in row.items() if key != "engine/busy"} for row in rows], evaluations, rollouts


def test_every_token_has_its_version_and_long_answers_are_learned_from_too(folder: Path, servers: list[Server]) -> None:
    """Keep the weights unchanged, so that the trainer's log-probs show whether a response continues where it was."""
    found = train_forked(
        folder / "config.toml",
        *options("keep", servers, "--engine.staleness", "3", "--engine.oversample", "1.5"),
        *("--model.path", str(folder / "b"), "--engine.max_concurrent", "3"),  # few, so that they are slow
        *("--optimizer.lr", "1e-15", "--optimizer.head_lr", "1e-15", "--run.steps", "10", *NO_EVALUATION),
    )
    assert found.returncode == 0, found.stderr[-3000:]
    rows = metrics(folder / "runs" / "keep")
    assert max(row["engine/logprob_diff_max"] for row in rows) < 1e-3
    assert max(row["staleness/max"] for row in rows) in (2, 3)
    rollouts = [
        (step, json.loads(line))
        for step, path in enumerate(sorted((folder / "runs" / "keep" / "rollouts").iterdir()), start=1)
        for line in path.read_text().splitlines()
    ]
    assert len(rollouts) == 10 * 32
    pieces = [row["versions"] for _, row in rollouts if len(row["versions"]) > 1]
    assert pieces, "no response has outlived a push"
    assert all([v for v, _ in versions] == sorted({v for v, _ in versions}) for versions in pieces)
    assert all(0 <= step - 1 - version <= 3 for step, row in rollouts for version, _ in row["versions"])

    # Who is overtaken is learned from one step later at the latest.
    by_domain = Counter((row["domain"], step <= 5) for step, row in rollouts)
    assert by_domain["divisors", True] >= 4 * 16, "all of the steps 1 to 4"
    assert by_domain["divisors", True] + by_domain["divisors", False] >= 9 * 16


def test_prompts_on_a_slow_server_are_overtaken(folder: Path, servers: list[Server]) -> None:
    """Slow one server on purpose, so that this does not depend on what else the machine does."""
    ahead = ("--engine.staleness", "3", "--engine.oversample", "0.5", "--run.steps", "100000", *NO_EVALUATION)
    with Run.of(folder, "overtaken", servers, *ahead, "--model.path", str(folder / "b")) as run, slowed(servers[1]):
        run.wait_for(lambda: run.steps > 0 and metrics(run.folder)[-1]["rollouts/passed_over"] > 0)


def test_servers_that_die_hang_or_come_back_do_not_end_a_run(folder: Path, servers: list[Server]) -> None:
    """The last test here: it ends the servers. The run looks at them more often than usual, and gives up sooner."""
    first, second = servers
    settings = ("--engine.staleness", "1", "--run.steps", "100000", "--engine.patience", "20", *NO_EVALUATION)
    rare = ("--run.checkpoint_every", "100000", "--engine.engine_check_every", "100000")
    with Run.of(folder, "faults", servers, *settings, *rare, prepare=be_impatient) as run:
        run.wait_for(lambda: run.steps >= 3)
        first.kill()
        run.wait_for_steps(3)
        assert f"WARNING: {first.url}" in run.said and "goes on without this server" in run.said

        first.start()  # it takes long
        second.send(signal.SIGSTOP)  # it answers nothing, and closes no connection
        run.wait_for(lambda: "no engine server answers: waiting for one" in run.said)
        second.send(signal.SIGCONT)
        run.wait_for(lambda: f"engine server {second.url} is back" in run.said)
        run.wait_for(lambda: f"engine server {first.url} is back" in run.said, seconds=300)
        run.wait_for_steps(2)

        for each in servers:
            each.kill()
        assert run.code(seconds=180) == 1
        assert "no engine server has answered for" in run.said and "(engine.patience = 20)" in run.said
        assert "Traceback" not in run.said
