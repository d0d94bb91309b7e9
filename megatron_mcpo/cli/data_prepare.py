"""Convert public data sets, as their hub keeps them, to JSON lines in our schema (megatron_mcpo/data/rows.py).

`mcpo data prepare SET FILE... --out datasets/NAME.jsonl`
FILE: .parquet or .jsonl of the set. `--list` names the sets and where they come from. Rows that can't be used are
counted by reason. Exit code 2: none can be used, or a file can't be read.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from megatron_mcpo.cli import options
from megatron_mcpo.storage.files import write_atomically

Row = Mapping[str, Any]


class Unusable(ValueError):
    """The reason why a row is skipped."""


@dataclass(frozen=True, kw_only=True)
class PublicSet:
    """A public data set. hub: its name there, and its licence"""

    hub: str
    convert: Callable[[Row], dict[str, Any]]


def _gsm8k(row: Row) -> dict[str, Any]:
    _, mark, answer = row["answer"].rpartition("####")
    if not mark:
        raise Unusable("no #### before its answer")
    return {"question": row["question"], "answer": answer.strip().replace(",", ""), "verifier": "math"}


def _math(row: Row) -> dict[str, Any]:
    """Convert a row whose answer is in the last box of its solution."""
    answer = row.get("answer") or _last_box(row["solution"])
    kept = {name: row[name] for name in ("level", "type", "subject") if row.get(name) is not None}
    return {"question": row["problem"], "answer": answer, "verifier": "math", "metadata": kept}


def _last_box(solution: str) -> str:
    _, mark, inner = solution.rpartition(r"\boxed{")
    depth = 1
    for end, character in enumerate(inner):
        depth += (character == "{") - (character == "}")
        if mark and depth == 0:
            return inner[:end]
    raise Unusable(r"no \boxed{} in its solution")


def _choice(question: str, texts: Sequence[str], number: int) -> dict[str, Any]:
    if not 0 <= number < len(texts) <= len(ascii_uppercase):
        raise Unusable("its answer is none of its choices")
    lines = [f"{letter}. {text}" for letter, text in zip(ascii_uppercase, texts, strict=False)]
    return {
        "question": "\n".join([question, *lines]),
        "answer": ascii_uppercase[number],
        "choices": list(texts),
        "verifier": "choice",
    }


def _labelled(question: str) -> Callable[[Row], dict[str, Any]]:
    """Return the conversion of rows with choices: {label: [...], text: [...]} and answerKey: a label.

    question: the column of the question.
    """

    def convert(row: Row) -> dict[str, Any]:
        labels = row["choices"]["label"]
        if row["answerKey"] not in labels:
            raise Unusable("its answer is none of its choices")
        return _choice(row[question], row["choices"]["text"], labels.index(row["answerKey"]))

    return convert


def _mmlu(row: Row) -> dict[str, Any]:
    return _choice(row["question"], row["choices"], row["answer"]) | {"metadata": {"subject": row.get("subject")}}


def _mbpp(row: Row) -> dict[str, Any]:
    """Convert a row of MBPP; the tests name the function, so they are shown, as in the paper (arXiv 2108.07732)."""
    if row.get("test_setup_code") or row.get("test_imports"):
        raise Unusable("its tests need code of their own")
    tests = list(row["test_list"])
    if not all(re.match(r"assert\b", test) for test in tests):
        raise Unusable("a test is not an assert")
    shown = "\n".join(tests)
    text = row.get("text") or row["prompt"]
    return {
        "question": f"{text}\nYour code should pass these tests:\n{shown}",
        "answer": "```python\n" + row["code"].replace("\r\n", "\n").strip() + "\n```",
        "tests": [{"assert": test} for test in tests],
        "verifier": "code",
    }


SETS = {
    "gsm8k": PublicSet(hub="openai/gsm8k (MIT)", convert=_gsm8k),
    "math": PublicSet(hub="EleutherAI/hendrycks_math, HuggingFaceH4/MATH-500 (MIT)", convert=_math),
    "commonsense_qa": PublicSet(hub="tau/commonsense_qa (MIT)", convert=_labelled("question")),
    "ai2_arc": PublicSet(hub="allenai/ai2_arc (CC BY-SA 4.0)", convert=_labelled("question")),
    "openbookqa": PublicSet(hub="allenai/openbookqa (Apache-2.0)", convert=_labelled("question_stem")),
    "mmlu": PublicSet(hub="cais/mmlu (MIT)", convert=_mmlu),
    "mbpp": PublicSet(hub="google-research-datasets/mbpp (CC BY 4.0)", convert=_mbpp),
}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; end the program, as argparse does, where it cannot be carried out."""
    parser = options.parser("data prepare", __doc__, example="gsm8k train.parquet --out datasets/gsm8k.jsonl")
    parser.add_argument("set", choices=[*SETS], nargs="?", metavar="SET")
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE")
    parser.add_argument("--out", type=Path, help="the .jsonl file to write")
    parser.add_argument("--list", action="store_true", help="name the sets")
    known = parser.parse_args(arguments)
    if known.list:
        return known
    if known.set is None or not known.files or known.out is None:
        parser.error("give a SET, its files and --out, or --list")
    if known.out.suffix != ".jsonl" or known.out.is_dir():
        parser.error(f"--out {known.out}: must be a file that ends in .jsonl")
    if known.out.resolve() in [file.resolve() for file in known.files]:
        parser.error(f"--out {known.out}: must not be one of the files that are read. Give another")
    return known


def main(arguments: Sequence[str]) -> int:
    known = parse(arguments)
    if known.list:
        print("\n".join(f"{name:16}{public.hub}" for name, public in SETS.items()))
        return 0
    skipped: Counter[str] = Counter()
    lines = []
    for file in known.files:
        try:
            lines += [json.dumps(row) for row in converted(SETS[known.set], file, skipped)]
        except (OSError, ValueError) as error:
            print(f"{file}: can't be read ({error}); give the set's .parquet or .jsonl files", file=sys.stderr)
            return options.REFUSED
    reasons = "".join(f"; {count}: {reason}" for reason, count in skipped.most_common())
    print(f"{known.set}: {len(lines)} rows, {skipped.total()} skipped{reasons}")
    if not lines:
        hub = SETS[known.set].hub
        print(f"{known.out}: not written, since no row can be used. Give files of {hub}", file=sys.stderr)
        return options.REFUSED
    try:
        known.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(known.out, ("\n".join(lines) + "\n").encode())
    except OSError as error:
        print(f"--out {known.out}: can't be written ({error.strerror or error}). Give another", file=sys.stderr)
        return options.REFUSED
    return 0


def converted(public: PublicSet, file: Path, skipped: Counter[str]) -> Iterator[dict[str, Any]]:
    """Yield the set's rows in our schema; count skipped rows by reason. Raises OSError, ValueError."""
    for row in _rows(file):
        try:
            yield public.convert(row)
        except Unusable as error:
            skipped[str(error)] += 1
        except (KeyError, TypeError, AttributeError) as error:
            missing = f"no column {error}" if isinstance(error, KeyError) else str(error)
            skipped[f"other columns than this set has ({missing})"] += 1


def _rows(file: Path) -> Iterator[Row]:
    if file.suffix == ".parquet":
        import pyarrow.parquet

        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=64):
            yield from batch.to_pylist()
        return
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number} is not JSON") from error
