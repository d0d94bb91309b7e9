"""What a server may answer, and what becomes of one that does not: no real server, but a real HTTP one.

Not covered: real engines (tests/system/test_vllm_server.py, test_asynchronous.py).
"""

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch

from megatron_mcpo.data.routing import Routing
from megatron_mcpo.rollout.engine import EngineError, SamplingRequest
from megatron_mcpo.rollout.fleet import Fleet
from megatron_mcpo.rollout.server import Server
from megatron_mcpo.rollout.server_client import ServerError, ServerRefused, ServerTaken, misfits
from megatron_mcpo.types import Completion, StopReason

REQUEST = SamplingRequest(token_ids=(5, 6), num_samples=1, seed=7, max_tokens=3, stop_token_ids=(0,))
VOCAB = 50


def choice(*tokens: Any, reason: str = "length", logprobs: list[Any] | None = None) -> dict[str, Any]:
    numbers = [-0.5] * len(tokens) if logprobs is None else logprobs
    return {
        "index": 0,
        "token_ids": list(tokens),
        "finish_reason": reason,
        "logprobs": {"content": [{"logprob": number} for number in numbers]},
    }


class Answering(BaseHTTPRequestHandler):
    """Answers every path with what the server has for it: JSON, a status, or what a function returns."""

    server: Any

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        answer = self.server.answers[self.path.partition("?")[0]]
        answer = answer() if callable(answer) else answer
        if isinstance(answer, int):
            self.send_error(answer)  # with a web page, as other programs do
            return
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = _answer

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


@contextmanager
def answering(*, routing: Routing | None = None, **answers: Any) -> Iterator[tuple[Server, dict[str, Any]]]:
    """Provide a client of a server, whose answers can be changed. generate, weights: of the paths that are used most"""
    paths = {"generate": "/inference/v1/generate", "weights": "/weight_info"}
    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as http:
        own: Any = http
        own.answers = {"/health": {}, **{paths.get(name, f"/{name}"): answer for name, answer in answers.items()}}
        threading.Thread(target=http.serve_forever, daemon=True).start()
        server = Server(
            f"http://127.0.0.1:{http.server_port}",
            tag="ours",
            device=torch.device("cpu"),
            vocab_size=VOCAB,
            routing=routing,
        )
        server.expect(3)
        yield server, own.answers
        server.close()
        http.shutdown()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (choice(7, 8, 9), StopReason.LENGTH),
        (choice(7, 0, reason="stop"), StopReason.STOP),
        (choice(7, reason="abort"), StopReason.ABORT),
        (choice(reason="abort"), StopReason.ABORT),
        (choice(reason="abort") | {"logprobs": None}, StopReason.ABORT),
    ],
)
def test_what_an_engine_answers_is_a_completion(answer: dict[str, Any], expected: StopReason) -> None:
    with answering(generate={"choices": [answer]}) as (server, _):
        tokens = tuple(answer["token_ids"])
        assert server.complete(REQUEST, 3) == Completion(
            token_ids=tokens, logprobs=(-0.5,) * len(tokens), stop_reason=expected, versions=(3,) * len(tokens)
        )


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ({"choices": [choice(7, VOCAB, 9)]}, "tokens outside the vocabulary"),
        ({"choices": [choice(7, "8", 9)]}, "tokens outside the vocabulary"),
        ({"choices": [choice(7, 8, 9, logprobs=[-1.0, -1.0])]}, "3 tokens with 2 log-probs"),
        ({"choices": [choice(7, 8, 9, logprobs=[-1.0, 0.1, -1.0])]}, "log-probs that are not finite numbers up to 0"),
        ({"choices": [choice(7, 8, 9, logprobs=[-1.0, None, -1.0])]}, "log-probs that are not finite numbers up to 0"),
        ({"choices": [choice(7, 8, 9, logprobs=[-1.0, float("nan"), -1.0])]}, "log-probs that are not finite"),
        ({"choices": [choice(7, 8)]}, "2 tokens of 3, stop reason length"),
        ({"choices": [choice(7, 8, 9, 10)]}, "4 tokens of 3, stop reason length"),
        ({"choices": [choice(7, 8, reason="stop")]}, "a stop without a stop token"),
        ({"choices": [choice(7, 8, 9, reason="whatever")]}, "KeyError: 'whatever'"),
        ({"choices": []}, "ValueError"),
        ({"choices": [choice(7, 8, 9)] * 2}, "ValueError"),
        ({"error": "none"}, "KeyError: 'choices'"),
        ([], "TypeError"),
        (None, "TypeError"),
        (b"<html>", "answered POST /inference/v1/generate with something else than JSON"),
    ],
)
def test_anything_else_is_an_error_and_trains_nothing(answer: Any, problem: str) -> None:
    with answering(generate=answer) as (server, _), pytest.raises(ServerError) as caught:
        server.complete(REQUEST, 3)
    assert problem in str(caught.value) and server.url in str(caught.value)


