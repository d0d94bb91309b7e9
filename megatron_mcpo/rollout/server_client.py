"""HTTP to vLLM servers, and whether they are the ones that a configuration wants. Imports neither torch nor vllm."""

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
"""For what a server that lives answers at once."""
_CHECK_SECONDS = 20.0
_LONGEST_MESSAGE = 500


class ServerError(RuntimeError):
    """A server did not answer, or not as it should."""


class Client:
    """Talks JSON with one server. Threads may share it.

    Every call has a connection of its own: vLLM's server hangs up on one that is idle for five seconds, and a step
    takes longer.
    """

    def __init__(self, url: str):
        self.url = url
        self._open: set[HTTPConnection] = set()

    def get(self, path: str, *, timeout: float = TIMEOUT_SECONDS) -> Any:
        """The answer. Raises ServerError where there is none within `timeout` seconds, or it is a refusal."""
        return self._call("GET", path, None, timeout)

    def post(self, path: str, body: Mapping[str, Any] | None = None, *, timeout: float = TIMEOUT_SECONDS) -> Any:
        """The answer; see `get`."""
        return self._call("POST", path, json.dumps(body or {}), timeout)

    def ask_workers(self, method: str, timeout: float = TIMEOUT_SECONDS, **arguments: Any) -> list[Any]:
        """What a method of vllm_transfer.WorkerExtension answers in every worker. Raises ServerError."""
        body = {"method": method, "kwargs": arguments}
        return list(self.post("/collective_rpc", body, timeout=timeout)["results"])

    def abort(self) -> None:
        """Hang up: calls that other threads wait in end with a ServerError."""
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
            raise ServerError(f"{self.url}: {verb} {path} was refused ({response.status}): {_message(content)}")
        return json.loads(content) if content else None


def server_problems(config: Config, model: ModelConfig) -> list[str]:
    """Why the servers of a configuration can't be its engines: value, rule and fix. Empty: they can."""
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
            problems.append(f"engine.servers: {same} and {url} are one server; leave one of them out")
        problems += [
            f"engine.servers: {url} has {name} {found}, this run needs {wanted}; start it again with "
            "mcpo serve and this configuration, or change the configuration"
            for name, found, wanted in _differences(answer, wanted_description(config, model))
        ]
    return problems


def wanted_description(config: Config, model: ModelConfig) -> dict[str, Any]:
    """What WorkerExtension.mcpo_describe must answer, but for `process` and `updating`."""
    return {
        "model": json.loads(json.dumps(asdict(model))),
        "dtype": DTYPES[config.model.dtype],
        "quantization": config.engine.quantization,
        "tensor_parallel": config.engine.tensor_parallel,
        "workers": config.engine.tensor_parallel,
        "max_model_len": config.rollout.max_prompt_tokens + config.rollout.max_response_tokens,
        "logprobs_mode": LOGPROBS_MODE,
        "device": "cpu" if vllm_on_cpu() else "cuda",
    }


def _description(url: str) -> dict[str, Any] | str:
    """What the server says of itself, or what is wrong."""
    client = Client(url)
    start = "mcpo serve"
    try:
        client.get("/health", timeout=_CHECK_SECONDS)
    except ServerError as error:
        return f"engine.servers: {error}; start it with {start}, wait until it answers, or correct the address"
    try:
        answer = client.ask_workers("mcpo_describe", timeout=_CHECK_SECONDS)[0]
    except ServerError as error:
        return f"engine.servers: {error}; start it with {start}, which prints the command it stands for"
    return dict(answer)


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, found, wanted) of what differs, the model's numbers one by one."""
    different: list[tuple[str, Any, Any]] = []
    for name, value in wanted.items():
        if isinstance(value, dict) and isinstance(found.get(name), dict):
            different += [(f"{name} {inner}", *pair) for inner, *pair in _differences(found[name], value)]
        elif found.get(name) != value:
            different.append((name, found.get(name), value))
    return different


def _message(content: bytes) -> str:
    """What a refusal says, however it says it."""
    text = content.decode(errors="replace")
    with suppress(ValueError, KeyError, TypeError):
        text = str(json.loads(text)["error"]["message"])
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_MESSAGE else text[:_LONGEST_MESSAGE] + "..."
