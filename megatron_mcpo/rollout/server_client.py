"""Talk to vLLM servers over HTTP, and check that they serve what a configuration needs. Imports no torch, no vllm."""

import json
import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import urlsplit

from megatron_mcpo.config.config import Config
from megatron_mcpo.config.environment import vllm_on_cpu
from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.rollout.vllm_options import DTYPES, LOGPROBS_MODE

TIMEOUT_SECONDS = 60.0
"""The longest wait for what a running server answers at once."""
_CHECK_SECONDS = 20.0
_LONGEST_MESSAGE = 500


class ServerError(RuntimeError):
    """The error of a server that did not answer, or not as it should."""


class ServerRefused(ServerError):
    """The error of a server that answered that it does not do what was asked."""


class ServerTaken(RuntimeError):
    """The error of a server that another trainer uses: two can't share one."""


class Client:
    """An HTTP client that exchanges JSON with one server. Threads may share it.

    Every call opens a connection: vLLM's server closes one that is idle for five seconds, and a step takes longer.
    """

    def __init__(self, url: str):
        self.url = url
        self._open: set[HTTPConnection] = set()

    def get(self, path: str, *, timeout: float = TIMEOUT_SECONDS) -> Any:
        """Return the answer to a GET. Raises ServerError after `timeout` seconds without one, or for a refusal."""
        return self._call("GET", path, None, timeout)

    def post(self, path: str, body: Mapping[str, Any] | None = None, *, timeout: float = TIMEOUT_SECONDS) -> Any:
        """Return the answer to a POST; see `get`."""
        return self._call("POST", path, json.dumps(body or {}), timeout)

    def ask_workers(self, method: str, timeout: float = TIMEOUT_SECONDS, **arguments: Any) -> list[Any]:
        """Call a method of vllm_transfer.WorkerExtension in every worker; return the answers. Raises ServerError."""
        body = {"method": method, "kwargs": arguments}
        return list(self.post("/collective_rpc", body, timeout=timeout)["results"])

    def abort(self) -> None:
        """Close all connections, so that calls in other threads end with a ServerError."""
        for connection in list(self._open):
            with suppress(OSError, AttributeError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    def _call(self, verb: str, path: str, body: str | None, timeout: float) -> Any:
        address = urlsplit(self.url)
        connection = HTTPConnection(address.hostname or "", address.port, timeout=timeout)
        self._open.add(connection)
        try:
            connection.request(verb, path, body, {"Content-Type": "application/json"} if body else {})
            response = connection.getresponse()
            content = response.read()
        except (OSError, HTTPException) as error:
            reason = str(error) or type(error).__name__
            raise ServerError(f"{self.url}: no answer to {verb} {path}: {reason}") from error
        finally:
            self._open.discard(connection)
            connection.close()
        if response.status != 200:
            raise ServerRefused(f"{self.url}: {verb} {path} was refused ({response.status}): {_message(content)}")
        try:
            return json.loads(content) if content else None
        except ValueError as error:
            raise ServerError(f"{self.url}: answered {verb} {path} with something else than JSON") from error


def server_problems(config: Config, model: ModelConfig) -> list[str]:
    """Ask the servers of a configuration; return why they can't be its engines, a line (value, rule, fix) each."""
    urls = config.engine.servers
    with ThreadPoolExecutor(max(1, len(urls))) as pool:
        answers = list(pool.map(_description, urls))
    problems = [answer for answer in answers if isinstance(answer, str)]
    seen: dict[str, str] = {}
    for url, answer in zip(urls, answers, strict=True):
        if isinstance(answer, str):
            continue
        same = seen.setdefault(answer["process"], url)
        if same != url:
            problems.append(
                f"engine.servers: {same} and {url} must be different servers, but are the same; leave one of them out"
            )
        problems += _misfits(url, answer, wanted_description(config, model))
    return problems


def misfits(url: str, wanted: Mapping[str, Any]) -> list[str]:
    """Return why a server that was restarted can't be an engine any more. Raises ServerError if it does not answer."""
    return _misfits(url, Client(url).ask_workers("mcpo_describe", timeout=_CHECK_SECONDS)[0], wanted)


def _misfits(url: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    return [
        f"engine.servers: {url} has {name} = {value}, must have {right}; restart it with mcpo serve and this "
        "configuration, or change the configuration"
        for name, value, right in _differences(found, wanted)
    ]


def wanted_description(config: Config, model: ModelConfig) -> dict[str, Any]:
    """Return what WorkerExtension.mcpo_describe must answer, except for `process`, `updating` and `trainer`."""
    return {
        "model": json.loads(json.dumps(asdict(model))),
        "dtype": DTYPES[config.model.dtype],
        "quantization": config.engine.quantization,
        "tensor_parallel": config.engine.tensor_parallel,
        "workers": config.engine.tensor_parallel,
        "max_model_len": config.rollout.max_prompt_tokens + config.rollout.max_response_tokens,
        "logprobs_mode": LOGPROBS_MODE,
        "routed_experts": config.model.replays_engine,
        "options": json.dumps(config.engine.options, sort_keys=True),
        "device": "cpu" if vllm_on_cpu() else "cuda",
    }


def _description(url: str) -> dict[str, Any] | str:
    """Return a server's description of itself, or a problem as text."""
    client = Client(url)
    try:
        client.get("/health", timeout=_CHECK_SECONDS)
    except ServerError as error:
        return f"engine.servers: {error}; start it with mcpo serve, wait until it answers, or correct the address"
    try:
        answer = client.ask_workers("mcpo_describe", timeout=_CHECK_SECONDS)[0]
    except ServerError as error:
        return f"engine.servers: {error}; start it with mcpo serve, which prints the command that it runs"
    return dict(answer)


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (name, found, wanted) of everything that differs, the model's numbers one by one."""
    different: list[tuple[str, Any, Any]] = []
    for name, value in wanted.items():
        if isinstance(value, dict) and isinstance(found.get(name), dict):
            different += [(f"{name} {inner}", *pair) for inner, *pair in _differences(found[name], value)]
        elif found.get(name) != value:
            different.append((name, found.get(name), value))
    return different


def _message(content: bytes) -> str:
    """Return the text of a refusal, which is JSON or plain."""
    text = content.decode(errors="replace")
    if text.lstrip().startswith("<"):
        return "its answer is a web page, so this is another program than mcpo serve"
    with suppress(ValueError, KeyError, TypeError):
        text = str(json.loads(text)["error"]["message"])
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_MESSAGE else text[:_LONGEST_MESSAGE] + "..."