ROUTING = Routing(num_layers=2, per_token=2, count=4)
EXPERTS = np.array([[[0, 1], [3, 2]], [[1, 3], [0, 2]], [[2, 1], [1, 0]], [[3, 0], [2, 3]]], dtype=np.uint8)
"""Of two prompt tokens and all response tokens but the last."""


def test_experts_come_with_the_completion_where_they_are_asked_for() -> None:
    answer = choice(7, 8, 9) | {"routed_experts": as_vllm_does(EXPERTS)}
    with answering(routing=ROUTING, generate={"choices": [answer]}) as (server, answers):
        found = server.complete(REQUEST, 3).experts
        assert found is not None and found.dtype is torch.uint8 and found.tolist() == EXPERTS.tolist()
        answers["/inference/v1/generate"] = {"choices": [choice(reason="abort")]}
        assert server.complete(REQUEST, 3).experts is None, "nothing was sampled"


@pytest.mark.parametrize(
    ("experts", "problem"),
    [
        (None, "integers of [4, 2, 2], but says nothing"),
        (EXPERTS[1:], "integers of [4, 2, 2], but says uint8 of [3, 2, 2]"),
        (EXPERTS.astype(np.float32), "but says float32"),
        (
            np.where(EXPERTS == 3, 4, EXPERTS),
            "token 0 has the experts [4, 2] in layer 1: must be 2 different ones of 4",
        ),
        (np.where(EXPERTS == 0, -1, EXPERTS.astype(np.int16)), "token 0 has the experts [-1, 1] in layer 0"),
        (EXPERTS * 0, "token 0 has the experts [0, 0] in layer 0: must be 2 different ones of 4"),
        ("AAAA", "ValueError"),
    ],
)
def test_experts_that_cannot_be_those_of_the_model_are_an_error(experts: Any, problem: str) -> None:
    said = experts if experts is None or isinstance(experts, str) else as_vllm_does(experts)
    answer = {"choices": [choice(7, 8, 9) | {"routed_experts": said}]}
    with answering(routing=ROUTING, generate=answer) as (server, _), pytest.raises(ServerError) as caught:
        server.complete(REQUEST, 3)
    assert problem in str(caught.value) and server.url in str(caught.value)


def as_vllm_does(array: Any) -> str:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode()


def test_a_look_at_a_server_whose_version_is_being_changed_finds_nothing_wrong() -> None:
    with answering(reset_prefix_cache={"success": True}, resume={}) as (server, answers):

        def change(name: str) -> Callable[[], dict[str, Any]]:
            def changed() -> dict[str, Any]:
                server.check_version()
                answers["/weight_info"] = {"weight_version": name}
                server.check_version()
                return {}

            return changed

        answers["/weight_info"] = {"weight_version": "ours version 3"}
        answers["/update_weight_version"] = change("ours version 4 (incomplete)")
        answers["/finish_weight_update"] = change("ours version 4")
        server.announce_update(4)
        server.finish_update(4)
        answers["/weight_info"] = {"weight_version": "ours version 4 (incomplete)"}
        with pytest.raises(ServerError, match="must hold 'ours version 4'"):
            server.check_version()


