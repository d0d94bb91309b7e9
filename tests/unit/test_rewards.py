"""Rewards from real worker processes: what counts as right, and what becomes of a verifier that misbehaves.

Not covered: fork bombs (a worker's processes are not counted, only killed with it); model-written code; the kinds of
verifiers (test_verifiers.py); weights and turns (test_scorer.py). Hostile text is tried on the scorers of the quick
start only; of the other allowed ones the source is read.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.rewards import allowlist
from megatron_mcpo.rewards.pool import VerifierUnavailable
from megatron_mcpo.rewards.scorer import Scorer, TooManyErrors, check_error_rate
from megatron_mcpo.types import RolloutGroup, StopReason
from tests.support.scoring import HOSTILE, completion, config_of, function, group, scorer_of

TIMEOUT = 1.0

QUICK_START = {
    "chain_sum": ("1 + 2 =", "3", {}),
    "count_bits": ("How many 1 bits?", "4", {}),
    "letter_counting": ("How many times a?", "2", {}),
    "word_sequence_reversal": ("Reverse: a, b", "b, a", {}),
    "simple_equations": ("2*x = 8", "4", {}),
    "needle_haystack": ("Ann likes tea. Who likes tea?", "Ann", {}),
    "syllogism": ("Does it follow?", "No", {}),
}


def gym_group(generator: str, *texts: str) -> RolloutGroup:
    question, answer, metadata = QUICK_START[generator]
    index = list(QUICK_START).index(generator)
    metadata = {**metadata, "source_dataset": generator}
    return group(*texts, index=index, question=question, answer=answer, metadata=metadata)


@pytest.fixture(scope="module")
def gym(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scorer]:
    """A scorer whose workers run in an empty folder, so that a file they make is seen."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("gym"))
    with Scorer(config_of([{"sources": [{"generator": "chain_sum"}]}], rewards={"timeout": 5.0})) as scorer:
        scorer.wait_ready()
        yield scorer
    assert list(Path.cwd().iterdir()) == []
    os.chdir(before)


@pytest.fixture(scope="module")
def misbehaving() -> Iterator[Scorer]:
    with scorer_of(function("tests.support.verifiers:misbehave"), timeout=TIMEOUT) as scorer:
        yield scorer


def test_allowed_scorers_do_not_evaluate_text() -> None:
    # In a process of its own: importing reasoning-gym draws from the global random generators.
    code = "import json; from tests.support import verifiers; print(json.dumps(verifiers.scoring_sources()))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, env=environment, check=True, timeout=120
    )
    sources = json.loads(done.stdout)
    evaluates = re.compile(r"(?<![\w.])(eval|exec|compile)\s*\(|parse_expr|sympify")
    assert allowlist.ALLOWED.isdisjoint(allowlist.EVALUATES_ANSWERS)
    assert [name for name in sorted(allowlist.ALLOWED) if evaluates.search(sources[name])] == []
    assert [name for name in sorted(allowlist.EVALUATES_ANSWERS) if not evaluates.search(sources[name])] == []


def test_problems_names_domain_value_and_fix() -> None:
    config = config_of(
        [
            {"name": "games", "sources": [{"generator": "chain_sum"}, {"generator": "countdown"}]},
            {"name": "algebra", "sources": [{"generator": "simple_equation"}]},
        ]
    )
    first, second = allowlist.problems(config)
    assert "'games'" in first and "sources[1]" in first and "'countdown'" in first and "executes" in first
    assert "'algebra'" in second and "did you mean 'simple_equations'?" in second


def test_allowlist_imports_nothing_heavy() -> None:
    code = "import sys, megatron_mcpo.rewards.allowlist; print(sorted({'torch', 'reasoning_gym'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=180)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("generator", QUICK_START)
def test_right_answer_gets_one_and_hostile_text_zero(gym: Scorer, generator: str) -> None:
    answer = QUICK_START[generator][1]
    [scored] = gym.score([gym_group(generator, answer, f"  {answer}\n", *HOSTILE)])
    assert scored.error is None
    assert scored.rewards == (1.0, 1.0) + (0.0,) * len(HOSTILE)


def test_a_long_text_that_contains_the_answer_gets_zero(gym: Scorer) -> None:
    [scored] = gym.score([gym_group("chain_sum", "3", "the sum of 1 and 2 is 3", "33")])
    assert scored.rewards == (1.0, 0.0, 0.0)


def test_an_item_of_a_generator_that_is_not_allowed_is_an_error(gym: Scorer) -> None:
    [scored] = gym.score([group("4", metadata={"source_dataset": "countdown"})])
    assert scored.rewards == () and "'countdown' is not allowed" in str(scored.error)


