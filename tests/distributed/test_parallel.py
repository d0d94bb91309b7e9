"""Groups of several layouts against their definition, and failing together.

Not covered: NCCL, layouts over several hosts, a rank that dies without raising.
"""

import time
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_mcpo.config.layout import Layout
from megatron_mcpo.distributed import parallel, peers
from tests.support.ranks import run_ranks

LAYOUTS = [
    Layout(tensor=2, data=2, sequence=True),
    Layout(pipeline=2, data=2),
    Layout(tensor=2, pipeline=2),
    Layout(context=2, data=2),
    Layout(pipeline=2, context=2),
    Layout(tensor=2, pipeline=2, context=2, data=2, sequence=True),
]


def _members(layout: Layout) -> dict[str, object]:
    groups = parallel.init(layout, seed=1, timeout_seconds=30)
    names = ("tensor", "pipeline", "context", "data", "data_context", "world", "host")
    members: dict[str, object] = {name: dist.get_process_group_ranks(getattr(groups, name)) for name in names}
    members["where"] = (groups.tensor_rank, groups.context_rank, groups.data_rank, groups.pipeline_rank)
    members["ends"] = (groups.is_first_stage, groups.is_last_stage)
    members["last stage"] = groups.last_stage_global_rank
    assert groups.rank == dist.get_rank() and groups.world_size == dist.get_world_size()
    return members


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_groups_hold_the_ranks_that_differ_only_in_their_own_coordinate(layout: Layout) -> None:
    per_rank = run_ranks(layout.world_size, _members, layout)
    where = [members["where"] for members in per_rank]
    assert len(set(where)) == layout.world_size
    varying = {
        "tensor": {0},
        "context": {1},
        "data": {2},
        "pipeline": {3},
        "data_context": {1, 2},
        "world": {0, 1, 2, 3},
        "host": {0, 1, 2, 3},
    }
    for rank, members in enumerate(per_rank):
        for name, free in varying.items():
            fixed = [i for i in range(4) if i not in free]
            expected = [r for r in range(layout.world_size) if all(where[r][i] == where[rank][i] for i in fixed)]
            assert members[name] == expected, (name, rank)
        stage = where[rank][3]
        assert members["ends"] == (stage == 0, stage == layout.pipeline - 1)
        assert members["last stage"] == members["pipeline"][-1]


def test_one_process_needs_no_launcher() -> None:
    def alone() -> tuple[int, int]:
        import os

        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name)
        groups = parallel.init(Layout(), seed=1, timeout_seconds=30)
        return groups.rank, groups.world_size

    assert run_ranks(1, alone) == [(0, 1)]


def test_a_layout_that_does_not_fit_names_both_sizes() -> None:
    def start() -> str:
        with pytest.raises(ValueError, match="needs 2 ranks, 1 are running"):
            parallel.init(Layout(tensor=2), seed=1, timeout_seconds=30)
        return "refused"

    assert run_ranks(1, start) == ["refused"]


def _fail_on(bad: set[int]) -> str:
    groups = parallel.init(Layout(data=2), seed=1, timeout_seconds=30)
    error = ValueError(f"row {groups.rank} is bad") if groups.rank in bad else None
    try:
        peers.raise_together(error, groups)
    except (ValueError, RuntimeError) as caught:
        return "; ".join([type(caught).__name__, str(caught), *getattr(caught, "__notes__", [])])
    return "went on"


def test_all_ranks_raise_when_one_has_an_error() -> None:
    assert run_ranks(2, _fail_on, set()) == ["went on", "went on"]
    assert run_ranks(2, _fail_on, {1}) == [
        "RuntimeError; failed on rank 1: ValueError: row 1 is bad",
        "ValueError; row 1 is bad",
    ]
    both = run_ranks(2, _fail_on, {0, 1})
    assert both[0] == "ValueError; row 0 is bad; also failed on rank 1: ValueError: row 1 is bad"


def test_a_rank_that_waits_in_vain_fails_at_the_timeout(tmp_path: Path) -> None:
    """And not because the other one ends: that one stays until the first has given up, and sees that it has."""
    gave_up = tmp_path / "gave up"

    def wait() -> bool:
        groups = parallel.init(Layout(data=2), seed=1, timeout_seconds=5)
        if groups.rank == 0:
            with pytest.raises(RuntimeError):
                dist.barrier(group=groups.data)
            gave_up.touch()
        deadline = time.monotonic() + 60
        while not gave_up.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        return gave_up.exists()

    assert run_ranks(2, wait) == [True, True]


def test_failures_and_hangs_of_ranks_are_reported_with_their_place() -> None:
    def fail_or_hang() -> None:
        groups = parallel.init(Layout(data=2), seed=1, timeout_seconds=30)
        if groups.rank == 1:
            raise KeyError("lost")
        dist.barrier()
        time.sleep(30)

    with pytest.raises(RuntimeError) as caught:
        run_ranks(2, fail_or_hang, timeout=80)
    assert "rank 1: " in str(caught.value) and "KeyError: 'lost'" in str(caught.value)
    assert "rank 0: " in str(caught.value) and "fail_or_hang" in str(caught.value)
