"""What the conversion tools have in common: options, exit codes, progress."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from megatron_mcpo.weights.convert import Comparison, VerificationError

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


def guarded(work: Callable[[], int]) -> int:
    """The exit code: `work`'s; 1 where the result was found wrong; 2 where the user has to mend something."""
    try:
        return work()
    except VerificationError as error:
        print(error, file=sys.stderr)
        return 1
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{error.filename or 'files'}: {error.strerror}; what was written so far is kept", file=sys.stderr)
        return 2


def tell(known: argparse.Namespace, compared: Comparison) -> int:
    """Say what was converted and compared; returns the exit code."""
    say(f"{known.final}: {compared.num_tensors} tensors, read back from the disk: every bit is as in {known.source}")
    return 0


def say(text: str) -> None:
    print(text, flush=True)
