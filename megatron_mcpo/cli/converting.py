"""Share between the subcommands of `mcpo convert`: options, exit codes, progress."""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from megatron_mcpo.cli import options
from megatron_mcpo.convert.compare import Comparison
from megatron_mcpo.convert.convert import VerificationError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Add the shared options and parse: SRC as `source`, DST as `final`, and `dtype` as a torch.dtype or None."""
    parser.add_argument("source", type=Path, metavar="SRC")
    parser.add_argument("final", type=Path, metavar="DST", help="must not exist")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: the source's)")
    parser.add_argument(
        "--verify-forward",
        action=argparse.BooleanOptionalAction,
        help="compare logits with transformers (default: for small models)",
    )
    known = parser.parse_args(arguments)
    known.dtype = DTYPES.get(known.dtype)
    return known


def positive(text: str) -> int:
    """Return the positive whole number that an option gives."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number from 1 up")
    return int(text)


def exit_code(work: Callable[[], int]) -> int:
    """Run `work` and return its exit code; 1 if the result is wrong, 2 for what the user can correct.

    Of several processes that fail together one per host prints why.
    """
    try:
        return work()
    except (ValueError, OSError) as error:
        options.say_why(str(error))
        return options.FAILED if isinstance(error, VerificationError) else options.REFUSED


def report_success(known: argparse.Namespace, compared: Comparison) -> int:
    """Print what was converted and compared; return the exit code."""
    same = "every bit as in" if known.dtype is None else "every value as the rounded or widened one in"
    say(f"{known.final}: {compared.num_tensors} tensors, read back from the disk, {same} {known.source}")
    if compared.left_out:
        why = "rotary frequencies are computed, and an output layer that equals a tied embedding is stored once"
        say(f"left out: {', '.join(compared.left_out)} ({why})")
    return 0


def say(text: str) -> None:
    """Print a line on the progress, in one process only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)
