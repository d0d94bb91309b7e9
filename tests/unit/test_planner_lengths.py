"""Responses of uneven lengths in the planner: their distribution, and rollouts against a simulation of their course.

Not covered: whether a task's lengths are like that.
"""

import json
import random
import statistics
from dataclasses import replace

import pytest

from megatron_mcpo.cli.main import main
from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.planner import hardware, planning, timing
from megatron_mcpo.planner.lengths import Lengths
from tests.unit.test_planner import config_for, model_of

LIMIT, MEAN = 2000, 600


def drawn(lengths: Lengths, number: int, seed: int) -> list[int]:
    """Return lengths that are drawn from the distribution."""
    source = random.Random(seed)
    found = []
    for _ in range(number):
        chance, tokens = source.random(), 1
        while tokens < lengths.limit and chance < lengths.share_longer(tokens):
            tokens += 1
        found.append(tokens)
    return found


@pytest.mark.parametrize(("limit", "mean"), [(3072, 1024), (3072, 3000), (100, 1), (7, 6.5), (1, 1), (3072, 3072)])
def test_a_distribution_has_its_mean_and_its_limit(limit: int, mean: float) -> None:
    lengths = Lengths(limit, mean)
    assert sum(lengths.share_longer(tokens) for tokens in range(limit)) == pytest.approx(mean)
    shares = [lengths.share_longer(tokens) for tokens in range(limit + 1)]
    assert shares[0] == 1 and shares[-1] == 0 and shares == sorted(shares, reverse=True)
    assert lengths.any_longer(limit // 2, 50) >= lengths.share_longer(limit // 2)


@pytest.mark.parametrize("mean", [0, 101, -5])
def test_a_mean_that_responses_can_not_have_is_refused(mean: int) -> None:
    with pytest.raises(ConfigError, match=rf"--mean-response {mean}: must be 1 \.\. .* = 100"):
        Lengths(100, mean)


def test_a_rollout_takes_as_long_as_in_a_simulation() -> None:
    """Token by token: every engine decodes what still goes on in it, and the rollout ends with the last response."""
    engine = {"tensor_parallel": 8, "max_concurrent": 1024}
    limits = {"max_prompt_tokens": 100, "max_response_tokens": LIMIT}
    config = config_for("qwen3-0.6b", engine=engine, rollout=limits, batch={"micro_batch_tokens": 4096})
    model, gpu = model_of("qwen3-0.6b"), hardware.H100
    plan = planning.plan(config, model, gpu, 2, mean_response=MEAN)
    assert (plan.engine.engines, plan.engine.sequences) == (2, plan.shape.rollouts // 2)
    seconds, longest = timing.rollout_seconds(config, model, gpu, plan.expected, plan.lengths, plan.engine)

    courses = []
    for seed in range(5):
        times = []
        for number in range(2):
            lengths = drawn(plan.lengths, plan.engine.sequences, seed=2 * seed + number)
            going = [sum(length > token for length in lengths) for token in range(max(lengths))]
            times.append(
                sum(timing.decode_seconds(config, model, gpu, plan.expected, plan.engine, count) for count in going)
            )
        courses.append(max(times))
    assert seconds == pytest.approx(statistics.fmean(courses), rel=0.05)

    full = timing.decode_seconds(config, model, gpu, plan.expected, plan.engine, plan.engine.sequences)
    assert longest < LIMIT * full * 1.0001 and seconds < longest


def test_all_of_the_greatest_length_is_the_mean_that_is_the_limit() -> None:
    config, model = config_for("qwen3-0.6b"), model_of("qwen3-0.6b")
    equal = planning.plan(config, model, hardware.H100, 1)
    limit = config.rollout.max_response_tokens
    assert planning.plan(config, model, hardware.H100, 1, mean_response=limit) == equal
    half = planning.plan(config, model, hardware.H100, 1, mean_response=limit // 2)
    assert half.ranks == equal.ranks, "memory is for the longest"
    for phase in ("rollout", "score", "update"):
        assert half.seconds[phase] < equal.seconds[phase]


def test_long_responses_hold_up_steps_that_may_not_be_late() -> None:
    """With more staleness a response may take more steps to end."""
    servers = {"tensor_parallel": 1, "servers": ["http://a:1", "http://b:1", "http://c:1", "http://d:1"]}
    limits = {"max_response_tokens": 30000, "max_prompt_tokens": 100}
    steps = {}
    for staleness in (1, 2, 8):
        config = config_for(
            "qwen3-0.6b",
            engine=servers | {"staleness": staleness, "max_concurrent": 1024},
            rollout=limits,
            batch={"micro_batch_tokens": 32768, "prompts": 16},
        )
        plan = planning.plan(config, model_of("qwen3-0.6b"), replace(hardware.H100, per_node=8), 1, mean_response=500)
        seconds = plan.seconds
        steps[staleness] = seconds["step"]
        assert seconds["step"] >= max(seconds["rollout"], seconds["score"] + seconds["update"]) + seconds["sync"]
    assert steps[1] > steps[2] > steps[8]


def test_the_command_takes_a_mean(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "examples/qwen3_32b/h100_32.toml", "--gpu", "h100", "--nodes", "4", "--mean-response", "1000"]
    assert main(words) == 0
    assert "responses of 1000 on average, geometrically distributed up to 3072" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mean_response"] == 1000
    assert main([*words[:-1], "4000"]) == 2
    assert "must be 1 .. rollout.max_response_tokens = 3072" in capsys.readouterr().err
