"""What the conversion tools have in common: options, exit codes, progress."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from megatron_mcpo.convert.compare import Comparison
from megatron_mcpo.convert.convert import VerificationError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Arguments with SRC and DST as `source` and `final`, and `dtype` as a torch.dtype or None."""
    parser.add_argument("source", type=Path, metavar="SRC")
    parser.add_argument("final", type=Path, metavar="DST", help="must not exist")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; left out: the source's")
    parser.add_argument(
        "--verify-forward",
        action=argparse.BooleanOptionalAction,
        help="compare logits with transformers; left out: those of small models",
    )
    known = parser.parse_args(arguments)
    known.dtype = DTYPES.get(known.dtype)
    return known


def size(text: str) -> int:
    """A number of something, on a command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number from 1 up")
    return int(text)


def guarded(work: Callable[[], int]) -> int:
    """The exit code: `work`'s; 1 where the result was found wrong; 2 where the user has to mend something.

    Of several processes that fail together the first says why.
    """
    try:
        return work()
    except (ValueError, OSError) as error:
        if _is_first():
            print(error, file=sys.stderr)
        return 1 if isinstance(error, VerificationError) else 2


def tell(known: argparse.Namespace, compared: Comparison) -> int:
    """Say what was converted and compared; returns the exit code."""
    say(f"{known.final}: {compared.num_tensors} tensors, read back from the disk: every bit is as in {known.source}")
    return 0


def say(text: str) -> None:
    if _is_first():
        print(text, flush=True)


def _is_first() -> bool:
    """Of torchrun's processes, or the only one."""
    return os.environ.get("RANK", "0") == "0"
