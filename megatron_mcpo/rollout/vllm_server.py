"""Use engines in other processes or on other hosts: vLLM's servers as `mcpo serve` starts them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import groupby
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from megatron_mcpo import progress
from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.rollout.engine import Comparison, EngineError, SamplingRequest, check_request, checked
from megatron_mcpo.rollout.server_client import TIMEOUT_SECONDS, Client, ServerError
from megatron_mcpo.rollout.vllm_engine import STOP_REASONS
from megatron_mcpo.rollout.vllm_options import sampling_options
from megatron_mcpo.rollout.weight_link import Bucket, Sender
from megatron_mcpo.types import Completion, StopReason
from megatron_mcpo.weights.mapping import hf_shapes

BUCKET_BYTES = 256 * 2**20
_DRAIN_SECONDS = 600.0
"""The longest wait for requests, also of others, that a server still works on when a weight sync begins."""
_GENERATION_SECONDS = 3600.0
_WATCH_SECONDS = 5.0
"""The time between checks that a server that still generates is alive."""

Bucketful = list[tuple[str, Tensor]]


class VllmServers:
    """The engine of `engine.Engine` on this rank's servers, which may be none; sampling is that of VllmEngine.

    Only this rank sends weights to them. All answers between two of its weight syncs are computed with the weights of
    the first: a server is paused for a sync, running requests end before it, and new ones wait until it is complete. A
    sync that fails leaves the server paused until some trainer completes one. A server's version of the weights begins
    with this trainer's `tag`; any other means that another trainer sends weights to it, which is an EngineError.
    """

    def __init__(
        self,
        urls: Sequence[str],
        model: ModelConfig,
        *,
        max_model_len: int,
        max_concurrent: int,
        device: torch.device,
        tag: str,
        bucket_bytes: int = BUCKET_BYTES,
    ):
        """Connect to servers that `server_client.server_problems` accepts.

        Args:
            urls: Of this rank's servers.
            model: The model that they serve.
            max_model_len: The most tokens of prompt and completion together.
            max_concurrent: The most requests that a server gets at a time.
            device: Of the tensors that will be sent.
            tag: Names this trainer. It must be unique, even among restarts of one run.
            bucket_bytes: Of the tensors that are sent together; a server holds as much beside its weights.

        Raises:
            EngineError: A server does not answer as it should.
        """
        self.version = 0
        self._shapes = hf_shapes(model)
        self._max_model_len = max_model_len
        self._bucket_bytes = bucket_bytes
        self._broken: str | None = None
        self._has_weights = False
        self._servers = [_Server(url, tag=tag, device=device) for url in urls]
        self._control = ThreadPoolExecutor(max(1, len(urls)))
        self._generating = ThreadPoolExecutor(max(1, max_concurrent * len(urls)))
        with self._fatal("connecting"):
            self._on_all(_Server.connect)

    def generate(self, requests: Sequence[SamplingRequest]) -> list[tuple[Completion, ...]]:
        """Complete every request, as engine.Engine.generate says: request i goes to server i modulo their number.

        Raises ValueError for a request that can't be served; the engine stays usable.
        """
        self._require(weights=True)
        for request in requests:
            check_request(request, self._max_model_len)
        if not requests:
            return []
        with self._fatal("generation"):
            self._on_all(_Server.prepare)
            turns = [self._servers[i % len(self._servers)] for i in range(len(requests))]
            pairs = zip(turns, requests, strict=True)
            futures = [self._generating.submit(server.complete, request, self.version) for server, request in pairs]
            self._watch(futures)
            # If the version is ours after the last answer, all answers were computed with our weights.
            self._on_all(_Server.check_version)
            return [future.result() for future in futures]

    def update(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> int:
        """Replace all weights, as engine.Engine.update says. A rank without servers consumes the tensors, too."""
        self._require(weights=False)
        arrived: dict[str, int] = {}
        with self._fatal(f"update to version {version}"):
            self._on_all(partial(_Server.begin_update, version=version))
            for bucket in self._buckets([pair] for pair in checked(named_tensors, self._shapes, arrived)):
                self._on_all(partial(_Server.load, bucket=bucket))
            self._on_all(partial(_Server.finish_update, version=version))
        self._has_weights = True
        self.version = version
        return sum(arrived.values())

    def compare(self, named_tensors: Iterable[tuple[str, Tensor]]) -> Comparison:
        """Compare weights, as VllmEngine.compare does. A rank without servers consumes the tensors, too."""
        self._require(weights=True)
        different: list[str] = []
        unread: list[str] = []
        num_tensors = 0
        with self._fatal("comparison of weights"):
            self._on_all(_Server.check_version)
            # Tensors that an engine fuses are compared together.
            for bucket in self._buckets(list(unit) for _, unit in groupby(named_tensors, key=_parent)):
                num_tensors += len(bucket)
                for workers in self._on_all(partial(_Server.compare, bucket=bucket)):
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
        self._broken = "it was closed"
        for server in self._servers:
            server.close()
        self._control.shutdown()
        self._generating.shutdown()

    def _require(self, *, weights: bool) -> None:
        if self._broken is not None:
            raise EngineError(f"the engine can't be used: {self._broken}")
        if weights and not self._has_weights:
            raise EngineError("the engine holds no weights of this trainer: call update() first")

    @contextmanager
    def _fatal(self, action: str) -> Iterator[None]:
        """Run a block of which any error makes the engine unusable."""
        try:
            yield
        except BaseException as error:
            self._broken = f"{action} failed: {error}"
            for server in self._servers:
                server.close()
            if isinstance(error, Exception):
                raise EngineError(self._broken) from error
            raise

    def _on_all[T](self, call: Callable[["_Server"], T]) -> list[T]:
        """Make a call on every server at the same time; return the results."""
        futures = [self._control.submit(call, server) for server in self._servers]
        # Raise the first failure, since the other servers may only be waiting.
        for future in wait(futures, return_when=FIRST_EXCEPTION).done:
            future.result()
        return [future.result() for future in futures]

    def _watch(self, futures: Sequence[Future[Any]]) -> None:
        """Wait for answers, and check the servers regularly: a host that vanishes closes no connection."""
        while wait(futures, timeout=_WATCH_SECONDS, return_when=FIRST_EXCEPTION).not_done:
            failed = next((future for future in futures if future.done() and future.exception()), None)
            if failed is not None:
                failed.result()
            self._on_all(_Server.check_version)
            progress.tick()  # a server that answers may decode for long; _GENERATION_SECONDS is its limit

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


class _Server:
    """One server. All methods raise ServerError."""

    def __init__(self, url: str, *, tag: str, device: torch.device):
        self._client = Client(url)
        self._tag = tag
        self._device = device
        self._sender: Sender | None = None
        self._expected: str | None = None
        self._posting = ThreadPoolExecutor(1)

    def connect(self) -> None:
        """Form the group that weights are sent through; end an update that a trainer left unfinished when it died."""
        # A worker may still wait for a trainer that vanished; it gives up after TIMEOUT_SECONDS.
        workers = self._client.ask_workers("mcpo_describe", timeout=2 * TIMEOUT_SECONDS)
        if any(worker["updating"] for worker in workers):
            self._client.post("/finish_weight_update")
        address = urlsplit(self._client.url)
        sender = Sender((address.hostname or "", address.port or 0), self._tag)
        self._alongside(
            "/init_weight_transfer_engine",
            {"init_info": asdict(sender.meeting)},
            lambda _: sender.join(len(workers), self._device),
        )
        self._sender = sender

    def begin_update(self, version: int) -> None:
        """Let running requests end, hold new ones, and begin an update."""
        if self._expected is not None:
            self.check_version()
        # First of all, so that other users of this server learn that the weights are no longer theirs.
        self._expected = f"{self._name(version)} (incomplete)"
        self._client.post("/update_weight_version", {"new_version": self._expected})
        self._client.post("/pause?mode=wait", timeout=_DRAIN_SECONDS)
        self.check_version()
        self._client.post("/start_weight_update")

    def load(self, bucket: Bucketful) -> None:
        """Send some tensors, which the server loads."""
        progress.tick()
        said = Bucket.of(bucket, self._tag).as_json()
        self._alongside("/update_weights", {"update_info": said}, lambda failed: self._send(bucket, failed))

    def finish_update(self, version: int) -> None:
        """Complete the update of all tensors and resume answering requests."""
        self.check_version()
        self._expected = self._name(version)
        self._client.post("/finish_weight_update", {"weight_version": self._expected})
        self.check_version()
        if not self._reset_prefix_cache():
            raise ServerError(f"{self._client.url}: the prefix cache of the old weights could not be dropped")
        self._client.post("/resume")

    def compare(self, bucket: Bucketful) -> list[dict[str, Any]]:
        """Return what each worker found, as the fields of engine.Comparison."""
        said = {"method": "mcpo_compare", "kwargs": {"bucket": Bucket.of(bucket, self._tag).as_json()}}
        answer = self._alongside("/collective_rpc", said, lambda failed: self._send(bucket, failed))
        return list(answer["results"])

    def check_version(self) -> None:
        """Check that the weights are those that this trainer sent last. Raises ServerError if they aren't."""
        found = self._client.get("/weight_info")["weight_version"]
        if found != self._expected:
            raise ServerError(
                f"{self._client.url}: holds weights {found!r}, must hold {self._expected!r} of this run (another run "
                "sends weights to it, or it was restarted); give every run servers of its own"
            )

    def prepare(self) -> None:
        """Empty the prefix cache, as far as others' requests allow: earlier ones must not influence the rounding."""
        self.check_version()
        self._reset_prefix_cache()

    def complete(self, request: SamplingRequest, version: int) -> tuple[Completion, ...]:
        """Return `num_samples` completions of a request."""
        asked = {"token_ids": list(request.token_ids), "sampling_params": sampling_options(request)}
        answer = self._client.post("/inference/v1/generate", asked, timeout=_GENERATION_SECONDS)
        progress.tick()
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        completions = tuple(_completion(choice, version) for choice in choices)
        return completions * (request.num_samples // len(completions))

    def close(self) -> None:
        """Disconnect; threads that wait for an answer get a ServerError."""
        self._client.abort()
        if self._sender is not None:
            self._sender.close()
        self._sender = None
        self._posting.shutdown(wait=False)

    def _name(self, version: int) -> str:
        return f"{self._tag} version {version}"

    def _reset_prefix_cache(self) -> bool:
        return bool(self._client.post("/reset_prefix_cache")["success"])

    def _send(self, bucket: Bucketful, failed: Callable[[], bool]) -> None:
        assert self._sender is not None
        self._sender.send([tensor for _, tensor in bucket], stop_when=failed)

    def _alongside(self, path: str, body: dict[str, Any], ours: Callable[[Callable[[], bool]], None]) -> Any:
        """Post a request while this side does its part, `ours`, which gets a test for the server's failure."""
        answer = self._posting.submit(self._client.post, path, body, timeout=2 * TIMEOUT_SECONDS)
        try:
            ours(lambda: answer.done() and answer.exception() is not None)
        except RuntimeError as error:
            if wait([answer], timeout=_WATCH_SECONDS).done:
                answer.result()  # raise the server's own error, if it has one
            raise ServerError(f"{self._client.url}: weights can't be sent: {error}") from error
        return answer.result()


def _parent(named_tensor: tuple[str, Tensor]) -> str:
    """Return the name of the enclosing module: `model.layers.0.mlp` for model.layers.0.mlp.up_proj.weight."""
    return ".".join(named_tensor[0].split(".")[:-2])


def _completion(choice: dict[str, Any], version: int) -> Completion:
    return Completion(
        token_ids=tuple(choice["token_ids"]),
        logprobs=tuple(token["logprob"] for token in choice["logprobs"]["content"]),
        stop_reason=STOP_REASONS.get(choice["finish_reason"], StopReason.ABORT),
        version=version,
    )
