"""Make items with reasoning-gym, in a process of its own: `python -m megatron_mcpo.data.generator_worker`.

Reads a JSON list of {"generator", "options", "seed", "size"} from standard input and writes a JSON list, in the same
order, of {"items": [...]} or {"error": text}. The process is its own because importing reasoning-gym takes seconds and
draws from the global random generators.
"""

import dataclasses
import difflib
import json
import os
import sys
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS

DRAWS_PER_ITEM = 20
"""Draws per requested item after which a generator's unique questions count as used up."""

RESERVED = {"seed": "run.seed does not reach the items", "size": "set by domain.items, shots and evaluation.items"}

NUM_PROVEN = 16
"""Items whose own answer must get full marks, after JSON, from the scorer that training uses."""


def make_items(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Make up to `size` items with unique questions, in the generator's order. Raises ValueError (value, rule, fix)."""
    name, options, size = request["generator"], request["options"], request["size"]
    if name not in DATASETS:
        raise ValueError(f"generator {name!r}: not a reasoning-gym dataset")
    _check_options(name, options)
    num_draws = DRAWS_PER_ITEM * size
    try:
        dataset = reasoning_gym.create_dataset(name, seed=request["seed"], size=num_draws, **options)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"options {options}: refused by reasoning-gym: {error}") from error
    items: dict[str, dict[str, Any]] = {}
    for draw in range(num_draws):
        item = _plain_item(dataset[draw])
        items.setdefault(item["question"], item)
        if len(items) == size:
            break
    unique = list(items.values())
    _prove(name, unique[:NUM_PROVEN])
    return unique


def _check_options(name: str, options: dict[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(DATASETS[name][1]) if field.name not in RESERVED]
    for option in options:
        if option in RESERVED:
            raise ValueError(f"option {option!r}: {RESERVED[option]}; remove it")
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known options: {', '.join(known)}"
            raise ValueError(f"option {option!r}: unknown; {hint}")


def _plain_item(item: dict[str, Any]) -> dict[str, Any]:
    """Return the item as the scorer will see it in training: converted to JSON and back."""
    question, answer = item["question"], item["answer"]
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"made an item with the question {question!r}; choose another generator")
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"made an item with the answer {answer!r}, which must be text; choose another generator")
    return json.loads(json.dumps(item))


def _prove(name: str, items: list[dict[str, Any]]) -> None:
    score = reasoning_gym.get_score_answer_fn(name)
    for item in items:
        marks = score(item["answer"].strip(), item)
        if marks < 0.99:
            raise ValueError(
                f"its scorer gives its own answer {item['answer']!r} only {marks}; choose another generator"
            )


def main() -> None:
    """Make the items that standard input asks for and write them to standard output."""
    # Generators may print, which must not reach standard output.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    replies: list[dict[str, Any]] = []
    for request in json.load(sys.stdin):
        try:
            replies.append({"items": make_items(request)})
        except Exception as error:  # whatever a generator does, the parent names domain and source
            text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            replies.append({"error": text})
    json.dump(replies, out)
    out.close()


if __name__ == "__main__":
    main()
