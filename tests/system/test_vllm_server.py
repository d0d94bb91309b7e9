"""Engines in other processes: two real servers of a tiny tied model on a CPU, and trainers of one and two ranks.

Not covered: GPUs and NCCL, other hosts than this one, servers of several workers (test_vllm_server_workers.py), models
whose rounding depends on what else is in a batch.
"""

import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch
from torch import Tensor

from megatron_mcpo.cli import preflight, serve
from megatron_mcpo.config.config import Config, ConfigError, load
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.distributed import parallel
from megatron_mcpo.mcore.policy import Policy
from megatron_mcpo.rollout.engine import Comparison, EngineError, SamplingRequest
from megatron_mcpo.rollout.server import Server as EngineServer
from megatron_mcpo.rollout.server_client import Client
from megatron_mcpo.rollout.vllm_server import VllmServers
from megatron_mcpo.rollout.weight_link import Bucket
from tests.support import tiny_run
from tests.support import vllm_cases as cases
from tests.support.engine_server import Server
from tests.support.program import lasting, metrics, train_forked, write_config
from tests.support.ranks import run_ranks
from tests.support.vllm_cases import weights

MAX_LEN = 204  # as in program.CONFIG
PROMPTS = [[7, 8, 9], [30] * 40 + [9], list(range(20, 45)), [50, 3]]
Q_PROJ = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)]
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a model in a/, the same with other weights in b/, and config.toml."""
    folder = tmp_path_factory.mktemp("servers")
    tiny_run.save_chat_model(folder / "a")
    tiny_run.save_chat_model(folder / "b", trained=False, spread=0.1)
    write_config(folder / "a", folder)
    return folder


@pytest.fixture(scope="module")
def starting(folder: Path) -> Iterator[list[Server]]:
    running = [Server(folder / "config.toml", folder / f"server{number}.log") for number in range(2)]
    yield running
    for server in running:
        server.kill()


@pytest.fixture(scope="module")
def fresh(folder: Path, starting: list[Server]) -> dict[str, Any]:
    """Samples, while the servers start, of engines in a process of their own that read the weights from the disk."""
    return cases.run(_fresh_samples, folder, timeout=540)


@pytest.fixture(scope="module")
def servers(starting: list[Server], fresh: dict[str, Any]) -> list[Server]:
    for server in starting:
        server.wait_ready()
    return starting


def _fresh_samples(folder: Path) -> dict[str, Any]:
    samples = {}
    for name in "ab":
        engine = cases.build(folder / name, max_model_len=MAX_LEN, load_weights=True)
        samples[name] = sampled(engine)
        samples[f"long {name}"] = sampled(engine, prompts=[PROMPTS[0]], max_tokens=200, num_samples=1)
        engine.close()
    return samples


def connect(folder: Path, *servers: Server, tag: str, **changes: Any) -> VllmServers:
    urls, options = [server.url for server in servers], {"max_model_len": MAX_LEN, "max_concurrent": 8} | changes
    device = torch.device("cpu")
    return VllmServers(urls, from_folder(folder / "a"), tag=tag, in_flight="wait", wanted={}, device=device, **options)


def sampled(engine: Any, *, prompts: list[list[int]] = PROMPTS, **changes: Any) -> list[tuple[Any, Any]]:
    """Tokens and log-probs of seeded samples, as test_vllm_engine takes them."""
    options = {"num_samples": 2, "seed": 11, "max_tokens": 8} | changes
    groups = engine.generate([SamplingRequest(token_ids=prompt, **options) for prompt in prompts])
    return [(sample.token_ids, sample.logprobs) for group in groups for sample in group]


def asked(server: Server) -> list[tuple[Any, Any]]:
    """Somebody else's long request, in the form of `sampled`."""
    params = {"n": 1, "seed": 11, "temperature": 1.0, "max_tokens": 200, "ignore_eos": True, "logprobs": 0}
    body = {"token_ids": PROMPTS[0], "sampling_params": params}
    (choice,) = Client(server.url).post("/inference/v1/generate", body)["choices"]
    return [(tuple(choice["token_ids"]), tuple(token["logprob"] for token in choice["logprobs"]["content"]))]


