"""The messages of a rank whose neighbours are not there are those of real ranks.

Not covered: the exchange of rollouts (test_exchange.py), more ranks than can be started here, what NCCL makes of it.
"""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import scaling
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.distributed import parallel
from tests.support import tiny_models
from tests.support.ranks import run_ranks


def measured(folder: Path, layout: Layout) -> dict[str, Any]:
    ranks = parallel.init(layout, seed=0, timeout_seconds=240)
    return scaling.received(folder, scaling.sampled(32, 3), ranks)


def pretended(folder: Path, layout: Layout) -> dict[str, Any]:
    with parallel.pretend(layout, rank=0) as ranks:
        return scaling.received(folder, scaling.sampled(32, 3), ranks)


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_a_rank_alone_receives_what_real_ranks_do(tmp_path: Path, replicas: int) -> None:
    tiny_models.save_model(tmp_path, "untied", num_layers=2)
    layout = Layout(data=replicas)
    expected = run_ranks(replicas, measured, tmp_path, layout)[0]
    (found,) = run_ranks(1, pretended, tmp_path, layout)
    assert found == expected
    assert bool(found["bytes"].get("data", 0)) == (replicas > 1)
