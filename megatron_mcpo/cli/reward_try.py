"""Score responses with a verifier as a run does, and show what it takes for the answer.

The response is cut at its thoughts and <answer> first (docs/rewards.md). The item is --answer, or a row of a data file
(--row FILE.json), or both: --answer replaces the row's answer. --pairs FILE.jsonl scores a file: each line is a row
with a column `response`; --kind and --answer replace the columns `verifier` and `answer` of all lines.

With --json one object for each response: score (0 to 1), correct, extracted (what is compared with the answer), error
(why there is no score; else null). Exit code 1: some response could not be judged; 2: the arguments are bad.
"""

import json
import re
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_mcpo.cli import options
from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.config.domain_schema import RewardsConfig
from megatron_mcpo.data.files import Origin, RawRow
from megatron_mcpo.data.rows import RowError, parse_row
from megatron_mcpo.data.verl import from_verl, is_verl
from megatron_mcpo.rewards.registry import ROW_VERIFIERS
from megatron_mcpo.rewards.trial import Outcome, Trial, run_trials

_QUESTION = "(no question)"
"""Of rows without one: no verifier of rows needs it."""

_PREDICATE = re.compile(r"(?:has|is|names|contains|makes|can't)\b")
"""How a RowError begins whose subject is the item."""


def main(arguments: Sequence[str]) -> int:
    parser = options.parser("reward try", __doc__, example="--kind math --answer 6 --response '<think>..</think> 6'")
    parser.add_argument("--kind", choices=sorted(ROW_VERIFIERS), help="kind of verifier (default: that of the row)")
    parser.add_argument("--answer", help="correct answer")
    parser.add_argument("--response", help="response of a model, as text")
    parser.add_argument("--row", type=Path, metavar="FILE.json", help="row with answer, tests, choices or metadata")
    parser.add_argument("--pairs", type=Path, metavar="FILE.jsonl", help="rows, each with a column `response`")
    parser.add_argument("--json", action="store_true", help="one line of JSON for each response")
    known = parser.parse_args(arguments)
    if (known.response is None) == (known.pairs is None):
        parser.error("give --response, or --pairs, and not both")
    if known.pairs and known.row:
        parser.error("--row belongs to --response; the lines of --pairs are rows")
    try:
        found = list(_trials(known))
        judged = iter(run_trials([trial for trial in found if isinstance(trial, Trial)], RewardsConfig()))
    except ConfigError as error:
        return options.refuse(error)
    except ValueError as error:
        print(error, file=sys.stderr)
        return options.REFUSED
    outcomes = [next(judged) if isinstance(trial, Trial) else _unusable(trial) for trial in found]
    _print(outcomes, as_json=known.json)
    return options.FAILED if any(outcome.error is not None for outcome in outcomes) else 0


def _trials(known: Namespace) -> Iterator[Trial | RowError]:
    """Yield the responses with their items, or why an item can't be used. Raises ConfigError for unreadable files."""
    if known.pairs is None:
        yield _trial(_read(known.row) if known.row else {}, known, known.response)
        return
    for row in _pairs(known.pairs):
        response = None if isinstance(row, RowError) else row.get("response")
        if isinstance(row, RowError):
            yield row
        elif not isinstance(response, str):
            yield RowError("malformed", "has no column `response` with a text")
        else:
            yield _trial(row, known, response)


def _pairs(path: Path) -> Iterator[RawRow]:
    try:
        yield from (row for _, row in Origin(path=str(path)).rows())
    except ConfigError as error:
        raise ConfigError([problem.replace("domain.sources:", "--pairs", 1) for problem in error.problems]) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError([f"--row {path}: must be a file with one JSON object ({error}). Correct it"]) from None
    if not isinstance(row, dict):
        raise ConfigError([f"--row {path}: must be a JSON object (it is a {type(row).__name__}). Correct it"])
    return row


def _trial(row: Mapping[str, Any], known: Namespace, response: str) -> Trial | RowError:
    given = {"verifier": known.kind, "answer": known.answer}
    replaced = {name: value for name, value in given.items() if value is not None}
    try:
        ours = {**(from_verl(row, [known.kind] if known.kind else []) if is_verl(row) else row), **replaced}
        if ours.get("question") is None and ours.get("prompt") is None:
            ours["question"] = _QUESTION
        item = parse_row(ours, 0, ())
    except RowError as error:
        return error
    return Trial(kind=item.entry["verifier"], entry=item.entry, response=response)


def _unusable(error: RowError) -> Outcome:
    text = str(error)
    if text.startswith("its "):
        sentence = f"the item's {text[4:]}"
    else:
        sentence = f"the item {text}" if _PREDICATE.match(text) else f"the item can't be used: {text}"
    return Outcome(score=None, correct=None, extracted=None, error=sentence)


def _print(outcomes: Sequence[Outcome], *, as_json: bool) -> None:
    for outcome in outcomes:
        if as_json:
            print(json.dumps(outcome.as_json()))
        elif outcome.error is not None:
            print(f"no score: {outcome.error}")
        else:
            state = "correct" if outcome.correct else "incorrect"
            print(f"score {outcome.score:g}, {state}, extracted {outcome.extracted!r}")
    if len(outcomes) > 1 and not as_json:
        correct, failed = sum(o.correct is True for o in outcomes), sum(o.error is not None for o in outcomes)
        print(f"{correct} of {len(outcomes)} correct, {failed} without a score")
