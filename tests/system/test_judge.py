"""A judge over HTTP, against a real server in a thread: what it is asked, which replies count, and how it fails.

Not covered: TLS, proxies, and judges that can be talked into a score by the response that they judge.
"""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from megatron_mcpo.rewards.scorer import Scorer
from megatron_mcpo.types import RolloutGroup
from tests.support.scoring import group, scorer_of

Reply = tuple[int, str]
Behaviour = Callable[[int, str], Reply]
"""From the number of the request, from 0, and what the judge was asked, to status and body."""


def chat(text: Any) -> Reply:
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


def lower_case(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


TRICKLE = "a byte every now and then"
BROKEN = "not all of it"


class Judge:
    """A server that keeps what it was asked."""

    def __init__(self, behaviour: Behaviour):
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                judge.requests.append((self.path, lower_case(self.headers), {}))
                self.send_error(404)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                judge.requests.append((self.path, lower_case(self.headers), body))
                status, reply = behaviour(len(judge.requests) - 1, body["messages"][0]["content"])
                self.send_response(status)
                self.send_header("Content-Length", str(len(reply.encode())))
                if reply == TRICKLE:
                    self._trickle()
                if reply == BROKEN:
                    self.end_headers()
                    self.wfile.write(b"{")
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                if status in (302, 307):
                    self.send_header("Location", reply)
                self.end_headers()
                self.wfile.write(reply.encode())

            def _trickle(self) -> None:
                """Send a byte of the header now and then, as long as somebody reads it."""
                while True:
                    self.wfile.write(b"x")
                    self.wfile.flush()
                    time.sleep(0.2)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def start() -> Iterator[Callable[[Behaviour], Judge]]:
    judges: list[Judge] = []

    def begin(behaviour: Behaviour) -> Judge:
        judges.append(Judge(behaviour))
        return judges[-1]

    yield begin
    for judge in judges:
        judge.close()


@pytest.fixture
def prompt(tmp_path: Path) -> str:
    path = tmp_path / "judge.txt"
    path.write_text("Q {question}\nA {answer}\nR {response}\n{other} {}")
    return str(path)


def settings(judge: Judge, prompt: str, **keys: Any) -> dict[str, Any]:
    return {"kind": "judge", "url": judge.url, "model": "m", "prompt": prompt, **keys}


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Judge, Scorer]]:
    """A judge whose reply is the response that it judges (status and body in JSON), and a scorer that asks it."""
    prompt = tmp_path_factory.mktemp("echo") / "judge.txt"
    prompt.write_text("{response}")
    judge = Judge(lambda number, asked: json.loads(asked))
    with scorer_of(settings(judge, str(prompt), retries=1), timeout=30.0) as scorer:
        yield judge, scorer
    judge.close()


def replied(echo: tuple[Judge, Scorer], reply: Reply) -> tuple[RolloutGroup, int]:
    """Have a response judged with this reply; return what it was scored, and how often the judge was asked."""
    judge, scorer = echo
    before = len(judge.requests)
    [scored] = scorer.score([group(json.dumps(reply))])
    return scored, len(judge.requests) - before


