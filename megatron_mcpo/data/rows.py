"""Turn rows of JSONL, Parquet and Hugging Face data into items: our schema; verl's is read by data/verl.py.

A row of our schema has these columns; other columns and null values are ignored:
  question   text of the question; or instead of it
  prompt     text, or chat messages [{"role": "user", "content": "..."}, ...]: system, user and assistant, the last
             from the user; messages may be JSON text, and a content a list of parts of type text
  answer     text or number. Needed by all verifiers but code, format, length, judge and function
  verifier   math, choice, exact, text, numeric, code or reasoning_gym (metadata.source_dataset then names the
             generator); left out where the domain has [[domain.verifiers]]
  choices    texts of a multiple choice; the answer is a letter (A is the first), or else one of them. They are
             appended to a question that is text and doesn't contain them
  tests      for code: [{"input": "3\n", "output": "9\n"}] (standard input and output), or
             [{"assert": "assert f(3) == 9"}]
  function   for code: name of the function that the tests call; a method of that name of a class Solution is called too
  metadata   an object that the verifier gets as plain JSON (data/plain_json.py); nothing in it makes a row bad
  domain     name of the domain that the row is for: one file may serve several domains
"""

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, Literal

from megatron_mcpo.data.plain_json import parsed, plain_object
from megatron_mcpo.rewards.allowlist import ALLOWED
from megatron_mcpo.rewards.code_tests import parse_tests
from megatron_mcpo.rewards.registry import ROW_VERIFIERS, VERIFIERS

Reason = Literal["malformed", "no question", "no answer", "bad answer", "no verifier", "bad tests", "too long"]
"""The reasons why a row can't be used."""

COLUMNS = ("question", "prompt", "answer", "verifier", "choices", "tests", "function", "metadata", "domain")

MAX_QUESTION = 1 << 20
"""Characters of a question; longer ones are not kept in memory until they turn out to have too many tokens."""

ROLES = ("system", "user", "assistant")

_LETTER_MARKS = (".", ")", ":", "]", ").", ".)", "):")
"""Marks that may stand between the letter of a choice and its text."""

Message = dict[str, str]


class RowError(ValueError):
    """A row that can't be used: `reason` is counted, the text says what is wrong with this one."""

    def __init__(self, reason: Reason, text: str):
        self.reason: Reason = reason
        super().__init__(text)


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One question.

    position: that of its row in the source
    messages: the conversation without what the domain adds
    """

    position: int
    messages: tuple[Message, ...]
    entry: dict[str, Any]
    """What verifiers get, as JSON: question, answer (None: the row has none), metadata; where the row has them
    verifier, choices, tests, function."""

    @property
    def answer(self) -> str | None:
        """Return the item's answer; None where it has none."""
        return self.entry["answer"]

    @property
    def key(self) -> bytes:
        """Return a digest of 16 bytes, the same for equal questions, whatever the spaces at the ends of their lines."""
        turns = [m["content"].strip() for m in self.messages if m["role"] != "system"]
        text = "\0".join("\n".join(line.rstrip() for line in turn.splitlines()) for turn in turns)
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    @property
    def key_bits(self) -> int:
        """Return the first 64 bits of the key."""
        return int.from_bytes(self.key[:8])


def generated_item(position: int, item: Mapping[str, Any]) -> Item:
    """Return the item that a reasoning-gym generator made."""
    message = {"role": "user", "content": item["question"].strip()}
    return Item(position=position, messages=(message,), entry={**item, "verifier": "reasoning_gym"})


