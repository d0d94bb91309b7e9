"""Write prompts under way into a checkpoint, and read them: what there is of their responses.

Tokens, log-probs and experts are written as bytes, so that a large run's take seconds.
"""

import base64
import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from megatron_mcpo.data.stream import ItemId
from megatron_mcpo.types import Completion, StopReason

FILE = "rollouts.json"
"""The file of a checkpoint that holds them."""


@dataclass(frozen=True, kw_only=True)
class Unfinished:
    """A prompt under way.

    number: in the order of drawing; item: what identifies the prompt
    completions: what there is of its responses, without texts; empty if nothing was sampled
    """

    number: int
    item: ItemId
    completions: tuple[Completion, ...]


def encode(unfinished: Sequence[Unfinished]) -> bytes:
    """Return the content of the file."""
    rows = [
        {
            "number": one.number,
            "item": one.item,
            "completions": [_encoded(completion) for completion in one.completions],
        }
        for one in unfinished
    ]
    return json.dumps(rows).encode()


def decode(content: bytes) -> list[Unfinished]:
    """Return what was written. Raises ValueError for anything else."""
    rows = json.loads(content)
    if not isinstance(rows, list):
        raise ValueError("must be a list")
    try:
        return [
            Unfinished(
                number=int(row["number"]),
                item=ItemId(*row["item"]),
                completions=tuple(_decoded(completion) for completion in row["completions"]),
            )
            for row in rows
        ]
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _encoded(completion: Completion) -> dict[str, Any]:
    experts = {} if completion.experts is None else {"experts": _said(completion.experts)}
    return experts | {
        "tokens": _text(array("i", completion.token_ids).tobytes()),
        "logprobs": _text(array("f", completion.logprobs).tobytes()),
        "versions": completion.outline.versions,
        "stop_reason": completion.stop_reason.value,
    }


def _decoded(row: Mapping[str, Any]) -> Completion:
    experts = row.get("experts")
    completion = Completion(
        experts=None if experts is None else _tensor(experts),
        token_ids=tuple(_numbers("i", row["tokens"])),
        logprobs=tuple(_numbers("f", row["logprobs"])),
        versions=tuple(chain.from_iterable([int(version)] * int(count) for version, count in row["versions"])),
        stop_reason=StopReason(row["stop_reason"]),
    )
    if not len(completion.token_ids) == len(completion.logprobs) == len(completion.versions):
        raise ValueError("tokens, log-probs and versions must be equally many")
    return completion


def _said(experts: Tensor) -> dict[str, Any]:
    bits = experts.dtype.itemsize * 8
    return {"shape": list(experts.shape), "bits": bits, "numbers": _text(experts.numpy().tobytes())}


def _tensor(said: Mapping[str, Any]) -> Tensor:
    """Return experts as they were written."""
    content = bytearray(base64.b64decode(said["numbers"], validate=True))
    dtype = {8: torch.uint8, 16: torch.int16}[said["bits"]]
    return torch.frombuffer(content, dtype=dtype).view(*map(int, said["shape"]))


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _numbers(kind: str, text: str) -> "array[Any]":
    numbers = array(kind)
    numbers.frombytes(base64.b64decode(text, validate=True))
    return numbers
