"""Complete responses in the background, each as a request of its own, also across weight syncs."""

import hashlib
import itertools
import math
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from queue import PriorityQueue

import torch

from megatron_mcpo.rollout.engine import NUM_SEEDS, SamplingRequest
from megatron_mcpo.types import Completion, StopReason


class Response:
    """A response that is being sampled. so_far: what there is of it; future: the whole, or why there is none"""

    def __init__(self, request: SamplingRequest, begun: Completion | None):
        assert request.num_samples == 1
        self.request = request
        self.so_far = begun or Completion(token_ids=(), logprobs=(), stop_reason=StopReason.ABORT, versions=())
        self.future: Future[Completion] = Future()

    @property
    def is_complete(self) -> bool:
        """Return whether the response has ended."""
        return self.so_far.stop_reason.is_end

    def rest(self) -> SamplingRequest:
        """Return the request for what is missing of it."""
        return continued(self.request, self.so_far)

    def add(self, piece: Completion) -> None:
        """Append the next tokens."""
        self.so_far = joined(self.so_far, piece)


class Sampler:
    """Threads that complete responses by a function, those with the smallest priority first.

    The function may return a part of a completion (stop reason ABORT); the rest is then asked for.
    """

    def __init__(self, complete: Callable[[SamplingRequest], Completion], *, num_threads: int):
        self._complete = complete
        self._waiting: PriorityQueue[tuple[tuple[float, ...], int, Response | None]] = PriorityQueue()
        self._numbers = itertools.count()
        self._threads = [
            threading.Thread(target=self._work, name=f"sampler {number}", daemon=True) for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self, request: SamplingRequest, *, priority: tuple[int, ...], begun: Completion | None = None
    ) -> Response:
        """Begin to complete a request of one sample, or go on with a response that has begun."""
        response = Response(request, begun)
        self._waiting.put((priority, next(self._numbers), response))
        return response

    def close(self) -> None:
        """Let the threads end once nothing waits: a response that is dropped would be waited for without end."""
        for _ in self._threads:
            self._waiting.put(((math.inf,), next(self._numbers), None))

    def _work(self) -> None:
        while (response := self._waiting.get()[2]) is not None:
            try:
                while not response.is_complete:
                    response.add(self._complete(response.rest()))
            except Exception as error:
                response.future.set_exception(error)
            else:
                response.future.set_result(response.so_far)


def split(request: SamplingRequest) -> list[SamplingRequest]:
    """Return a request for each of its samples; the samples of a greedy one are copies of the first."""
    count = request.num_samples if request.temperature > 0 else 1
    return [replace(request, num_samples=1, seed=request.seed + number) for number in range(count)]


def continued(request: SamplingRequest, begun: Completion) -> SamplingRequest:
    """Return the request for the rest of a completion of which some tokens are known.

    Its seed depends on that of the request and on where it goes on: with the same one, the random numbers of the first
    tokens would come again.
    """
    done = len(begun.token_ids)
    if done == 0:
        return request
    digest = hashlib.sha256(f"{request.seed} after {done}".encode()).digest()
    return replace(
        request,
        token_ids=(*request.token_ids, *begun.token_ids),
        max_tokens=request.max_tokens - done,
        seed=int.from_bytes(digest[:8]) % (NUM_SEEDS - 1),
    )


def joined(begun: Completion, piece: Completion) -> Completion:
    """Return a completion with the tokens of both, which ends as the second does."""
    experts = piece.experts
    if begun.experts is not None:  # the engine has read the tokens again, with other weights
        later = [] if experts is None else [experts[len(begun.experts) :]]
        experts = torch.cat([begun.experts, *later])
    return replace(
        piece,
        experts=experts,
        token_ids=(*begun.token_ids, *piece.token_ids),
        logprobs=(*begun.logprobs, *piece.logprobs),
        versions=(*begun.versions, *piece.versions),
    )