def parse_row(row: Mapping[str, Any], position: int, verifiers: Collection[str]) -> Item:
    """Return a row of our schema as an item. Raises RowError.

    verifiers: the domain's; where there are none, the row must name one.
    """
    choices = None if row.get("choices") is None else _texts(row["choices"], "choices")
    messages = _messages(row, choices or [])
    verifier = _verifier(row)
    applied = set(verifiers) or ({verifier} if verifier else set())
    if not applied:
        raise RowError("no verifier", "names no verifier, and the domain has no [[domain.verifiers]]")
    entry: dict[str, Any] = {"question": messages[-1]["content"], "answer": _answer(row)}
    entry["metadata"] = {} if row.get("metadata") is None else plain_object(row["metadata"], "value")
    if verifier:
        entry["verifier"] = verifier
    if choices is not None:
        entry["choices"] = choices
    if row.get("tests") is not None:
        entry["tests"] = _tests(row["tests"])
    if row.get("function") is not None:
        entry["function"] = _function(row["function"])
    _check_applied(entry, applied)
    _check_text(entry, messages)
    return Item(position=position, messages=tuple(messages), entry=entry)


def _messages(row: Mapping[str, Any], choices: Sequence[str]) -> list[Message]:
    question, prompt = row.get("question"), row.get("prompt")
    if question is not None and prompt is not None:
        raise RowError("malformed", "has a question and a prompt; remove one of them")
    text = (parsed(prompt) if isinstance(prompt, str) else prompt) if question is None else question
    if text is None:
        raise RowError("no question", "has neither question nor prompt")
    is_chat = isinstance(text, list) and text and all(isinstance(message, Mapping) for message in text)
    if isinstance(prompt, str) and not is_chat:
        text = prompt  # text that may be JSON, but not messages
    if isinstance(text, str) and not text.strip():
        raise RowError("no question", "its question is blank")
    if isinstance(text, str):
        return [{"role": "user", "content": _with_choices(text.strip(), choices)}]
    if question is not None or not isinstance(text, Sequence):
        raise RowError("malformed", f"its question is of type {type(text).__name__}, must be text")
    return _chat(text)


def _with_choices(question: str, choices: Sequence[str]) -> str:
    """Return the question followed by its choices, each after its letter, unless it contains all of them."""
    if len(choices) > len(ascii_uppercase):
        raise RowError("malformed", f"has {len(choices)} choices: must be at most {len(ascii_uppercase)}, by letter")
    if list(choices) == list(ascii_uppercase[: len(choices)]):  # nothing but the letters of what the question has
        return question
    lettered = list(zip(ascii_uppercase, choices, strict=False))
    known = _compact(question)
    if all(any(_compact(letter + mark + choice) in known for mark in _LETTER_MARKS) for letter, choice in lettered):
        return question
    return "\n".join([question, *(f"{letter}. {choice}" for letter, choice in lettered)])


def _compact(text: str) -> str:
    return "".join(text.lower().split())


def _chat(messages: Sequence[Any]) -> list[Message]:
    if not messages:
        raise RowError("no question", "its prompt has no messages")
    chat = []
    for number, message in enumerate(messages):
        content = _content(message)
        if content is None:
            raise RowError("malformed", f"prompt[{number}] has no role and text content")
        role = message.get("role")
        if role not in ROLES or (role == "system" and number):
            raise RowError("malformed", f"prompt[{number}].role = {role!r}: must be user or assistant, or first system")
        chat.append({"role": role, "content": content})
    if chat[-1]["role"] != "user":
        raise RowError("malformed", f"its last message is of role {chat[-1]['role']!r}, must be user")
    if not chat[-1]["content"].strip():
        raise RowError("no question", "its last message is blank")
    return chat