def test_cut_and_blank_responses_get_zero_unasked(misbehaving: Scorer) -> None:
    cut = [completion("right", reason) for reason in (StopReason.LENGTH, StopReason.ABORT)]
    asked = replace(group(), completions=(completion("right"), *cut, completion(" \n")))
    unasked = replace(group(index=1), completions=(completion("raise", StopReason.LENGTH), completion("")))
    scored = misbehaving.score([asked, unasked])
    assert [s.rewards for s in scored] == [(1.0, 0.0, 0.0, 0.0), (0.0, 0.0)]
    assert [s.correct for s in scored] == [(True, False, False, False), (False, False)]


@pytest.mark.parametrize(
    ("deed", "message"),
    [
        ("raise", "KeyError"),
        ("nan", "not a number from 0 to 1"),
        ("inf", "not a number from 0 to 1"),
        ("negative", "not a number from 0 to 1"),
        ("above", "not a number from 0 to 1"),
        ("none", "NoneType"),
        ("text", "str"),
        ("list", "list"),
        ("system exit", "SystemExit"),
        ("interrupt", "KeyboardInterrupt"),
        ("eat memory", "MemoryError"),
        ("sleep", "no answer within 1 s"),
        ("loop in C", "no answer within 1 s"),
        ("ignore signals", "no answer within 1 s"),
        ("exit quietly", "exit code 0"),
        ("exit loudly", "exit code 3"),
    ],
)
def test_a_failure_costs_the_whole_group_and_nothing_else(misbehaving: Scorer, deed: str, message: str) -> None:
    started = time.monotonic()
    broken, good = misbehaving.score([group("right", deed, "wrong", index=0), group("wrong", "right", index=1)])
    assert broken.rewards == broken.correct == () and message in str(broken.error)
    assert broken.timed_out is ("no answer within" in message)
    assert str(broken.error).isprintable()
    assert good.rewards == (0.0, 1.0) and good.error is None
    assert time.monotonic() - started < 80


def test_odd_but_valid_scores(misbehaving: Scorer) -> None:
    [scored] = misbehaving.score([group("dust", "partial", "print a lot")])
    assert scored.rewards == (1.0, 0.98, 1.0)
    assert scored.correct == (True, False, True)


def test_a_hanging_item_is_tried_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with scorer_of(function("tests.support.verifiers:record_and_misbehave"), timeout=TIMEOUT) as scorer:
        hanging, good = scorer.score(
            [group("sleep", "ignore signals", "loop in C", log=str(log)), group("right", index=1, log=str(log))]
        )
    assert hanging.timed_out and good.rewards == (1.0,)
    assert sorted(log.read_text().splitlines()) == ["q0 sleep", "q1 right"]


def test_an_error_of_an_earlier_stage_is_kept(misbehaving: Scorer) -> None:
    failed = replace(group("right"), error="engine gave up")
    assert misbehaving.score([failed]) == [failed]
    assert misbehaving.score([]) == []