def version(server: Server) -> str:
    return str(Client(server.url).get("/weight_info")["weight_version"])


def failure(call: Callable[[], Any], *, within: float = 60) -> str:
    begin = time.monotonic()
    with pytest.raises(EngineError) as caught:
        call()
    assert time.monotonic() - begin < within
    return str(caught.value)


def test_a_server_starts_without_warnings_that_nobody_can_act_on(servers: list[Server]) -> None:
    """Before other tests provoke errors. Of the command that it prints only the lines below are looked at."""
    for server in servers:
        log = server.log.read_text()
        assert f"{server.url} answers after" in log and "Application startup complete" in log
        assert not re.search("warn|Traceback", log.partition("answers after")[2], flags=re.IGNORECASE), log


def status(server: Server, headers: dict[str, str]) -> tuple[int, str | None]:
    """Return the status of a request, and which origin may read the answer."""
    request = Request(f"{server.url}/weight_info", headers=headers)
    try:
        with urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers.get("Access-Control-Allow-Origin")
    except HTTPError as error:
        return error.code, error.headers.get("Access-Control-Allow-Origin")


def test_a_server_answers_no_browser(folder: Path, servers: list[Server]) -> None:
    assert status(servers[0], {}) == (200, None)
    for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        assert status(servers[0], headers) == (403, None)
    flags = serve.server_command(load(folder / "config.toml", []), host="127.0.0.1", port=1)[1]
    assert flags[flags.index("--allowed-origins") + 1] == "[]"


def test_two_ranks_feed_two_servers(folder: Path, servers: list[Server], fresh: dict[str, Any]) -> None:
    """The weights come from a tensor-parallel trainer; each rank has a server."""
    results = run_ranks(2, _feed, folder, servers, timeout=540)
    for rank, (seen, versions, sent) in enumerate(results):
        assert seen == [fresh["a"], fresh["b"], fresh["a"]], rank
        assert versions == [f"feed version {number}" for number in (1, 2, 3)]
        assert sent == sum(tensor.nbytes for tensor in weights(folder / "a").values())


def _feed(folder: Path, servers: list[Server]) -> Any:
    config, model = load(folder / "config.toml"), from_folder(folder / "a")
    groups = parallel.init(Layout(tensor=2, sequence=True), seed=0, timeout_seconds=60)
    policy = Policy(config, model, groups)
    mine = servers[groups.rank]
    engine = connect(folder, mine, tag="feed", bucket_bytes=100_000)
    seen, versions, sent = [], [], 0
    for number in (1, 2, 3):
        sent = engine.update(policy.weights() if number != 2 else weights(folder / "b").items(), number)
        seen.append(sampled(engine))
        versions.append(version(mine))
    return seen, versions, sent


def test_one_rank_spreads_its_requests_and_a_rank_may_have_no_server(
    folder: Path, servers: list[Server], fresh: dict[str, Any]
) -> None:
    engine = connect(folder, *servers, tag="spread")
    idle = connect(folder, tag="idle")
    a = weights(folder / "a")
    assert "no weights" in failure(lambda: engine.generate([_request()]))
    assert engine.update(a.items(), 5) == idle.update(a.items(), 5) == sum(tensor.nbytes for tensor in a.values())
    assert sampled(engine) == fresh["a"]
    assert {sample.versions for group in engine.generate([_request()]) for sample in group} == {(5,) * 4}
    assert idle.generate([]) == []
    assert idle.compare(a.items()) == Comparison(different=(), unread=(), num_tensors=len(a))
    together = sampled(engine, num_samples=3, seed=40)
    alone = [sampled(engine, num_samples=1, seed=40 + k) for k in range(3)]
    assert [tokens for tokens, _ in together] == [alone[k][p][0] for p in range(len(PROMPTS)) for k in range(3)]
    greedy = sampled(engine, temperature=0.0)
    assert greedy[::2] == greedy[1::2]
    engine.sleep()
    engine.wake()
    with pytest.raises(ValueError, match="max_model_len"):
        engine.generate([_request(max_tokens=MAX_LEN)])
    engine.close()
    assert "closed" in failure(lambda: engine.generate([_request()]))


