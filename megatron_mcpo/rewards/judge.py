"""Get a score from a reward model or judge behind an OpenAI-style endpoint. Imported by worker processes only.

Each worker sends one request at a time, so rewards.workers is the number of concurrent requests. The response is pasted
into the judge's instruction unchanged, so a response can address the judge: what a judge rewards is what the policy
learns. The openai client sends one attempt; the loop over attempts is ours, because the client's retries know neither
the deadline that all attempts share nor that a reply without a score is a failed attempt. Its time-outs are those of
one read each, so that a reply which trickles would never end: the deadline is that of an asyncio task.
"""

import asyncio
import json
import os
import re
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import openai

_FIRST_PAUSE_SECONDS = 0.25
"""The pause before the second attempt; every further pause is twice as long."""

_LONGEST_REPLY = 2**22
_WORTH_ANOTHER_TRY = (408, 409, 425, 429)  # and every 5xx: other refusals would be repeated

# Made while the verifier is imported, which takes none of a response's time. A redirect leads to a host that the
# configuration does not name: it counts as a refusal.
_HTTP = openai.DefaultAsyncHttpxClient(follow_redirects=False)
_LOOP = asyncio.new_event_loop()
_API_KEY = re.compile("[!-~]+")

_PLACE = re.compile(r"\{(question|answer|response)\}")
_NUMBER = re.compile(r"(?<![\w.])[-+]?\.?\d[\d.,eE/%+-]*(?:\s*/\s*\d+)?(?!\w)")
_MARKUP = r"(?:[\s*_\"'`]|\([^()\n]{0,80}\))*+"
_LABELLED = re.compile(
    r"(?P<bound>\b(?:max(?:imum)?|min(?:imum)?|highest|lowest|best|worst|perfect|full|possible)\s+)?"
    rf"\bscored?\b{_MARKUP}"
    rf"(?:(?P<colon>[:=]){_MARKUP}|(?:(?:it|this|that|the|response|answer|is|of|would|be|at|an?|as)\b{_MARKUP})*+)"
    rf"(?P<number>{_NUMBER.pattern})(?P<scale>{_MARKUP}(?:out\s+of|on\s+an?\s+scale\s+(?:of|from)\s+\d+\s*(?:to|-|–))\s*)?",
    re.IGNORECASE,
)
_ENDS_AT_ONE = re.compile(r"1(?:\.0*)?(?![\w.]*\d)")


class JudgeError(RuntimeError):
    """The judge could not be reached, refused, or its reply has no score."""


def score(
    entry: dict[str, Any],
    response: str,
    *,
    url: str,
    model: str,
    prompt: str,
    api_key_file: str | None,
    retries: int,
    seconds: float,
) -> float:
    """Return the number behind "score" in the judge's reply, or its only number, from 0 to 1.

    Args:
        entry: the item; its question and answer may be in the instruction
        response: the model's text
        url: base address of the API, with or without a slash at its end
        model: name of the judge there
        prompt: file with the instruction, in which {question}, {answer} and {response} are replaced
        api_key_file: file that holds the key; None: no key is sent
        retries: further attempts after one that failed
        seconds: for all attempts with the pauses between them

    Raises JudgeError or PermissionError, and TimeoutError where the time is over before a reply can be used.
    """
    deadline = time.monotonic() + seconds
    api_key = None if api_key_file is None else _read(api_key_file).strip()
    ask = partial(
        _client(url.rstrip("/"), api_key).chat.completions.with_streaming_response.create,
        model=model,
        messages=[{"role": "user", "content": _instruction(prompt, entry, response)}],
        temperature=0,
        # A connection that is kept may have been closed by the server since: the attempt would fail.
        extra_headers={"Connection": "close", **({"Authorization": openai.Omit()} if api_key is None else {})},
    )
    for attempt in range(retries + 1):
        if attempt:
            time.sleep(min(_FIRST_PAUSE_SECONDS * 2 ** (attempt - 1), max(deadline - time.monotonic(), 0)))
        try:
            return _score_of(_reply(ask, deadline))
        except JudgeError as error:
            reason = error
    raise JudgeError(f"{url}: {retries + 1} attempts failed, the last: {reason}")


