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
    except (KeyError, TypeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _encoded(completion: Completion) -> dict[str, Any]:
    experts: dict[str, Any] = {}
    if completion.experts is not None:
        kind = "B" if completion.experts.dtype is torch.uint8 else "h"
        numbers = array(kind, completion.experts.flatten().tolist())
        experts = {"experts": {"shape": list(completion.experts.shape), "kind": kind, "numbers": _text(numbers)}}
    return experts | {
        "tokens": _text(array("i", completion.token_ids)),
        "logprobs": _text(array("f", completion.logprobs)),
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


def _tensor(said: Mapping[str, Any]) -> Tensor:
    """Return experts as they were written."""
    dtype = {"B": torch.uint8, "h": torch.int16}[said["kind"]]
    return torch.tensor(_numbers(said["kind"], said["numbers"]), dtype=dtype).view(*map(int, said["shape"]))


def _text(numbers: "array[Any]") -> str:
    return base64.b64encode(numbers.tobytes()).decode()


def _numbers(kind: str, text: str) -> "array[Any]":
    numbers = array(kind)
    numbers.frombytes(base64.b64decode(text, validate=True))
    return numbers