def _request(**changes: Any) -> SamplingRequest:
    options: dict[str, Any] = {"token_ids": PROMPTS[0], "num_samples": 2, "seed": 1, "max_tokens": 4} | changes
    return SamplingRequest(**options)


def test_a_stop_token_ends_a_completion(folder: Path, servers: list[Server]) -> None:
    engine = connect(folder, servers[0], tag="stop")
    engine.update(weights(folder / "b").items(), 1)
    ((free,),) = engine.generate([_request(num_samples=1, max_tokens=8)])
    stop = free.token_ids[3]
    place = free.token_ids.index(stop) + 1
    ((stopped,),) = engine.generate([_request(num_samples=1, max_tokens=8, stop_token_ids=(stop,))])
    assert (free.stop_reason.value, stopped.stop_reason.value) == ("length", "stop")
    assert (stopped.token_ids, stopped.logprobs) == (free.token_ids[:place], free.logprobs[:place])


def test_a_comparison_names_the_tensors(folder: Path, servers: list[Server]) -> None:
    engine = connect(folder, *servers, tag="compare", bucket_bytes=100_000)
    a = weights(folder / "a")
    engine.update(a.items(), 1)
    assert engine.compare(a.items()) == Comparison(different=(), unread=(), num_tensors=len(a))
    swapped = a | {Q_PROJ[0]: a[Q_PROJ[1]], Q_PROJ[1]: a[Q_PROJ[0]]}
    assert sorted(engine.compare(swapped.items()).different) == Q_PROJ
    embedding = "model.embed_tokens.weight"
    assert engine.compare([(embedding, a[embedding] + 1)]).different == (embedding, "lm_head.weight")


def test_bad_pushes_poison_the_engine_and_leave_the_server_paused(folder: Path, servers: list[Server]) -> None:
    server, a = servers[0], weights(folder / "a")
    bad = {
        "missing": ([pair for pair in a.items() if pair[0] != Q_PROJ[0]], "were not sent"),
        "shape": ([(name, tensor[:8] if name == Q_PROJ[1] else tensor) for name, tensor in a.items()], "has shape"),
    }
    for kind, (tensors, message) in bad.items():
        engine = connect(folder, server, tag=kind)
        engine.update(a.items(), 1)
        assert message in failure(lambda e=engine, t=tensors: e.update(t, 2))  # type: ignore[misc]
        assert message in failure(lambda e=engine: e.generate([_request()]))  # type: ignore[misc]
        assert version(server) == f"{kind} version 2 (incomplete)"
        assert Client(server.url).get("/is_paused") == {"is_paused": True}


def test_others_requests_get_old_or_new_weights_and_wait_meanwhile(
    folder: Path, servers: list[Server], fresh: dict[str, Any]
) -> None:
    server = servers[0]
    engine = connect(folder, server, tag="busy")
    engine.update(weights(folder / "a").items(), 1)
    assert asked(server) == fresh["long a"]
    with ThreadPoolExecutor(2) as pool:
        before = pool.submit(asked, server)
        time.sleep(0.2)

        def slowly() -> Iterator[tuple[str, Tensor]]:
            during.append(pool.submit(asked, server))
            time.sleep(1)
            assert not during[0].done()
            yield from weights(folder / "b").items()

        during: list[Any] = []
        engine.update(slowly(), 2)
        assert before.result() in (fresh["long a"], fresh["long b"])
        assert during[0].result() == fresh["long b"]


