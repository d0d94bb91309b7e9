"""Use one vLLM server: send it weights, and get completions from it."""

import base64
import io
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_mcpo import progress
from megatron_mcpo.data.routing import Routing
from megatron_mcpo.rollout.engine import SamplingRequest
from megatron_mcpo.rollout.server_client import TIMEOUT_SECONDS, Client, ServerError, ServerTaken
from megatron_mcpo.rollout.vllm_engine import STOP_REASONS
from megatron_mcpo.rollout.vllm_options import sampling_options
from megatron_mcpo.rollout.weight_link import Bucket, Sender
from megatron_mcpo.types import Completion, StopReason

Bucketful = list[tuple[str, Tensor]]

_DRAIN_SECONDS = 600.0
"""The longest wait for requests of others that a server still works on when a weight sync begins."""
_GENERATION_SECONDS = 3600.0
_LATE_SECONDS = 5.0
"""The wait for a server's own error once sending weights to it has failed."""
_QUICK_SECONDS = 5.0
"""The wait for a server that may not be there."""
_UNSET = "default"
"""The version of the weights of a server that was just started (vLLM 0.30.0)."""
_REASONS = {**STOP_REASONS, "abort": StopReason.ABORT}
_ROUNDING = 1e-3
"""A log-prob may be that much above 0."""


