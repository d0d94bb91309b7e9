"""A score from a reward model or judge behind an OpenAI-style endpoint. Imported by worker processes.

One request at a time a worker: rewards.workers is how many there are at once. The response is pasted into the judge's
instruction as it is, so a response can address the judge: what a judge rewards is what the policy learns.
"""

import json
import re
import time
import urllib.error
import urllib.request
from functools import cache
from http.client import HTTPException
from pathlib import Path
from typing import Any

_FIRST_PAUSE_SECONDS = 0.25
"""Before the second attempt; every further pause is twice as long."""

_LONGEST_REPLY = 2**22
_WORTH_ANOTHER_TRY = (408, 409, 425, 429)  # and every 5xx: other refusals stay what they are

_PLACE = re.compile(r"\{(question|answer|response)\}")
_NUMBER = re.compile(r"(?<![\w.])[-+]?\.?\d[\d.,eE/%+-]*(?:\s*/\s*\d+)?")
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
    """The judge could not be reached, refused, or said nothing that can be used."""


def score(
    entry: dict[str, Any],
    answer: str,
    *,
    url: str,
    model: str,
    prompt: str,
    api_key_file: str | None,
    retries: int,
    seconds: float,
) -> float:
    """The number behind "score" in the judge's reply, or its only number, from 0 to 1.

    prompt: file with the instruction, in which {question}, {answer} and {response} are replaced
    seconds: for all attempts with the pauses between them
    Raises JudgeError, or TimeoutError when the time is over before a reply can be used.
    """
    deadline = time.monotonic() + seconds
    body = json.dumps(
        {
            "model": model,
            "messages": [{"role": "user", "content": _instruction(prompt, entry, answer)}],
            "temperature": 0,
        }
    )
    request = urllib.request.Request(f"{url.rstrip('/')}/chat/completions", body.encode(), _headers(api_key_file))
    for attempt in range(retries + 1):
        if attempt:
            time.sleep(min(_FIRST_PAUSE_SECONDS * 2 ** (attempt - 1), max(deadline - time.monotonic(), 0)))
        try:
            return _score_of(_reply(request, deadline))
        except JudgeError as error:
            reason = error
    raise JudgeError(f"{url}: {retries + 1} attempts failed, the last: {reason}")


def _instruction(path: str, entry: dict[str, Any], answer: str) -> str:
    """Filled in one pass: what is put in place of one name is not searched for the others."""
    values = {"question": entry.get("question"), "answer": entry.get("answer"), "response": answer}
    shown = {name: "" if value is None else str(value) for name, value in values.items()}
    text = _PLACE.sub(lambda match: shown[match[1]], _read(path))
    return text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair can't be sent


def _headers(api_key_file: str | None) -> dict[str, str]:
    headers = {"Content-Type": "application/json"}
    if api_key_file is not None:
        headers["Authorization"] = f"Bearer {_read(api_key_file).strip()}"
    return headers


@cache
def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8")


def _reply(request: urllib.request.Request, deadline: float) -> str:
    """What the judge said. Raises JudgeError where another attempt may help, PermissionError where it can't."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the judge gave no reply that can be used in time")
    try:
        with urllib.request.urlopen(request, timeout=left) as response:
            content = response.read(_LONGEST_REPLY)
    except urllib.error.HTTPError as error:
        reason = f"HTTP {error.code}: {error.read(300).decode(errors='replace')}"
        if error.code < 500 and error.code not in _WORTH_ANOTHER_TRY:
            raise PermissionError(f"{request.full_url}: refused with {reason}") from None
        raise JudgeError(reason) from None
    except (OSError, HTTPException) as error:
        if isinstance(getattr(error, "reason", error), TimeoutError):
            raise TimeoutError("the judge gave no reply that can be used in time") from None
        raise JudgeError(f"{type(error).__name__}: {error}") from None
    try:
        said = json.loads(content)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        said = None
    if not isinstance(said, str):
        raise JudgeError(f"not a chat completion: {content[:200].decode(errors='replace')}")
    return said


def _score_of(reply: str) -> float:
    """The number behind the word score, of several the last with a colon; without the word the only number.

    A fraction, a percentage, a range and a number above 1 are not taken for a score: they have another scale.
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
        raise JudgeError(f"its reply has no single score from 0 to 1: {reply[-200:]!r}")
    return value