@pytest.mark.parametrize("use", ["generate", "update", "compare"])
def test_a_foreign_push_is_noticed(folder: Path, servers: list[Server], fresh: dict[str, Any], use: str) -> None:
    a = weights(folder / "a")
    theirs = connect(folder, servers[0], tag="theirs")
    theirs.update(weights(folder / "b").items(), 1)
    ours = connect(folder, servers[0], tag="ours")
    ours.update(a.items(), 1)
    calls: dict[str, Callable[[], Any]] = {
        "generate": lambda: sampled(theirs),
        "update": lambda: theirs.update(a.items(), 2),
        "compare": lambda: theirs.compare(a.items()),
    }
    message = failure(calls[use])
    assert f"{servers[0].url}: holds weights 'ours version 1', must hold 'theirs version 1'" in message
    assert sampled(ours) == fresh["a"]


def test_the_trainer_that_connected_last_is_the_one_that_pushes(
    folder: Path, servers: list[Server], fresh: dict[str, Any]
) -> None:
    first, last = (connect(folder, servers[0], tag=tag) for tag in ("first", "last"))
    message = failure(lambda: first.update(weights(folder / "a").items(), 1), within=20)
    assert "this server now gets its weights from last, not from first" in message
    last.update(weights(folder / "b").items(), 1)
    assert sampled(last) == fresh["b"]


def test_a_trainer_killed_in_a_push_leaves_a_server_that_the_next_can_use(
    folder: Path, servers: list[Server], fresh: dict[str, Any]
) -> None:
    for number, where in enumerate(("between buckets", "in a bucket")):
        engine = connect(folder, servers[0], tag=f"victim{number}")
        engine.update(weights(folder / "a").items(), 1)
        engine.close()
        with pytest.raises(RuntimeError, match="died without a traceback"):
            run_ranks(1, _die_in_a_push, folder, servers[0], f"killed{number}", where, timeout=240)
        assert version(servers[0]) == f"killed{number} version 1 (incomplete)"
        assert Client(servers[0].url).get("/is_paused") == {"is_paused": True}
        after = connect(folder, servers[0], tag=f"after{number}")
        after.update(weights(folder / "b").items(), 1)
        assert sampled(after) == fresh["b"]


def _die_in_a_push(folder: Path, server: Server, tag: str, where: str) -> None:
    remote = EngineServer(server.url, tag=tag, device=torch.device("cpu"), vocab_size=len(tiny_run.VOCAB))
    remote.connect()
    remote.announce_update(1)
    remote.begin_update()
    tensors = list(weights(folder / "a").items())
    remote.load(tensors[:3])
    if where == "in a bucket":
        body = {"update_info": Bucket.of(tensors[3:7], tag).as_json()}
        Thread(target=Client(server.url).post, args=("/update_weights", body)).start()
        time.sleep(1)
        assert remote._sender is not None
        remote._sender.send([tensors[3][1]], stop_when=lambda: False)
    os._exit(1)


def test_a_whole_run_has_the_figures_of_one_with_engines_in_the_ranks(
    folder: Path, servers: list[Server], tmp_path: Path
) -> None:
    config = write_config(folder / "a", tmp_path)
    where = ["--engine.servers", json.dumps([server.url for server in servers])]
    rows = []
    for name, options in (("ranks", []), ("servers", where)):
        finished = train_forked(config, "--run.name", name, *options, ranks=2)
        assert finished.returncode == 0, finished.stderr[-3000:]
        rows.append(lasting(metrics(tmp_path / "runs" / name)))
    assert rows[0] == rows[1]


