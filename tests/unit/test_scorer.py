"""Weighted means, penalties and `correct`; whose turn it is when answers hang; verifiers that the rules refuse.

Not covered: the verifiers themselves (test_verifiers.py, test_rewards.py, test_judge.py).
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_mcpo.config.config import Config, dump, load
from megatron_mcpo.rewards import rules
from megatron_mcpo.rewards.pool import VerifierUnavailable
from megatron_mcpo.rewards.scorer import DomainRules, Scorer
from megatron_mcpo.rewards.verifier_queue import PATIENCE, Verdict, VerifierQueue
from megatron_mcpo.types import StopReason
from tests.support.scoring import completion, config_of, function, group, scorer_of

EXACT = {"kind": "exact"}
GRADED = function("tests.support.verifiers:graded")
MISBEHAVE = function("tests.support.verifiers:misbehave")
SHORT = {"kind": "format", "pattern": ".{1,5}"}


def length(buffer_tokens: int, weight: float = 1.0) -> dict[str, Any]:
    return {"kind": "length", "buffer_tokens": buffer_tokens, "weight": weight}


def test_a_reward_is_the_weighted_mean_and_only_what_judges_says_what_is_correct() -> None:
    with scorer_of({**EXACT, "weight": 3.0}, {**SHORT, "weight": 1.0}) as scorer:
        [scored] = scorer.score([group("right", "wrong", "a very long wrong one", r"\boxed{right}")])
    assert scored.rewards == pytest.approx((1.0, 0.25, 0.0, 0.75))
    assert scored.correct == (True, False, False, True)


def test_weights_that_are_no_binary_fractions_still_add_up_to_one() -> None:
    with scorer_of({**EXACT, "weight": 0.1}, {**SHORT, "weight": 0.2}, {**MISBEHAVE, "weight": 0.7}) as scorer:
        [scored] = scorer.score([group("right")])
    assert (scored.rewards, scored.correct) == ((1.0,), (True,))


@pytest.mark.parametrize(("threshold", "correct"), [(0.5, (True, True, False)), (0.75, (True, False, False))])
def test_fractions_of_your_own_verifiers_are_kept_and_compared_with_the_threshold(
    threshold: float, correct: tuple[bool, ...]
) -> None:
    config = config_of([{"verifiers": [GRADED]}], algorithm={"pass_threshold": threshold})
    with Scorer(config) as scorer:
        [scored] = scorer.score([group("0.98", "0.5", "0.25")])
    assert (scored.rewards, scored.correct) == ((0.98, 0.5, 0.25), correct)


def test_form_alone_judges_where_nothing_else_does() -> None:
    with scorer_of(SHORT, length(2)) as scorer:
        scored = replace(group(), completions=(completion("short", num_tokens=16), completion("too long")))
        [scored] = scorer.score([scored])
    assert (scored.rewards, scored.correct) == ((0.0, 0.0), (True, False))


@pytest.mark.parametrize(
    ("tokens", "penalty"), [(0, 0.0), (12, 0.0), (13, 0.25), (14, 0.5), (15, 0.75), (16, 1.0), (17, 1.0)]
)
def test_the_penalty_for_length_is_that_of_dapo(tokens: int, penalty: float) -> None:
    config = config_of([{"verifiers": [length(4)]}], rollout={"max_response_tokens": 16})
    rules = DomainRules(config.domain[0], config.rewards, response_limit=config.response_limits[0])
    assert rules.penalty(tokens) == penalty


def test_the_limit_is_the_domains_and_penalties_are_weighted_and_added() -> None:
    config = config_of([{"verifiers": [length(4, 0.5), length(8, 0.25)], "max_response_tokens": 10}])
    rules = DomainRules(config.domain[0], config.rewards, response_limit=config.response_limits[0])
    assert rules.penalty(8) == pytest.approx(0.5 * 0.5 + 0.25 * 0.75)


def test_a_penalty_lowers_the_reward_down_to_zero_but_a_right_answer_stays_right() -> None:
    with scorer_of(EXACT, length(4, 2.0)) as scorer:
        long = replace(group(), completions=tuple(completion("right", num_tokens=n) for n in (13, 0, 14, 16)))
        [scored] = scorer.score([long])
    assert scored.rewards == pytest.approx((0.5, 1.0, 0.0, 0.0))
    assert scored.correct == (True,) * 4


def test_length_alone_is_taken_off_what_the_row_says() -> None:
    with scorer_of(length(4, 0.5)) as scorer:
        answers = tuple(completion(text, num_tokens=16) for text in ("right", "wrong"))
        [scored] = scorer.score([replace(group(verifier="exact"), completions=answers)])
    assert (scored.rewards, scored.correct) == ((0.5, 0.0), (True, False))


def test_a_response_that_was_cut_is_wrong_whatever_it_says() -> None:
    with scorer_of(EXACT, SHORT) as scorer:
        [scored] = scorer.score([replace(group(), completions=(completion("right", StopReason.LENGTH),))])
    assert (scored.rewards, scored.correct, scored.error) == ((0.0,), (False,), None)


def test_one_verifier_that_fails_costs_the_group_and_domains_have_their_own() -> None:
    config = config_of([{"verifiers": [EXACT, MISBEHAVE]}, {"verifiers": [GRADED]}], rewards={"workers": 2})
    with Scorer(config) as scorer:
        failed, good, other = scorer.score([group("raise"), group("right", index=1), group("0.5", "1", domain=1)])
    assert failed.rewards == () and "KeyError" in str(failed.error) and not failed.timed_out
    assert (good.rewards, other.rewards) == ((1.0,), (0.5, 1.0))


def test_a_verifier_that_ends_in_time_by_itself_has_timed_out_too() -> None:
    with scorer_of(function("tests.support.verifiers:give_up")) as scorer:
        [scored] = scorer.score([group("right")])
    assert scored.timed_out and "TimeoutError: somebody else is slow" in str(scored.error)


def test_an_import_does_not_count_against_the_first_answer() -> None:
    with scorer_of(function("tests.support.slow_verifier:right"), EXACT, timeout=1.0) as scorer:
        [scored] = scorer.score([group("right")])
    assert (scored.error, scored.rewards) == (None, (1.0,))


def test_what_a_row_names_is_imported_in_its_own_time_too() -> None:
    """math-verify takes seconds, which the configuration does not announce."""
    with Scorer(config_of([{}], rewards={"timeout": 1.5})) as scorer:
        scorer.wait_ready()
        [scored] = scorer.score([group("3", "4", verifier="math", answer="3")])
    assert (scored.error, scored.rewards) == (None, (1.0, 0.0))


def test_too_little_memory_for_a_verifier_is_told_before_training() -> None:
    with scorer_of({"kind": "math"}, memory_gib=0.04) as scorer, pytest.raises(VerifierUnavailable):
        scorer.wait_ready()


def test_memory_is_limited_as_configured() -> None:
    with scorer_of(MISBEHAVE, memory_gib=1.0) as scorer:
        [scored] = scorer.score([group("eat memory")])
    assert "MemoryError" in str(scored.error)


def test_a_thousand_hanging_items_of_one_domain_do_not_hold_up_the_others() -> None:
    """They stand in front of all others; the whole step waits for 4 deadlines of each of two workers, no longer."""
    config = config_of([{"verifiers": [MISBEHAVE]}, {"verifiers": [EXACT]}], rewards={"workers": 2, "timeout": 1.0})
    hanging = [group("sleep", "loop in C", index=n) for n in range(1000)]
    healthy = [group("right", "wrong", index=n, domain=1) for n in range(50)]
    with Scorer(config) as scorer:
        scorer.wait_ready()
        started = time.monotonic()
        scored = scorer.score([*hanging, *healthy])
        seconds = time.monotonic() - started
        [after] = scorer.score([group("right", index=5)])
    assert [s.rewards for s in scored[1000:]] == [(1.0, 0.0)] * 50
    assert all(s.timed_out and s.rewards == () for s in scored[:1000])
    tried = [s for s in scored[:1000] if "no answer within 1 s" in str(s.error)]
    assert 1 <= len(tried) <= 2 * PATIENCE + 1, "one more may be under way when the last one times out"
    assert "not tried" in str(scored[999].error)
    assert seconds < 60, "all thousand would take 500 s"
    assert after.rewards == (1.0,), "a step does not remember another"


def play(lanes: str, items: list[Any], hangs: set[int], *, num_workers: int = 1, max_error_rate: float = 0.05) -> str:
    """Who was asked, in order, by workers that take turns; tasks in `hangs` time out."""
    turns = VerifierQueue(lanes, items, num_workers=num_workers, max_error_rate=max_error_rate)
    asked = ""
    while taken := [n for n in (turns.take() for _ in range(num_workers)) if n is not None]:
        for number in taken:
            asked += lanes[number]
            timed_out = Verdict(error="slow", timed_out=True)
            turns.settle(number, timed_out if number in hangs else Verdict(score=1.0))
    assert len(turns.verdicts()) == len(lanes)
    return asked


def test_a_lane_gives_way_to_those_that_time_out_less() -> None:
    """After one timeout each, a and b are equals, and a comes first; its second one puts it behind b."""
    assert play("aaaaaaaabbbbcc", list(range(14)), {*range(8), 8}) == "a" + "b" + "cc" + "a" + "bbb" + "aa"


def test_a_lane_is_given_up_after_timeouts_in_a_row() -> None:
    assert play("a" * 100, list(range(100)), set(range(20, 100))) == "a" * (20 + PATIENCE)
    assert play("a" * 100, list(range(100)), set(range(20, 100)), num_workers=2) == "a" * (20 + 2 * PATIENCE)


def test_a_lane_is_given_up_when_more_time_out_than_the_run_would_stand() -> None:
    every_third = set(range(0, 300, 3))
    assert len(play("a" * 300, list(range(300)), every_third)) == 3 * 15 + 1, "5% of 300 are 15, the next is too much"
    assert len(play("a" * 300, list(range(300)), every_third, max_error_rate=0.5)) == 300
    samples = [n // 10 for n in range(300)]
    assert len(play("a" * 300, samples, {n for n in range(300) if n % 20 == 3})) < 150, (
        "5 of 30 items, not of 300 answers"
    )
    few = {5, 50, 100, 200}
    assert len(play("a" * 300, list(range(300)), few, max_error_rate=0.0)) == 300, "4 are waited for in any case"


def test_an_item_that_failed_is_done_with_for_all_its_verifiers() -> None:
    assert play("aabb", ["x", "y", "x", "y"], {0}) == "aba"


def problem_of(verifier: dict[str, Any]) -> str:
    [problem] = rules.problems(config_of([{"verifiers": [EXACT, verifier]}]))
    assert problem.startswith("domain 'd0': verifiers[1]")
    return problem


JUDGE = {"kind": "judge", "url": "http://127.0.0.1:1/v1", "model": "m"}


@pytest.mark.parametrize(
    ("verifier", "expected"),
    [
        ({"kind": "format"}, ["needs the key 'pattern'", "regular expression"]),
        ({"kind": "format", "pattern": ""}, ["needs the key 'pattern'"]),
        ({"kind": "format", "pattern": "(a"}, ["pattern = '(a'", "is not a regular expression"]),
        (
            {"kind": "exact", "pattern": "a"},
            ["pattern = 'a'", "belongs to kind 'format'", "this verifier is of kind 'exact'"],
        ),
        ({"kind": "math", "tolerance": 0.1}, ["tolerance = 0.1", "belongs to kind 'numeric'"]),
        ({"kind": "length"}, ["needs the key 'buffer_tokens'"]),
        ({"kind": "length", "buffer_tokens": 17}, ["buffer_tokens = 17", "response limit, 16"]),
        ({"kind": "function"}, ["needs the key 'function'"]),
        ({"kind": "exact", "function": "a:b"}, ["function = 'a:b'", "belongs to kind 'function'"]),
        ({"kind": "function", "function": "no_such_module:f"}, ["there is no module 'no_such_module'"]),
        ({"kind": "function", "function": "no_such.module:f"}, ["'no_such.module:f'", "can't be imported"]),
        ({"kind": "function", "function": "verifiers.inner:f"}, ["'verifiers.inner:f'", "can't be imported"]),
        ({**JUDGE, "url": None, "prompt": "good"}, ["needs the key 'url'"]),
        ({**JUDGE, "model": None, "prompt": "good"}, ["needs the key 'model'"]),
        (JUDGE, ["needs the key 'prompt'"]),
        ({**JUDGE, "prompt": "missing"}, ["prompt = 'missing'", "No such file"]),
        ({**JUDGE, "prompt": "."}, ["Is a directory"]),
        ({**JUDGE, "prompt": "no place"}, ["has no {response}"]),
        ({**JUDGE, "prompt": "binary"}, ["is not UTF-8 text"]),
        ({**JUDGE, "prompt": "good", "api_key_file": "missing"}, ["api_key_file", "No such file"]),
        ({**JUDGE, "prompt": "good", "api_key_file": "empty"}, ["api_key_file", "is empty"]),
        ({"kind": "choice", "retries": 5}, ["retries = 5", "belongs to kind 'judge'"]),
    ],
)
def test_what_does_not_fit_a_kind_is_refused_by_name(
    verifier: dict[str, Any], expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("good").write_text("Judge this: {response}")
    Path("no place").write_text("Judge this: {answer}")
    Path("binary").write_bytes(b"\xff\xfe{response}")
    Path("empty").write_text(" \n")
    problem = problem_of(verifier)
    assert all(part in problem for part in expected), problem


def test_what_fits_is_accepted_also_after_it_was_written_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompt").write_text("{question} {answer} {response}")
    Path("key").write_text("secret\n")
    verifiers = [
        {"kind": "numeric", "tolerance": 0.1},
        {**SHORT, "weight": 0.5},
        length(16),
        {**JUDGE, "prompt": "prompt", "api_key_file": "key", "retries": 0},
        function("tests.support.verifiers:record"),
        {"kind": "code"},
    ]
    config: Config = config_of([{"verifiers": verifiers}])
    assert rules.problems(config) == []
    Path("config.toml").write_text(dump(config))
    assert rules.problems(load(Path("config.toml"))) == []