def _instruction(path: str, entry: dict[str, Any], response: str) -> str:
    """Fill in the instruction in one pass: what replaces one name is not searched for the others."""
    values = {"question": entry.get("question"), "answer": entry.get("answer"), "response": response}
    shown = {name: "" if value is None else str(value) for name, value in values.items()}
    text = _PLACE.sub(lambda match: shown[match[1]], _read(path))
    return text.encode("utf-8", "replace").decode("utf-8")  # an unpaired surrogate can't be sent


@cache
def _client(url: str, api_key: str | None) -> openai.AsyncOpenAI:
    """Return a client that takes nothing from the environment: address and key are the configuration's alone."""
    if api_key is not None and not _API_KEY.fullmatch(api_key):  # the HTTP library's own error would quote it
        raise ValueError("api_key_file: must hold a key of printable ASCII characters without blanks; correct the file")
    ambient = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("OPENAI_")}
    try:
        key = api_key or "sent by no request"
        return openai.AsyncOpenAI(api_key=key, base_url=url, max_retries=0, http_client=_HTTP)
    finally:
        os.environ.update(ambient)


@cache
def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8")


def _reply(ask: Callable[..., Any], deadline: float) -> str:
    """Return what the judge said. Raises JudgeError where another attempt may help, PermissionError where it can't."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the judge gave no reply that can be used in time")
    try:
        content = _LOOP.run_until_complete(asyncio.wait_for(_content(ask), left))
    except openai.APIStatusError as error:
        reason = f"HTTP {error.status_code}: {error.response.text[:300]}"
        if error.status_code < 500 and error.status_code not in _WORTH_ANOTHER_TRY:
            raise PermissionError(f"{error.request.url}: refused with {reason}") from None
        raise JudgeError(reason) from None
    except TimeoutError:
        raise TimeoutError("the judge gave no reply that can be used in time") from None
    except openai.APIConnectionError as error:
        cause: BaseException = error
        while inner := cause.__cause__ or cause.__context__:  # the HTTP library wraps the kernel's reason
            cause = inner
        raise JudgeError(f"{type(cause).__name__}: {cause}") from None
    return _said(content)


async def _content(ask: Callable[..., Any]) -> bytes:
    """Return the body of the reply, of one that is too long the beginning. Raises JudgeError where it breaks off."""
    content = b""
    async with ask(timeout=None) as response:
        chunks = aiter(response.iter_bytes())
        while len(content) <= _LONGEST_REPLY:
            try:
                content += await anext(chunks)
            except StopAsyncIteration:
                break
            except Exception as error:  # the HTTP library's own, which the client does not translate here
                raise JudgeError(f"{type(error).__name__}: {error}") from None
    return content


def _said(content: bytes) -> str:
    """Return the text of a chat completion, whatever else it lacks. Raises JudgeError where there is none."""
    try:
        said = json.loads(content)["choices"][0]["message"]["content"] if len(content) <= _LONGEST_REPLY else None
    except (ValueError, LookupError, TypeError, RecursionError):
        said = None
    if not isinstance(said, str):
        raise JudgeError(f"not a chat completion: {content[:200].decode(errors='replace')}")
    return said


def _score_of(reply: str) -> float:
    """Return the number behind the word score, of several the last with a colon; without the word the only number.

    A fraction, a percentage, a range and a number above 1 are not scores: they have another scale.
    """
    labelled = [match for match in _LABELLED.finditer(reply) if not match["bound"]]
    labelled = [match for match in labelled if match["colon"]][-1:] or labelled
    numbers = {match["number"] for match in labelled} or _NUMBER.findall(reply)
    other_scale = any(match["scale"] and not _ENDS_AT_ONE.match(reply, match.end()) for match in labelled)
    try:
        [number] = numbers
        value = -1.0 if other_scale else float(number.rstrip(".,-"))
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise JudgeError(f"its reply must have a single score from 0 to 1: {reply[-200:]!r}")
    return value
