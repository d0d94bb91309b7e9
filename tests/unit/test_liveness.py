"""When a job is called silent or stuck, and what is said: from beats that are made up, on a clock that is.

What ranks do with it: tests/system/test_faults.py.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest

from megatron_mcpo.distributed.liveness import ENDED, Beat, End, Judge, ranks_text

LIMIT, SILENCE = 100.0, 30.0


class Job:
    """Ranks on two hosts that beat every 5 s, work and stop as told."""

    def __init__(self, num_ranks: int, *, phase: str = "update", **judge: float):
        about = dict(number=0, count=0, phase=phase, step=7, stopping=False)
        self.beats: list[Beat | None] = [
            Beat(host=host, machine=f"boot of {host}", pid=100 + rank, born=7, **about)  # type: ignore[arg-type]
            for rank, host in enumerate("aabb"[4 - num_ranks :])
        ]
        self.judge = Judge(**{"limit": LIMIT, "silence": SILENCE, "rank": 0, "since": 0.0, **judge})  # type: ignore[arg-type]
        self.now = 0.0
        self.said: list[str] = []

    def change(self, rank: int, **fields: object) -> None:
        beat = self.beats[rank]
        assert beat is not None
        self.beats[rank] = replace(beat, **fields)  # type: ignore[arg-type]

    def run(self, seconds: float, *, silent: tuple[int, ...] = (), working: tuple[int, ...] = ()) -> End | None:
        """Let time go by; return the end of the job if it comes."""
        for _ in range(int(seconds / 5)):
            self.now += 5
            for rank, beat in enumerate(self.beats):
                if beat and rank not in silent:
                    self.change(rank, number=beat.number + 1, count=beat.count + (rank in working))
            lines, end = self.judge.look(self.now, self.beats)
            self.said += lines
            if end is not None:
                return end
        return None


def test_a_job_in_which_one_rank_works_goes_on() -> None:
    job = Job(4)
    assert job.run(10 * LIMIT, working=(3,)) is None
    assert job.said == []


def test_a_rank_that_stops_for_a_while_is_named_and_welcomed_back() -> None:
    job = Job(4)
    job.run(50, working=(0,))
    assert job.run(60, silent=(2,), working=(0,)) is None
    job.run(50, working=(0,))
    assert job.said == [
        "rank 2 (b, pid 102) has been silent for 30 s, last seen in update of step 7; the job waits for it",
        "rank 2 is back after 65 s",
    ]


def test_a_rank_that_stays_silent_ends_the_job_and_is_killed_by_its_neighbour() -> None:
    job = Job(4)
    job.run(50, working=(0,))
    job.change(0, phase="sync")
    end = job.run(2 * LIMIT, silent=(3,))
    assert end is not None and job.now == 50 + LIMIT
    assert end.lines == [
        "a rank has been silent for 100 s (run.collective_timeout = 100): the job ends here",
        "  rank 3 (b, pid 103) has been silent for 100 s, last seen in update of step 7",
        "  rank 0: in sync of step 7",
        "  ranks 1-2: in update of step 7",
        "  the same command resumes a run from its last checkpoint",
    ]
    assert (end.stacks, end.kill) == ([0], {2: [(103, 7)]})
    assert End.decode(end.encode()) == end


def test_hosts_of_one_name_are_told_apart() -> None:
    job = Job(4)
    for rank in (2, 3):
        job.change(rank, host="a")
    end = job.run(2 * LIMIT, silent=(3,))
    assert end is not None and end.kill == {2: [(103, 7)]}


def test_a_host_that_vanished_has_nobody_to_kill() -> None:
    end = Job(4).run(2 * LIMIT, silent=(2, 3))
    assert end is not None and end.kill == {} and end.stacks == [0, 1]


@pytest.mark.parametrize(
    ("before", "allowed"),
    [
        (lambda job: job.run(50, working=(0,)), LIMIT),
        (lambda job: [job.run(60), job.run(5, working=(1,))], 180),  # 3 times the pause of 60 s
        (lambda job: [job.run(90), job.run(5, working=(1,))], 270),
        (lambda job: [job.run(60, silent=(1,)), job.run(5, working=(1,)), job.run(50, working=(0,))], 180),
    ],
    ids=["none", "a pause", "long pause", "a rank that was silent"],
)
def test_without_progress_the_job_ends_later_where_it_paused_before(
    before: Callable[[Job], object], allowed: float
) -> None:
    job = Job(4)
    before(job)
    start = job.now
    end = job.run(10 * LIMIT)
    assert end is not None and job.now - start == allowed
    assert end.lines[0].startswith(f"no rank has made any progress for {allowed:.0f} s")
    assert end.stacks == [0, 1, 2, 3] and end.kill == {}


def test_pauses_of_the_start_teach_nothing_but_it_may_take_three_times_as_long() -> None:
    job = Job(2, phase="start")
    assert job.run(2.5 * LIMIT) is None
    for rank in (0, 1):
        job.change(rank, phase="rollout")
    job.run(5, working=(0,))
    start = job.now
    assert job.run(10 * LIMIT) is not None and job.now - start == LIMIT
    job = Job(2, phase="start")
    assert job.run(10 * LIMIT) is not None and job.now == 3 * LIMIT + 5


def test_a_rank_that_never_comes_is_waited_for_as_at_the_start() -> None:
    job = Job(3)
    job.beats[1] = None
    end = job.run(10 * LIMIT, working=(0, 2))
    assert end is not None and job.now == 3 * LIMIT + 5
    assert job.said == ["rank 1 has not come in 30 s; the job waits for it"]
    assert "  rank 1 has not come in 300 s" in end.lines


def test_asked_to_stop_a_job_does_not_wait_for_a_silent_rank() -> None:
    job = Job(4)
    job.run(50, working=(0,))
    job.change(0, stopping=True)
    assert job.run(25, silent=(1,)) is None
    end = job.run(25, silent=(1,))
    assert end is not None and job.now == 50 + SILENCE
    assert end.lines[0].startswith("the job was asked to stop, and can't save without every rank")
    assert end.kill == {0: [(101, 7)]}


def test_ranks_that_have_ended_are_not_silent() -> None:
    job = Job(2)
    job.run(5)
    for rank in (0, 1):
        job.change(rank, phase=ENDED, number=9)
    assert job.run(90, silent=(0, 1)) is None and job.said == []


def test_at_the_end_the_last_rank_may_take_its_time() -> None:
    job = Job(2)
    job.change(1, phase=ENDED)
    assert job.run(10 * LIMIT, silent=(1,)) is None


def test_the_next_judge_knows_since_when_the_one_before_is_silent() -> None:
    job = Job(4, rank=1, since=-40.0)
    end = job.run(2 * LIMIT, silent=(0,), working=(1,))
    assert end is not None and job.now == LIMIT - 40
    assert job.said[0].startswith("rank 0 (a, pid 100) has been silent for 45 s") and end.kill == {1: [(100, 7)]}


def test_ranks_are_named_as_spans() -> None:
    assert ranks_text([3]) == "rank 3" and ranks_text([1, 2]) == "ranks 1-2"
    assert ranks_text([0, 511, 4, 5, 6]) == "ranks 0, 4-6, 511"
