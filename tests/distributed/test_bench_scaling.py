"""The messages of a rank whose neighbours are not there are those of real ranks.

Not covered: more ranks than a test can start; what NCCL makes of a message.
"""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import scaling
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.distributed import parallel
from tests.support import tiny_models
from tests.support.ranks import run_ranks
from tests.support.traffic import Received


def measured(folder: Path, layout: Layout) -> dict[str, Any]:
    ranks = parallel.init(layout, seed=0, timeout_seconds=240)
    return scaling.received(folder, scaling.sampled(32, 3), ranks)


def pretended(folder: Path, layout: Layout) -> dict[str, Any]:
    with parallel.pretend(layout, rank=0) as ranks:
        return scaling.received(folder, scaling.sampled(32, 3), ranks)


def exchanged(num_engines: int) -> float:
    ranks = parallel.init(Layout(data=4), seed=0, timeout_seconds=240)
    share = list(enumerate(scaling.sampled(32, 3)))[ranks.rank :: num_engines] if ranks.rank < num_engines else []
    with Received(ranks) as received:
        parallel.gather_objects(share, ranks)
    return sum(received.bytes.values())


@pytest.mark.parametrize("num_engines", [2, 3, 4])
def test_rollouts_are_as_large_as_real_ranks_receive_them(num_engines: int) -> None:
    expected = scaling.rollout_bytes(scaling.sampled(32, 3), num_engines=num_engines, num_ranks=4)
    assert run_ranks(4, exchanged, num_engines) == [expected] * 4


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_a_rank_alone_receives_what_real_ranks_do(tmp_path: Path, replicas: int) -> None:
    tiny_models.save_model(tmp_path, "untied", num_layers=2)
    layout = Layout(data=replicas)
    expected = run_ranks(replicas, measured, tmp_path, layout)[0]
    (found,) = run_ranks(1, pretended, tmp_path, layout)
    assert found == expected
    assert bool(found["bytes"].get("data", 0)) == (replicas > 1)