def test_a_judge_is_asked_once_for_each_answer_and_its_score_counts(
    start: Callable[[Behaviour], Judge], prompt: str, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.write_text("secret\n")
    judge = start(lambda number, asked: chat("Of 2 points: 1.\nScore: 0.75." if "R good" in asked else "0"))
    with scorer_of(settings(judge, prompt, api_key_file=str(key))) as scorer:
        [scored] = scorer.score([group("good {answer} é", "bad", "bad")])
    assert (scored.error, scored.rewards, scored.correct) == (None, (0.75, 0.0, 0.0), (False,) * 3)
    assert len(judge.requests) == 2
    path, headers, body = judge.requests[0]
    assert (path, headers["authorization"]) == ("/v1/chat/completions", "Bearer secret")
    assert headers["connection"] == "close", "a kept connection that the server has closed would cost an attempt"
    content = "Q q0\nA right\nR good {answer} é\n{other} {}"
    assert body == {"model": "m", "messages": [{"role": "user", "content": content}], "temperature": 0}


@pytest.mark.parametrize("slashes", ["", "/", "//"])
def test_the_configuration_alone_says_who_is_asked_and_with_which_key(
    start: Callable[[Behaviour], Judge], prompt: str, slashes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge, other = start(lambda number, asked: chat("1")), start(lambda number, asked: chat("0"))
    monkeypatch.setenv("OPENAI_API_KEY", "of-the-environment")
    monkeypatch.setenv("OPENAI_ADMIN_KEY", "of-the-environment")
    monkeypatch.setenv("OPENAI_ORG_ID", "of-the-environment")
    monkeypatch.setenv("OPENAI_BASE_URL", other.url)
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Custom: of-the-environment")
    with scorer_of({**settings(judge, prompt), "url": judge.url + slashes}) as scorer:
        [scored] = scorer.score([group("x")])
    assert (scored.error, scored.rewards, other.requests) == (None, (1.0,), [])
    [(path, headers, _)] = judge.requests
    assert path == "/v1/chat/completions" and "of-the-environment" not in str(headers)
    assert "authorization" not in headers


@pytest.mark.parametrize("status", [302, 307])
def test_a_redirect_to_another_host_is_a_refusal(
    start: Callable[[Behaviour], Judge], prompt: str, tmp_path: Path, status: int
) -> None:
    key = tmp_path / "key"
    key.write_text("secret")
    other = start(lambda number, asked: chat("1"))
    judge = start(lambda number, asked: (status, other.url))
    with scorer_of(settings(judge, prompt, api_key_file=str(key))) as scorer:
        [scored] = scorer.score([group("x")])
    assert f"refused with HTTP {status}" in str(scored.error)
    assert (len(judge.requests), other.requests) == (1, [])


@pytest.mark.parametrize("key", ["sec\nret", "sec ret", "sécret"])
def test_a_key_that_can_not_be_sent_is_an_error_that_does_not_show_it(
    start: Callable[[Behaviour], Judge], prompt: str, tmp_path: Path, key: str
) -> None:
    judge = start(lambda number, asked: chat("1"))
    path = tmp_path / "key"
    path.write_text(key)
    with scorer_of(settings(judge, prompt, api_key_file=str(path))) as scorer:
        [scored] = scorer.score([group("x")])
    assert "api_key_file: must hold a key" in str(scored.error) and judge.requests == []
    assert "ret" not in str(scored.error)


def test_a_reply_that_is_too_long_is_an_error(start: Callable[[Behaviour], Judge], prompt: str) -> None:
    judge = start(lambda number, asked: chat("1" + " " * 2**22))
    with scorer_of(settings(judge, prompt, retries=0), timeout=30.0) as scorer:
        [scored] = scorer.score([group("x")])
    assert scored.rewards == () and "not a chat completion" in str(scored.error)


def test_replies_that_can_not_be_used_are_asked_for_again(start: Callable[[Behaviour], Judge], prompt: str) -> None:
    replies = [(500, "oops"), (429, "busy"), (200, "no JSON"), chat("no number"), chat("0.5")]
    judge = start(lambda number, asked: replies[number])
    with scorer_of(settings(judge, prompt, retries=4), timeout=30.0) as scorer:
        [scored] = scorer.score([group("x")])
    assert (scored.error, scored.rewards, len(judge.requests)) == (None, (0.5,), 5)


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("1", 1.0),
        ("**0.5**", 0.5),
        ("1e-1", 0.1),
        (".25.", 0.25),
        ("Score:1.0", 1.0),
        ("9/10, so the score is 0", 0.0),
        ("Score: 0.3 out of 1", 0.3),
        ("**Score**: 0.3 (on a scale from 0 to 1)", 0.3),
        ("Score (0 to 1): 0.3", 0.3),
        ('{"score": 0.3, "steps": 4}', 0.3),
        ("I first thought of a score of 0.5.\nScore: 0.3", 0.3),
        ("The score is 0.3; the highest score is 1.", 0.3),
    ],
)
def test_the_score_of_a_reply(echo: tuple[Judge, Scorer], said: str, score: float) -> None:
    scored, asked = replied(echo, chat(said))
    assert (scored.error, scored.rewards, asked) == (None, (score,), 1)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((500, "oops"), "HTTP 500: oops"),
        ((200, "[]"), "not a chat completion"),
        ((200, "[" * 5000), "not a chat completion"),
        (chat(None), "not a chat completion"),
        (chat(""), "single score from 0 to 1"),
        (chat("8/10"), "single score from 0 to 1"),
        (chat("0.8 / 1"), "single score from 0 to 1"),
        (chat("80%"), "single score from 0 to 1"),
        (chat("on a scale of 0-1"), "single score from 0 to 1"),
        (chat("2026-01-01"), "single score from 0 to 1"),
        (chat("-0.5"), "single score from 0 to 1"),
        (chat("1.5"), "single score from 0 to 1"),
        (chat("nan"), "single score from 0 to 1"),
        (chat("score: 0x1"), "single score from 0 to 1"),
        (chat("v0"), "single score from 0 to 1"),
        (chat("0.3 (scale: 0 to 1)"), "single score from 0 to 1"),
        (chat("9/10, so 0"), "single score from 0 to 1"),
        (chat("Score: 0.3 out of 10"), "single score from 0 to 1"),
        (chat("Score: 1 on a scale of 1 to 10"), "single score from 0 to 1"),
        (chat("a score of 0.5, or a score of 0.6"), "single score from 0 to 1"),
    ],
)
def test_a_judge_that_fails_is_an_error_and_never_a_zero(
    echo: tuple[Judge, Scorer], reply: Reply, message: str
) -> None:
    scored, asked = replied(echo, reply)
    assert scored.rewards == scored.correct == () and not scored.timed_out
    assert "2 attempts failed" in str(scored.error) and message in str(scored.error)
    assert asked == 2


