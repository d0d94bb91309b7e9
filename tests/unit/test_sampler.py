"""Responses that are put together from pieces, which were sampled before and after a weight sync."""

import threading
from dataclasses import replace

import pytest
import torch

from megatron_mcpo.rollout.engine import NUM_SEEDS, EngineError, SamplingRequest
from megatron_mcpo.rollout.sampler import Sampler, continued, joined, split
from megatron_mcpo.types import Completion, StopReason

REQUEST = SamplingRequest(token_ids=(5, 6), num_samples=1, seed=7, max_tokens=4, stop_token_ids=(0,))


def piece(*tokens: int, reason: StopReason, version: int) -> Completion:
    return Completion(
        token_ids=tokens,
        logprobs=tuple(-float(token) for token in tokens),
        stop_reason=reason,
        versions=(version,) * len(tokens),
    )


def test_a_request_is_split_into_its_samples() -> None:
    three = replace(REQUEST, num_samples=3)
    assert split(three) == [replace(REQUEST, seed=seed) for seed in (7, 8, 9)]
    greedy = replace(three, temperature=0.0)
    assert split(greedy) == [replace(greedy, num_samples=1)]


def test_a_response_goes_on_where_it_was_with_other_random_numbers() -> None:
    asked: list[SamplingRequest] = []
    answers = [
        piece(reason=StopReason.ABORT, version=1),
        piece(11, 12, reason=StopReason.ABORT, version=1),
        piece(13, 14, reason=StopReason.LENGTH, version=2),
    ]

    def complete(request: SamplingRequest) -> Completion:
        asked.append(request)
        return answers[len(asked) - 1]

    sampler = Sampler(complete, num_threads=1)
    response = sampler.submit(REQUEST, priority=(0,))
    whole = response.future.result(timeout=20)
    sampler.close()
    assert whole == Completion(
        token_ids=(11, 12, 13, 14),
        logprobs=(-11.0, -12.0, -13.0, -14.0),
        stop_reason=StopReason.LENGTH,
        versions=(1, 1, 2, 2),
    )
    assert asked[:2] == [REQUEST, REQUEST]
    rest = replace(REQUEST, token_ids=(5, 6, 11, 12), max_tokens=2, seed=asked[2].seed)
    assert asked[2] == rest and asked[2].seed not in range(7, 12) and 0 <= asked[2].seed < NUM_SEEDS
    assert continued(REQUEST, piece(11, 12, reason=StopReason.ABORT, version=9)) == rest, "a resumed run asks the same"


def test_the_experts_of_a_token_are_those_of_the_engine_that_sampled_with_it() -> None:
    """What is read again after an interruption is given experts by other weights, which it was not sampled with."""
    first, again = torch.arange(6).view(3, 1, 2), torch.arange(100, 110).view(5, 1, 2)
    begun = replace(piece(11, 12, reason=StopReason.ABORT, version=1), experts=first)
    nothing = piece(reason=StopReason.ABORT, version=2)
    rest = replace(piece(13, 14, reason=StopReason.LENGTH, version=2), experts=again)
    whole = joined(joined(begun, nothing), rest)
    assert whole.experts is not None
    assert whole.experts.flatten().tolist() == [0, 1, 2, 3, 4, 5, 106, 107, 108, 109]
    assert joined(replace(begun, experts=None), rest).experts is again


def test_what_is_known_of_a_response_is_not_asked_for_again() -> None:
    sampler = Sampler(lambda request: piece(3, reason=StopReason.STOP, version=request.max_tokens), num_threads=1)
    begun = piece(1, 2, reason=StopReason.ABORT, version=0)
    assert sampler.submit(REQUEST, priority=(0,), begun=begun).future.result(20).versions == (0, 0, 2)
    ended = replace(begun, stop_reason=StopReason.STOP)
    assert sampler.submit(REQUEST, priority=(0,), begun=ended).future.result(20) == ended
    sampler.close()


def test_all_that_waits_when_it_is_closed_ends_with_the_error_of_the_engine() -> None:
    gate = threading.Event()

    def complete(request: SamplingRequest) -> Completion:
        gate.wait(20)
        raise EngineError("it was closed")

    sampler = Sampler(complete, num_threads=2)
    responses = [sampler.submit(replace(REQUEST, seed=seed), priority=(seed,)) for seed in range(6)]
    sampler.close()
    gate.set()
    assert [str(response.future.exception(timeout=20)) for response in responses] == ["it was closed"] * 6


def test_those_with_a_small_priority_come_first_and_an_error_is_that_of_its_response() -> None:
    gate, order = threading.Event(), []

    def complete(request: SamplingRequest) -> Completion:
        gate.wait(20)
        order.append(request.seed)
        if request.seed == 2:
            raise EngineError("no engine server")
        return piece(0, reason=StopReason.STOP, version=0)

    sampler = Sampler(complete, num_threads=1)
    first = sampler.submit(replace(REQUEST, seed=0), priority=(9,))
    while first.request.seed == 0 and sampler._waiting.qsize():
        pass  # the thread has not taken it yet
    others = [
        sampler.submit(replace(REQUEST, seed=seed), priority=(priority,)) for seed, priority in ((1, 5), (2, 1), (3, 5))
    ]
    gate.set()
    assert [others[number].future.result(20).stop_reason for number in (0, 2)] == [StopReason.STOP] * 2
    with pytest.raises(EngineError, match="no engine server"):
        others[1].future.result(20)
    assert order == [0, 2, 1, 3]
    sampler.close()
