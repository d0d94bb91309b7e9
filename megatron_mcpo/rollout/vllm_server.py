"""Use engines in other processes or on other hosts: vLLM's servers as `mcpo serve` starts them."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_mcpo import progress
from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.data.routing import Routing
from megatron_mcpo.rollout.engine import Comparison, EngineError, SamplingRequest, check_request, checked
from megatron_mcpo.rollout.fleet import Fleet, Member
from megatron_mcpo.rollout.sampler import Response, Sampler, split
from megatron_mcpo.rollout.server import Bucketful, Server
from megatron_mcpo.rollout.server_client import ServerError, ServerRefused, ServerTaken, misfits
from megatron_mcpo.types import Completion, StopReason
from megatron_mcpo.weights.mapping import hf_shapes

BUCKET_BYTES = 256 * 2**20
WATCH_SECONDS = 5.0
"""The time between two looks at the servers: a host that vanishes closes no connection."""
_POLL_SECONDS = 0.1
_NOTHING = Completion(token_ids=(), logprobs=(), stop_reason=StopReason.ABORT, versions=())


class VllmServers:
    """The engine of `engine.Engine` on servers; sampling is that of VllmEngine. Threads complete the requests.

    Only one rank, their owner, sends weights to a server. Before it does, the requests of this trainer that are under
    way there end: with the weights that they began with, or, with in_flight = "keep", at once, and what is missing is
    asked for again after the sync. So all tokens between two syncs are computed with the weights of the first.

    A server that does not answer as it should is not used any more: its requests go to the rank's others, or, if it
    has none, to those of other ranks. It is used again after the next sync before which it is there. A server that
    holds weights of another trainer, whose version does not begin with this one's `tag`, is an EngineError. A sync that
    fails leaves a server paused until some trainer completes one.
    """

    def __init__(
        self,
        urls: Sequence[str],
        model: ModelConfig,
        *,
        others: Sequence[str] = (),
        max_model_len: int,
        max_concurrent: int,
        in_flight: Literal["wait", "keep"],
        wanted: Mapping[str, Any],
        device: torch.device,
        tag: str,
        routed_experts: bool = False,
        bucket_bytes: int = BUCKET_BYTES,
    ):
        """Connect to servers that `server_client.server_problems` accepts.

        Args:
            urls: Of this rank's servers.
            model: The model that they serve.
            others: Of the servers that other ranks of this trainer own.
            max_model_len: The most tokens of prompt and completion together.
            max_concurrent: The most requests that a server gets at a time.
            in_flight: What becomes of requests under way when weights are sent.
            wanted: What servers that were restarted must say of themselves (server_client.wanted_description).
            device: Of the tensors that will be sent.
            tag: Names this trainer on all its ranks. It must be unique, even among restarts of one run.
            routed_experts: Whether completions say which experts their tokens were given.
            bucket_bytes: Of the tensors that are sent together; a server holds as much beside its weights.

        Raises:
            EngineError: A server does not answer as it should.
        """
        self.version = 0
        self._shapes = hf_shapes(model)
        self._max_model_len = max_model_len
        self._in_flight = in_flight
        self._wanted = wanted
        self._bucket_bytes = bucket_bytes
        self._broken: str | None = None
        self._has_weights = False
        routing = Routing.of(model) if routed_experts else None
        make = partial(Server, tag=tag, device=device, vocab_size=model.vocab_size, routing=routing)
        own = [make(url) for url in urls]
        self._fleet = Fleet(own, [make(url) for url in others], limit=max_concurrent)
        self._control = ThreadPoolExecutor(max(1, len(urls)))
        self._closed = threading.Event()
        # What servers of this rank work on at a time, also where others step in for them.
        self._sampler = Sampler(self._complete, num_threads=max_concurrent * len(urls))
        with self._fatal("connecting"):
            list(self._control.map(Server.connect, own))
        threading.Thread(target=self._watch, name="watching engine servers", daemon=True).start()

    @property
    def num_live(self) -> int:
        """Return how many of this rank's servers answer and hold its weights."""
        return len(self._fleet.live) if self._broken is None else 0

    def busy_seconds(self) -> list[float]:
        """Return for how long each of this rank's servers has had requests since the start."""
        return self._fleet.busy_seconds()

    def reasons(self) -> list[str]:
        """Return why servers of this rank are not used, a line each."""
        return self._fleet.reasons

    def news(self) -> list[str]:
        """Return what a user should know of the servers since the last call."""
        return self._fleet.news()

    def any_returns(self) -> bool:
        """Return whether one of this rank's servers that were lost is there again."""
        return any(self._control.map(self._is_usable, self._fleet.lost))

    @property
    def num_answers(self) -> int:
        """Return how many requests servers have answered to this rank since the start."""
        return self._fleet.answers

    def submit(
        self, request: SamplingRequest, *, priority: tuple[int, ...], begun: Completion | None = None
    ) -> Response:
        """Begin to complete a request of one sample, those of a small priority first; threads do the work.

        begun: what is known of the completion already
        Raises ValueError for a request that can't be served, EngineError where there are no weights.
        """
        self._require(weights=True)
        check_request(request, self._max_model_len)
        return self._sampler.submit(request, priority=priority, begun=begun)

    def prepare(self) -> None:
        """Empty the prefix caches, as far as requests allow: earlier ones must not influence the rounding."""
        self._require(weights=True)
        self._on_live(Server.reset_prefix_cache)

    def check_versions(self) -> None:
        """Check that all answers so far come from this trainer's weights. Raises EngineError where they don't."""
        self._require(weights=True)
        with self._fatal("generation"):
            self._on_live(Server.check_version)

    def generate(self, requests: Sequence[SamplingRequest]) -> list[tuple[Completion, ...]]:
        """Complete every request, as engine.Engine.generate says. Raises EngineError also when no server answers."""
        self._require(weights=True)
        for request in requests:
            check_request(request, self._max_model_len)
        if not requests:
            return []
        self.prepare()
        responses = [
            [self.submit(single, priority=(number,)) for single in split(request)]
            for number, request in enumerate(requests)
        ]
        with self._fatal("generation"):
            for response in (each for group in responses for each in group):
                self._wait_for(response)
            self._on_live(Server.check_version)  # the weights of the last answer are then those of the first
        return [
            tuple(response.future.result() for response in group) * (request.num_samples // len(group))
            for request, group in zip(requests, responses, strict=True)
        ]

    def update(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> int:
        """Replace all weights, as engine.Engine.update says. A rank without servers consumes the tensors, too.

        A server that fails is left out; `num_live` says how many have the weights.
        """
        self._require(weights=False)
        arrived: dict[str, int] = {}
        with self._fatal(f"update to version {version}"):
            self._fleet.hold()
            self._reconnect()
            self._on_live(partial(Server.announce_update, version=version))
            for member in self._fleet.live:
                self._let_end(member)
            self._on_live(Server.begin_update)
            for bucket in self._buckets([pair] for pair in checked(named_tensors, self._shapes, arrived)):
                self._on_live(partial(Server.load, bucket=bucket))
            self._on_live(partial(Server.finish_update, version=version))
        self._has_weights = True
        self.version = version
        self._fleet.release(version)
        return sum(arrived.values())

    def compare(self, named_tensors: Iterable[tuple[str, Tensor]]) -> Comparison:
        """Compare weights, as VllmEngine.compare does. A rank without servers consumes the tensors, too."""
        self._require(weights=True)
        different: list[str] = []
        unread: list[str] = []
        num_tensors = 0
        with self._fatal("comparison of weights"):
            self._on_live(Server.check_version)
            # Tensors that an engine fuses are compared together.
            for bucket in self._buckets(list(unit) for _, unit in groupby(named_tensors, key=_parent)):
                num_tensors += len(bucket)
                for workers in self._on_live(partial(Server.compare, bucket=bucket)):
                    different += [name for worker in workers for name in worker["different"]]
                    unread += [name for worker in workers for name in worker["unread"]]
        return Comparison(
            different=tuple(dict.fromkeys(different)), unread=tuple(dict.fromkeys(unread)), num_tensors=num_tensors
        )

    def sleep(self) -> None:
        """Do nothing: the servers have memory of their own."""

    def wake(self) -> None:
        """Do nothing: there is nothing to undo."""

    def close(self) -> None:
        """Disconnect. The servers keep running with the weights they have; every later call raises EngineError."""
        self._end("it was closed")
        self._control.shutdown()

    def _complete(self, request: SamplingRequest) -> Completion:
        """Return a completion, or a part of it, from whichever server answers. Raises EngineError at the end."""
        member, version = self._fleet.take()
        answered = False
        try:
            piece = member.server.complete(request, version)
            if not member.own:  # whose owner may have begun an update meanwhile
                member.server.check_version()
            answered = True
        except ServerRefused as error:
            if member.server.is_there() and not self._closed.is_set():
                raise  # it will refuse again
            self._fleet.drop(member, error)
            return _NOTHING
        except ServerError as error:
            self._fleet.drop(member, error)
            return _NOTHING
        finally:
            self._fleet.give_back(member, answered=answered)
        return piece

    def _wait_for(self, response: Response) -> None:
        """Wait for a response. Raises what its thread raised, or EngineError where no server is left."""
        while wait([response.future], timeout=_POLL_SECONDS).not_done:
            if self._fleet.is_starved:
                raise EngineError("; ".join(self._fleet.reasons) or "no engine server answers")
        response.future.result()

    def _let_end(self, member: Member) -> None:
        """Wait until none of this rank's requests is under way at a server. A request may arrive while it is paused,
        and would wait for the new weights: therefore again and again."""
        while member.lost is None and not self._fleet.wait_idle(member, seconds=0.0):
            try:
                if self._in_flight == "keep":
                    member.server.interrupt()
            except ServerError as error:
                self._fleet.drop(member, error)
            self._fleet.wait_idle(member, seconds=_POLL_SECONDS if self._in_flight == "keep" else 1.0)
            progress.tick()  # the watching thread sees to it that this ends

    def _reconnect(self) -> None:
        """Connect again to servers that were lost and are there. One that fails stays lost."""
        for member in self._fleet.lost:
            try:
                if self._is_usable(member):
                    member.server.connect()
                    self._fleet.restore(member)
            except ServerError as error:
                self._fleet.drop(member, error)

    def _is_usable(self, member: Member) -> bool:
        """Return whether a lost server is there again, as it was; one that was started otherwise is refused."""
        try:
            if not member.server.is_there():
                return False
            problems = misfits(member.server.url, self._wanted)
        except ServerError:
            return False
        if problems:
            self._fleet.refuse(member, "; ".join(problems))
        return not problems

    def _watch(self) -> None:
        """Look at the servers regularly until `close`. A thread of its own."""
        with ThreadPoolExecutor(max(1, self._fleet.size)) as pool:
            while not self._closed.wait(WATCH_SECONDS):
                if self._has_weights:
                    list(pool.map(self._look_at, self._fleet.watched))

    def _look_at(self, member: Member) -> None:
        try:
            member.server.check_version()
        except ServerTaken as error:
            self._end(str(error))
        except Exception as error:
            self._fleet.drop(member, error)
        else:
            if not member.own:
                self._fleet.restore(member)

    def _require(self, *, weights: bool) -> None:
        if self._broken is not None:
            raise EngineError(f"the engine can't be used: {self._broken}")
        if weights and not self._has_weights:
            raise EngineError("the engine holds no weights of this trainer: call update() first")

    def _end(self, reason: str) -> None:
        self._broken = self._broken or reason
        self._closed.set()
        self._fleet.end(f"the engine can't be used: {reason}")
        self._sampler.close()
        self._fleet.disconnect()

    @contextmanager
    def _fatal(self, action: str) -> Iterator[None]:
        """Run a block of which any error makes the engine unusable."""
        try:
            yield
        except BaseException as error:
            self._end(f"{action} failed: {error}")
            if isinstance(error, Exception):
                raise EngineError(self._broken) from error
            raise

    def _on_live[T](self, call: Callable[[Server], T]) -> list[T]:
        """Make a call on every own server that answers, at the same time; return the results of those that do it."""
        calls = [(member, self._control.submit(call, member.server)) for member in self._fleet.live]
        results = []
        for member, future in calls:
            try:
                results.append(future.result())
            except ServerError as error:
                member.server.check_link()
                if isinstance(error, ServerRefused) and member.server.is_there():
                    raise  # it will refuse again
                self._fleet.drop(member, error)
        return results

    def _buckets(self, units: Iterable[Bucketful]) -> Iterator[Bucketful]:
        """Divide units of tensors into buckets without dividing a unit."""
        bucket: Bucketful = []
        size = 0
        for unit in units:
            added = sum(tensor.nbytes for _, tensor in unit)
            if bucket and size + added > self._bucket_bytes:
                yield bucket
                bucket, size = [], 0
            bucket += unit
            size += added
        if bucket:
            yield bucket


def _parent(named_tensor: tuple[str, Tensor]) -> str:
    """Return the name of the enclosing module: `model.layers.0.mlp` for model.layers.0.mlp.up_proj.weight."""
    return ".".join(named_tensor[0].split(".")[:-2])