class Server:
    """One server. Its methods raise ServerError where it does not answer as it should.

    They raise ServerTaken where another trainer has sent weights to it.

    patience: seconds that it may take to say which weights it has
    """

    patience = 30.0

    def __init__(self, url: str, *, tag: str, device: torch.device, vocab_size: int, routing: Routing | None = None):
        """Keep what the server is used for.

        tag: of this trainer, the same on all of its ranks; it begins the versions of the weights that it sends
        routing: of a model of which the server must say which experts tokens were given
        """
        self._client = Client(url)
        self._tag = tag
        self._device = device
        self._vocab_size = vocab_size
        self._routing = routing
        self._sender: Sender | None = None
        self._expected: tuple[str, ...] = ()  # versions that the server may say it has; empty if any is right
        self._posting = ThreadPoolExecutor(1)

    @property
    def url(self) -> str:
        """Return the server's address."""
        return self._client.url

    def connect(self) -> None:
        """Form the group that weights are sent through; end an update that a trainer left unfinished when it died."""
        # A worker may still wait for a trainer that vanished; it gives up after TIMEOUT_SECONDS.
        workers = self._client.ask_workers("mcpo_describe", timeout=2 * TIMEOUT_SECONDS)
        if any(worker["updating"] for worker in workers):
            self._client.post("/finish_weight_update")
        address = urlsplit(self._client.url)
        if self._sender is not None:
            self._sender.close()
        self._expected = ()
        sender = Sender((address.hostname or "", address.port or 0), self._tag)
        self._alongside(
            "/init_weight_transfer_engine",
            {"init_info": asdict(sender.meeting)},
            lambda _: sender.join(len(workers), self._device),
        )
        self._sender = sender

    def announce_update(self, version: int) -> None:
        """Say that the weights are about to be replaced, first of all, so that other users learn that they are not
        theirs any more."""
        self.check_version()
        with self._becoming(f"{self._name(version)} (incomplete)") as name:
            self._client.post("/update_weight_version", {"new_version": name})

    def interrupt(self) -> None:
        """Hold new requests, and answer those under way with what there is of their completions."""
        self._client.post("/pause?mode=abort")

    def begin_update(self) -> None:
        """Hold new requests, let those under way end, and begin an update."""
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
        with self._becoming(self._name(version)) as name:
            self._client.post("/finish_weight_update", {"weight_version": name})
        self.check_version()
        if not self.reset_prefix_cache():
            raise ServerError(f"{self._client.url}: the prefix cache of the old weights could not be dropped")
        self._client.post("/resume")

    def compare(self, bucket: Bucketful) -> list[dict[str, Any]]:
        """Return what each worker found, as the fields of engine.Comparison."""
        said = {"method": "mcpo_compare", "kwargs": {"bucket": Bucket.of(bucket, self._tag).as_json()}}
        answer = self._alongside("/collective_rpc", said, lambda failed: self._send(bucket, failed))
        return list(answer["results"])

    def expect(self, version: int) -> None:
        """Say which version this trainer has sent to the server, from this rank or from another."""
        self._expected = (self._name(version),)

    def check_version(self) -> None:
        """Check that the weights are those that were sent last. Raises ServerError for others of this trainer's, or
        none, which a server has that was restarted."""
        expected = self._expected
        if not expected:
            return
        found = str(self._client.get("/weight_info", timeout=self.patience)["weight_version"])
        if found in expected or expected != self._expected:  # the latter: an update has begun or ended meanwhile
            return
        message = f"{self._client.url}: holds weights {found!r}, must hold {expected[0]!r} of this run"
        if self._is_ours(found):
            raise ServerError(f"{message} (it was restarted, or has missed an update)")
        raise ServerTaken(f"{message} (another run sends weights to it); give every run servers of its own")

    def is_there(self) -> bool:
        """Return whether the server answers at once, and no other trainer has sent weights to it."""
        with suppress(ServerError):
            self._client.get("/health", timeout=_QUICK_SECONDS)
            return self._is_ours(str(self._client.get("/weight_info", timeout=_QUICK_SECONDS)["weight_version"]))
        return False

    def check_link(self) -> None:
        """Raise ServerTaken where another trainer has connected to the server, if it still answers."""
        with suppress(ServerError):
            for worker in self._client.ask_workers("mcpo_describe", timeout=_QUICK_SECONDS):
                if worker["trainer"] not in (None, self._tag):
                    raise ServerTaken(
                        f"{self._client.url}: this server now gets its weights from {worker['trainer']}, not from "
                        f"{self._tag}; give every run servers of its own"
                    )

    def reset_prefix_cache(self) -> bool:
        """Empty the prefix cache; return whether no request still holds it."""
        return bool(self._client.post("/reset_prefix_cache")["success"])

    def complete(self, request: SamplingRequest, version: int) -> Completion:
        """Return one completion of a request, or what there is of it when an update begins (stop reason ABORT).

        version: of the weights that the server holds
        """
        asked = {"token_ids": list(request.token_ids), "sampling_params": sampling_options(request)}
        answer = self._client.post("/inference/v1/generate", asked, timeout=_GENERATION_SECONDS)
        progress.tick()
        experts = None
        try:
            (choice,) = answer["choices"]
            ids = tuple(choice["token_ids"])
            logprobs = tuple(token["logprob"] for token in (choice["logprobs"] or {"content": ()})["content"])
            reason = _REASONS[choice["finish_reason"]]
            problem = _problem(request, ids, logprobs, reason, self._vocab_size)
            if self._routing and ids:
                num_read = len(request.token_ids) + len(ids) - 1
                experts = self._routing.checked(_array(choice["routed_experts"]), num_tokens=num_read)
        except (KeyError, TypeError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
        if problem:
            raise ServerError(f"{self._client.url}: answered what no engine does ({problem})")
        return Completion(
            token_ids=ids, logprobs=logprobs, stop_reason=reason, versions=(version,) * len(ids), experts=experts
        )

    def abort(self) -> None:
        """End all calls under way, also those of other threads, with a ServerError."""
        self._client.abort()

    def close(self) -> None:
        """Disconnect; calls under way end with a ServerError."""
        self._client.abort()
        if self._sender is not None:
            self._sender.close()
        self._sender = None
        self._posting.shutdown(wait=False)

    @contextmanager
    def _becoming(self, name: str) -> Iterator[str]:
        """Expect this version or the one before while the server changes it, and then this one alone."""
        self._expected = (*self._expected, name) if self._expected else ()
        yield name
        self._expected = (name,)

    def _name(self, version: int) -> str:
        return f"{self._tag} version {version}"

    def _is_ours(self, version: str) -> bool:
        return version == _UNSET or version.startswith(f"{self._tag} version ")

    def _send(self, bucket: Bucketful, failed: Callable[[], bool]) -> None:
        if self._sender is None:
            raise RuntimeError("there is no link to it")
        self._sender.send([tensor for _, tensor in bucket], stop_when=failed)

    def _alongside(self, path: str, body: dict[str, Any], ours: Callable[[Callable[[], bool]], None]) -> Any:
        """Post a request while this side does its part, `ours`, which gets a test for the server's failure."""
        answer = self._posting.submit(self._client.post, path, body, timeout=2 * TIMEOUT_SECONDS)
        try:
            ours(lambda: answer.done() and answer.exception() is not None)
        except RuntimeError as error:
            if wait([answer], timeout=_LATE_SECONDS).done:
                answer.result()  # raise the server's own error, if it has one
            raise ServerError(f"{self._client.url}: weights can't be sent: {error}") from error
        return answer.result()


def _array(text: str | None) -> NDArray[Any] | None:
    """Return an array from a server's answer: a file of numpy in base64. Raises ValueError for anything else."""
    if text is None:
        return None
    return np.asarray(np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False))


def _problem(
    request: SamplingRequest, ids: tuple[Any, ...], logprobs: tuple[Any, ...], reason: StopReason, vocab_size: int
) -> str | None:
    """Return what is wrong with an answer: a server that is out of order must not train a model."""
    if not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        return "tokens outside the vocabulary"
    if len(logprobs) != len(ids):
        return f"{len(ids)} tokens with {len(logprobs)} log-probs"
    if not all(isinstance(logp, int | float) and -math.inf < logp <= _ROUNDING for logp in logprobs):
        return "log-probs that are not finite numbers up to 0"
    if len(ids) > request.max_tokens or (reason is StopReason.LENGTH and len(ids) < request.max_tokens):
        return f"{len(ids)} tokens of {request.max_tokens}, stop reason {reason.value}"
    if reason is StopReason.STOP and (not ids or ids[-1] not in request.stop_token_ids):
        return "a stop without a stop token"
    return None