def test_the_same_answer_to_the_same_item_is_verified_once(tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    with scorer_of(function("tests.support.verifiers:record"), workers=2, timeout=5.0) as scorer:
        scored = scorer.score([group("a", "a ", "b", log=log), group("a", index=1, log=log), group("b", log=log)])
    assert [s.rewards for s in scored] == [(1.0, 1.0, 1.0), (1.0,), (1.0,)]
    assert sorted(Path(log).read_text().splitlines()) == ["q0 a", "q0 b", "q1 a"]


def test_waiting_in_the_queue_does_not_count() -> None:
    with scorer_of(function("tests.support.verifiers:slow"), timeout=4.0) as scorer:
        [scored] = scorer.score([group("a", "b", "c", "d", "e", seconds=1.0)])
    assert scored.rewards == (1.0,) * 5


def test_workers_import_nothing_heavy() -> None:
    with scorer_of(function("tests.support.verifiers:heavy_modules"), timeout=TIMEOUT) as scorer:
        [scored] = scorer.score([group("a")])
    assert scored.error is None


def test_close_ends_what_the_verifier_forked(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with scorer_of(function("tests.support.verifiers:fork"), timeout=TIMEOUT) as scorer:
        scorer.score([group("a", pid_file=str(pid_file))])
        assert not _gone(int(pid_file.read_text()))
    assert _gone_soon(int(pid_file.read_text()))


@pytest.mark.parametrize("response", ["and return", "and die"])
def test_what_left_the_session_ends_with_its_worker(tmp_path: Path, response: str) -> None:
    pid_file = tmp_path / "pid"
    with scorer_of(function("tests.support.verifiers:leave_the_session"), timeout=5.0) as scorer:
        [scored] = scorer.score([group(response, pid_file=str(pid_file))])
    assert (scored.rewards == (1.0,)) == (response == "and return")
    assert _gone_soon(int(pid_file.read_text()))


LIES = [
    '{"score": 1.0}¶',
    '{"task": 3, "score": 1.0}¶',
    '{"task": 2, "score": 0.0}¶{"task": 2, "score": 1.0}¶{"task": 3, "score": 1.0}¶',
    '{"task": 2, "score": NaN}¶',
    '{"task": 2, "score": true, "error": "x"}¶',
    '{"task": 2, "score": 1e9}¶',
    '{"task": 2, "score": "1"}¶',
    '{"task": 2, "score": null}¶',
    '{"task": 2, "error": "x"}¶',
    '{"task": 2}¶',
    "[1]¶",
    "[" * 50_000 + "¶",
    "no JSON \x1b]0;title\x07¶",
    "x" * 70_000,
]


@pytest.mark.parametrize("lie", LIES, ids=range(len(LIES)))
def test_what_a_verifier_writes_to_the_socket_is_no_score(lie: str) -> None:
    """A second response must not get the score that was written ahead for it. Message 1 was the import."""
    with scorer_of(function("tests.support.verifiers:say"), workers=1, timeout=5.0) as scorer:
        scored = scorer.score([group(lie), group("¶", index=1), group(".", index=2)])
    assert all(1.0 not in result.rewards for result in scored)
    assert "worker killed: it sent" in str(scored[0].error) + str(scored[1].error)
    assert all(str(result.error).isprintable() for result in scored)


def test_a_flood_of_a_worker_is_not_held_in_memory() -> None:
    with scorer_of(function("tests.support.verifiers:flood"), timeout=20.0) as scorer:
        [scored] = scorer.score([group("x")])
    assert "worker killed: it sent more than" in str(scored.error)


@pytest.mark.parametrize("num_deaths", [2, 3])
def test_a_worker_that_is_killed_while_it_starts_is_replaced(
    tmp_path: Path, num_deaths: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "dying.py").write_text(
        "import os, pathlib, signal\n"
        f"starts = pathlib.Path({str(tmp_path / 'starts')!r})\n"
        "with starts.open('a') as file:\n    file.write('x')\n"
        f"if len(starts.read_text()) <= {num_deaths}:\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "def right(entry, response):\n    return 1.0\n"
    )
    with scorer_of(function("dying:right"), workers=1) as scorer:
        if num_deaths < 3:
            scorer.wait_ready()
            assert scorer.score([group("x")])[0].rewards == (1.0,)
        else:
            with pytest.raises(VerifierUnavailable, match=r"'dying:right': 3 workers died .*exit code -9"):
                scorer.score([group("x")])


def test_workers_end_with_a_trainer_that_was_killed() -> None:
    code = """
import os, signal
from megatron_mcpo.config.domain_schema import RewardsConfig
from megatron_mcpo.rewards.pool import WorkerPool
pool = WorkerPool(["tests.support.verifiers:slow"], RewardsConfig(workers=1, timeout=1.0, memory_gib=4))
pool.wait_ready()
print(pool._workers[0]._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment, timeout=180, check=False
    )
    assert _gone_soon(int(done.stdout))


def _gone_soon(pid: int) -> bool:
    """A killed process takes a moment to go, more where others wait for the cores."""
    deadline = time.monotonic() + 60
    while not _gone(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return _gone(pid)


def _gone(pid: int) -> bool:
    """No such process, or only its exit status is left."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


@pytest.mark.parametrize(
    "verifier", ["no_such_module:f", "tests.support.verifiers:no_such_function", "tests.support.verifiers:_RETURNS"]
)
def test_a_verifier_that_does_not_import_stops_the_run(verifier: str) -> None:
    """It is the user's to correct: a line on every rank, not a traceback."""
    with scorer_of(function(verifier)) as scorer, pytest.raises(ConfigError, match=verifier):
        scorer.score([group("right")])


def test_error_rate() -> None:
    good = replace(group("right"), rewards=(1.0,))
    bad = replace(group("wrong", index=7), error="KeyError: 'x'")
    check_error_rate([good] * 19 + [bad], domain_names=["algebra"], max_error_rate=0.05)
    check_error_rate([], domain_names=["algebra"], max_error_rate=0.0)
    with pytest.raises(TooManyErrors, match=r"2 of 20 groups.*'algebra'.*item 7: KeyError: 'x'"):
        check_error_rate([good] * 18 + [bad] * 2, domain_names=["algebra"], max_error_rate=0.05)


def test_one_failure_of_several_ends_no_run_that_allows_any() -> None:
    good = replace(group("right"), rewards=(1.0,))
    bad = replace(group("wrong"), error="timeout")
    check_error_rate([good, bad], domain_names=["algebra"], max_error_rate=0.05)
    for groups, rate in (([bad], 0.05), ([good] * 9 + [bad], 0.0), ([good] * 8 + [bad] * 2, 0.05)):
        with pytest.raises(TooManyErrors):
            check_error_rate(groups, domain_names=["algebra"], max_error_rate=rate)
