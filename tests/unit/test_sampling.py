"""What a sampling request is made of: its seeds, and which requests an engine takes.

Not covered here: what vLLM samples with them (test_vllm_engine.py), replaced groups (test_resample.py).
"""

from typing import Any

import pytest

from megatron_mcpo.rollout.engine import NUM_SEEDS, SamplingRequest, check_request
from megatron_mcpo.trainer.collector import Sampling
from megatron_mcpo.trainer.dynamic_sampling import num_seeds

PROMPTS, SIZES = 512, [16, 4]


@pytest.mark.parametrize("run_seed", [0, 7, 1_764_000_000, 2**62, 2**63 - 1])
def test_seeds_are_different_and_small_enough_whatever_the_runs_seed(run_seed: int) -> None:
    """A run's seed is often the time: times the seeds of a step this was more than 64 bits at 8,192 rollouts."""
    per_step = num_seeds(PROMPTS, SIZES, rounds=1)
    seeds = set()
    for step in (1, 2, 999):
        seed = (run_seed * 1_000_003 + step) * per_step  # as Trainer.collect
        sampling = Sampling(num_samples=SIZES, max_tokens=[8, 8], temperature=1.0, seed=seed)
        for position in range(PROMPTS):
            first = sampling.first_seed(position)
            request = SamplingRequest(token_ids=[1], num_samples=16, seed=first, max_tokens=4)
            check_request(request, 8)
            seeds |= set(range(first, first + 16))
    assert len(seeds) == 3 * PROMPTS * 16 and max(seeds) < NUM_SEEDS


def test_seeds_of_small_runs_are_consecutive() -> None:
    sampling = Sampling(num_samples=[4, 2], max_tokens=[8, 8], temperature=1.0, seed=100)
    assert [sampling.first_seed(position) for position in range(3)] == [100, 104, 108]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"token_ids": []}, "0 prompt tokens"),
        ({"num_samples": 0}, "num_samples = 0"),
        ({"max_tokens": 0}, "max_tokens = 0"),
        ({"max_tokens": 8}, "must not exceed the engine's max_model_len = 8"),
        ({"temperature": -1.0}, "temperature = -1.0: must be 0 or 0.01 to 2.0"),
        ({"temperature": 0.009}, "temperature = 0.009: must be 0 or 0.01 to 2.0"),
        ({"temperature": 2.1}, "temperature = 2.1: must be 0 or 0.01 to 2.0"),
        ({"temperature": float("nan")}, "temperature = nan: must be 0 or 0.01 to 2.0"),
        ({"seed": -1}, "seed = -1: must be at least 0"),
        ({"seed": NUM_SEEDS - 1}, "leave room for 2 seeds below 2**63"),
    ],
)
def test_requests_that_vllm_would_serve_otherwise_are_refused(changes: dict[str, Any], words: str) -> None:
    request = {"token_ids": [1], "num_samples": 2, "seed": NUM_SEEDS - 2, "max_tokens": 7, "temperature": 0.01}
    check_request(SamplingRequest(**request), 8)
    check_request(SamplingRequest(**(request | {"temperature": 0.0})), 8)
    with pytest.raises(ValueError, match=r"correct the request|build the engine") as refused:
        check_request(SamplingRequest(**(request | changes)), 8)
    assert words in str(refused.value)