def test_refusals(folder: Path, servers: list[Server], tmp_path: Path) -> None:
    urls = [server.url for server in servers]
    with ThreadingHTTPServer(("127.0.0.1", 0), _Other) as other, socket.create_server(("127.0.0.1", 0)) as free:
        Thread(target=other.serve_forever, daemon=True).start()
        foreign, nobody = (f"http://127.0.0.1:{port}" for port in (other.server_port, free.getsockname()[1]))
        free.close()
        assert problems(folder, urls) == []
        assert "no answer to GET /health" in one(problems(folder, [urls[0], nobody]))
        assert "was refused (404)" in one(problems(folder, [foreign]))
        other.shutdown()
    alias = urls[0].replace("127.0.0.1", "localhost")
    assert "must be different servers" in one(problems(folder, [urls[0], alias]))
    assert "must be listed once (it is there twice)" in one(problems(folder, [urls[0], urls[0]]))
    assert "the port must be at most 65535" in one(problems(folder, ["http://127.0.0.1:70000"]))
    for bad in ("127.0.0.1:8000", "http://127.0.0.1", "https://127.0.0.1:1", "http://u@h:1"):
        assert f"engine.servers[0] = {bad!r}" in one(problems(folder, [bad]))
    assert "has dtype = float32, must have bfloat16" in one(problems(folder, urls[:1], "--model.dtype", "bf16"))
    longer = ["--rollout.max_response_tokens", "5"]
    assert "has max_model_len = 204, must have 205" in one(problems(folder, urls[:1], *longer))
    split = problems(folder, urls[:1], "--engine.tensor_parallel", "2")
    assert [line.split(" has ")[1].split(";")[0] for line in split] == [
        f"{name} = 1, must have 2" for name in ("tensor_parallel", "workers")
    ]
    tiny_run.save_chat_model(tmp_path, experts=True, trained=False)
    assert any("has model family = llama, must have qwen3_moe" in line for line in problems(tmp_path, urls[:1]))


def test_a_server_that_could_not_serve_is_not_started(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = write_config(folder / "a", tmp_path)
    assert serve.main([str(config), "--engine.tensor_parallel", "3", "--rollout.max_prompt_tokens", "300"]) == 2
    errors = capfd.readouterr().err
    assert "engine.tensor_parallel = 3: must divide the 2 attention heads" in errors
    assert "Possible: 1, 2." in errors
    assert "must be at most the model's max_position_embeddings = 256" in errors


class _Other(BaseHTTPRequestHandler):
    """Not an engine."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        self.send_error(404)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


def problems(folder: Path, urls: list[str], *overrides: str) -> list[str]:
    model = folder / "a" if (folder / "a").exists() else folder
    path = write_config(model, folder) if not (folder / "config.toml").exists() else folder / "config.toml"
    try:
        config: Config = load(path, ["--engine.servers", json.dumps(urls), *overrides])
        preflight.check(config, None)
    except ConfigError as error:
        return error.problems
    return []


def one(problems: list[str]) -> str:
    (problem,) = problems
    return problem


def test_a_server_that_dies_is_an_error_soon(folder: Path, servers: list[Server]) -> None:
    """The last test here: it ends the servers."""
    a = weights(folder / "a")
    engines = [connect(folder, server, tag="death", bucket_bytes=100_000) for server in servers]
    for engine in engines:
        engine.update(a.items(), 1)
    long = [_request(max_tokens=200, num_samples=8, seed=number) for number in range(64)]

    def dies_in_the_middle() -> Iterator[tuple[str, Tensor]]:
        for number, pair in enumerate(a.items()):
            if number == 5:
                servers[1].kill()
            yield pair

    killer = ThreadPoolExecutor(1)
    killer.submit(lambda: (time.sleep(0.5), servers[0].kill()))
    assert f"generation failed: {servers[0].url}" in failure(lambda: engines[0].generate(long), within=30)
    begin = time.monotonic()
    engines[1].update(dies_in_the_middle(), 2)
    assert time.monotonic() - begin < 30 and engines[1].num_live == 0
    assert f"generation failed: {servers[1].url}" in failure(lambda: engines[1].generate([_request()]))
    killer.shutdown()
