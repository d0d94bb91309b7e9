"""How long a run waits for servers that come back again and again. Not covered: real ones (test_asynchronous.py)."""

from dataclasses import dataclass
from typing import Any

import pytest

from megatron_mcpo.config.layout import Layout
from megatron_mcpo.distributed import parallel
from megatron_mcpo.trainer import server_sync
from megatron_mcpo.trainer.server_sync import NoServers, ServerSync
from tests.support.ranks import run_ranks


@dataclass
class Engine:
    """Servers that take the weights and then answer, or not."""

    num_answers: int = 0
    num_live: int = 1

    def news(self) -> list[str]:
        return []

    def reasons(self) -> list[str]:
        return ["http://a:1: answered what no engine does"]


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


class Full:
    name = "full tensors"

    def sync(self, version: int) -> int:
        return version


def lose_servers_again_and_again() -> None:
    groups = parallel.init(Layout(), seed=0, timeout_seconds=60)
    engine, clock = Engine(), Clock()
    server_sync.time = clock  # type: ignore[assignment]
    full: Any = Full()
    sync = ServerSync(full=full, engine=engine, groups=groups, patience=60.0, note=print)  # type: ignore[arg-type]
    for now, answers in ((0, 0), (50, 0), (60, 0), (100, 1), (160, 1), (170, 2), (171, 2), (230, 2)):
        clock.now, engine.num_answers = float(now), answers
        assert sync.restore(7) == 7
    clock.now = 231.0
    with pytest.raises(NoServers, match=r"no engine server has answered a request for 61 s .*answered what no engine"):
        sync.restore(7)


def test_servers_that_come_back_but_answer_nothing_end_the_run_after_its_patience() -> None:
    run_ranks(1, lose_servers_again_and_again, timeout=120)
