"""The forks that stand for ranks: they leave alone what isn't theirs, and a rank that hangs is named with its stack."""

import gc
import time

import pytest
import torch.distributed as dist

from tests.support.ranks import run_ranks


class _Cycle:
    """Garbage that only the collector frees."""

    def __init__(self, held: object) -> None:
        self.me, self.held = self, held


def test_a_rank_collects_no_garbage_of_its_parent() -> None:
    """A store's server is a thread: a fork that frees one would wait for it for ever."""
    gc.disable()
    try:
        _Cycle(dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
        assert run_ranks(2, gc.collect, timeout=30) == [0, 0]
    finally:
        gc.enable()


def test_a_rank_that_hangs_is_named_with_its_stack() -> None:
    with pytest.raises(RuntimeError, match=r"1 of 1 ranks failed\nrank 0: hung and was killed at\n(.*\n)* .*ranks\.py"):
        run_ranks(1, time.sleep, 300, timeout=5)