def _content(message: Any) -> str | None:
    """Return the text of a message, which may be in parts; None where it is not a message, or has other parts."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(content, list) and content:
        texts = [part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
        has_others = len(texts) < len(content) or any(part.get("type") != "text" for part in content)
        return None if has_others else "".join(texts)
    return content if isinstance(content, str) else None


def _answer(row: Mapping[str, Any]) -> str | None:
    answer = row.get("answer")
    if answer is None or (isinstance(answer, str) and not answer.strip()):
        return None
    if isinstance(answer, str):
        return answer.strip()
    if isinstance(answer, bool) or not isinstance(answer, int | float):
        raise RowError("malformed", f"its answer is of type {type(answer).__name__}, must be text or a number")
    if not math.isfinite(answer):
        raise RowError("bad answer", f"its answer is {answer}")
    return str(answer)


def _verifier(row: Mapping[str, Any]) -> str | None:
    verifier = row.get("verifier")
    if verifier is None:
        return None
    if verifier not in ROW_VERIFIERS:
        raise RowError("no verifier", f"verifier = {verifier!r}: must be one of {', '.join(ROW_VERIFIERS)}")
    return str(verifier)


def _texts(values: Any, name: str) -> list[str]:
    if not isinstance(values, Sequence) or isinstance(values, str) or not all(isinstance(v, str) for v in values):
        raise RowError("malformed", f"its {name} must be a list of texts")
    return list(values)


def _tests(tests: Any) -> list[dict[str, Any]]:
    if not isinstance(tests, Sequence) or isinstance(tests, str) or not tests:
        raise RowError("bad tests", "its tests must be a list that is not empty")
    plain = []
    for number, test in enumerate(tests):
        # A Parquet struct has all fields of all rows, null where a row lacks them.
        fields = {k: v for k, v in test.items() if v is not None} if isinstance(test, Mapping) else {}
        if isinstance(fields.get("arguments"), list) and set(fields) <= {"arguments", "result"}:
            plain.append({"arguments": fields["arguments"], "result": fields.get("result")})
            continue
        if set(fields) not in ({"input", "output"}, {"assert"}) or not all(isinstance(v, str) for v in fields.values()):
            raise RowError(
                "bad tests", f"tests[{number}] has neither input and output nor assert, as texts, nor arguments"
            )
        plain.append(fields)
    return plain


def _function(name: Any) -> str:
    if not isinstance(name, str) or not name.isidentifier():
        raise RowError("bad tests", f"function = {name!r}: must be the name of a function")
    return name


def _check_applied(entry: Mapping[str, Any], applied: set[str]) -> None:
    """Raise RowError unless the row has what these verifiers need."""
    answer = entry["answer"]
    in_need = sorted(name for name in applied if VERIFIERS[name].needs_answer)
    if answer is None and in_need:
        raise RowError("no answer", f"has no answer, which verifier {in_need[0]!r} needs")
    if "code" in applied:
        _check_tests(entry)
    generator = entry["metadata"].get("source_dataset")
    if "reasoning_gym" in applied and not (isinstance(generator, str) and generator in ALLOWED):
        raise RowError(
            "no verifier", f"metadata.source_dataset = {generator!r:.60}: must name a generator whose scorer is allowed"
        )
    if "math" in applied and "####" in answer:
        raise RowError("bad answer", "its answer is a whole solution ('####'); keep what follows, or convert the file")
    for name in sorted(applied):
        try:
            VERIFIERS[name].check_item(entry)
        except ValueError as error:
            raise RowError("bad answer", f"can't be scored by verifier {name!r}: {error}") from None


def _check_tests(entry: Mapping[str, Any]) -> None:
    if "tests" not in entry:
        raise RowError("bad tests", "has no tests, which verifier 'code' needs")
    try:
        parse_tests(entry)
    except ValueError as error:
        raise RowError("bad tests", f"has a test that can't be used: {error}") from None


def _check_text(entry: Mapping[str, Any], messages: Sequence[Message]) -> None:
    """Raise RowError for text that a tokenizer or a worker can't take."""
    contents = [m["content"] for m in messages]
    if any("\0" in text for text in [*contents, entry["answer"] or ""]):
        raise RowError("malformed", "has a NUL character")
    if sum(map(len, contents)) > MAX_QUESTION:
        raise RowError("too long", f"has a question of more than {MAX_QUESTION:,} characters")
    try:
        json.dumps([contents, {**entry, "metadata": None}], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RowError("malformed", "contains invalid Unicode (an unpaired surrogate)") from None