def test_a_refusal_is_not_asked_for_again(start: Callable[[Behaviour], Judge], prompt: str) -> None:
    judge = start(lambda number, asked: (401, "who are you?"))
    with scorer_of(settings(judge, prompt, retries=5)) as scorer:
        [scored] = scorer.score([group("x")])
    assert "HTTP 401: who are you?" in str(scored.error) and len(judge.requests) == 1


@pytest.mark.parametrize("status", [200, 500])
def test_a_slow_judge_has_timed_out_and_its_worker_lives(
    start: Callable[[Behaviour], Judge], prompt: str, status: int
) -> None:
    """Also one that is slow to fail, and would be tried again for ever."""
    judge = start(lambda number, asked: (time.sleep(0.0 if "R quick" in asked else 10.0), chat("1"))[1])
    if status == 500:
        judge = start(lambda number, asked: chat("1") if "R quick" in asked else (500, "oops"))
    with scorer_of(settings(judge, prompt, retries=50), timeout=8.0) as scorer:
        slow, quick = scorer.score([group("slow"), group("quick", index=1)])
    assert slow.timed_out and "TimeoutError: the judge" in str(slow.error)
    assert quick.rewards == (1.0,)


@pytest.mark.parametrize("status", [200, 500])
def test_a_reply_that_trickles_has_timed_out(start: Callable[[Behaviour], Judge], prompt: str, status: int) -> None:
    """Each read ends in time, and no byte is the last."""
    judge = start(lambda number, asked: chat("1") if "R quick" in asked else (status, TRICKLE))
    with scorer_of(settings(judge, prompt, retries=50), timeout=5.0) as scorer:
        slow, quick = scorer.score([group("slow"), group("quick", index=1)])
    assert slow.timed_out and "TimeoutError: the judge" in str(slow.error)
    assert quick.rewards == (1.0,)


def test_a_reply_that_breaks_off_is_asked_for_again(start: Callable[[Behaviour], Judge], prompt: str) -> None:
    judge = start(lambda number, asked: chat("0.5") if number else (200, BROKEN))
    with scorer_of(settings(judge, prompt, retries=1), timeout=30.0) as scorer:
        [scored] = scorer.score([group("x")])
    assert (scored.rewards, len(judge.requests)) == ((0.5,), 2)


def test_nobody_there(start: Callable[[Behaviour], Judge], prompt: str) -> None:
    judge = start(lambda number, asked: chat("1"))
    judge.close()
    with scorer_of(settings(judge, prompt, retries=1)) as scorer:
        [scored] = scorer.score([group("x")])
    assert "2 attempts failed" in str(scored.error) and "ConnectionRefusedError" in str(scored.error)