def test_a_server_that_was_restarted_otherwise_is_no_engine_any_more() -> None:
    described = {"dtype": "torch.bfloat16", "max_model_len": 100, "process": "1"}
    with answering(collective_rpc={"results": [described]}) as (server, _):
        assert misfits(server.url, {"dtype": "torch.bfloat16", "max_model_len": 100}) == []
        one, two = misfits(server.url, {"dtype": "torch.float32", "max_model_len": 120})
        assert "has dtype = torch.bfloat16, must have torch.float32; restart it with mcpo serve" in one
        assert "max_model_len = 100, must have 120" in two
        fleet = Fleet([server], [], limit=2)
        [member] = fleet.live
        fleet.drop(member, ServerError("it died"))
        fleet.news()
        for _ in range(2):
            fleet.refuse(member, one)
        assert fleet.news() == [f"WARNING: {one}"] and fleet.reasons == [one] and fleet.live == []


def test_versions_tell_a_restart_from_another_trainer() -> None:
    with answering(weights={"weight_version": "ours version 3"}) as (server, answers):
        server.check_version()
        assert server.is_there()
        answers["/weight_info"] = {"weight_version": "default"}
        with pytest.raises(ServerError, match=r"holds weights 'default', must hold 'ours version 3' .*was restarted"):
            server.check_version()
        assert server.is_there()
        answers["/weight_info"] = {"weight_version": "ours version 2"}
        with pytest.raises(ServerError, match="has missed an update"):
            server.check_version()
        answers["/weight_info"] = {"weight_version": "theirs version 3"}
        with pytest.raises(ServerTaken, match="another run sends weights to it"):
            server.check_version()
        assert not server.is_there()
        answers["/weight_info"] = 500
        with pytest.raises(ServerRefused, match="its answer is a web page, so this is another program"):
            server.check_version()
        assert not server.is_there()


def test_a_fleet_hands_out_the_least_busy_server_that_is_there() -> None:
    with answering() as (one, _), answering() as (two, _), answering() as (other, _):
        fleet = Fleet([one, two], [other], limit=2)
        assert not fleet.is_starved, "an update is under way until the first release"
        fleet.release(7)
        taken = [fleet.take() for _ in range(4)]
        assert [member.server for member, _ in taken] == [one, two, one, two] and {v for _, v in taken} == {7}
        first, second = taken[0][0], taken[1][0]
        fleet.drop(first, ServerError("it died"))
        fleet.drop(first, ServerError("again"))
        assert fleet.reasons == ["it died"] and fleet.live == [second] and fleet.watched == [second]
        assert fleet.news() == ["WARNING: it died; the run goes on without this server"] and not fleet.news()
        assert fleet.wait_idle(first, seconds=0) and not fleet.wait_idle(second, seconds=0)
        for member, _ in taken:
            fleet.give_back(member, answered=member is not first)
        assert fleet.answers == 2
        assert fleet.wait_idle(second, seconds=0) and fleet.take()[0] is second

        fleet.drop(second, ServerError("it died, too"))
        [foreign] = fleet.watched
        assert fleet.is_starved and foreign.server is other and fleet.live == []
        fleet.restore(foreign)
        assert fleet.take()[0] is foreign and not fleet.is_starved
        fleet.restore(first)
        assert fleet.take()[0] is first, "own servers come first"
        assert fleet.news()[1:] == [f"engine server {one.url} is back"]


def test_a_fleet_waits_for_an_update_and_ends_for_all() -> None:
    with answering() as (server, _):
        fleet = Fleet([server], [], limit=1)
        found: list[Any] = []

        def take() -> None:
            try:
                found.append(fleet.take()[1])
            except EngineError as error:
                found.append(str(error))

        thread = threading.Thread(target=take)
        thread.start()
        thread.join(0.1)
        assert found == []
        fleet.release(1)
        thread.join(20)
        threads = [threading.Thread(target=take) for _ in range(2)]  # the server has its one request
        for thread in threads:
            thread.start()
        fleet.end("it was closed")
        fleet.end("later")
        for thread in threads:
            thread.join(20)
        assert found == [1, "it was closed", "it was closed"]
        assert fleet.busy_seconds()[0] > 0
