"""Make the parsers of subcommands, and report bad input."""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.distributed.preemption import asked_to_stop

FAILED = 1
REFUSED = 2

_FIRST_SPEAKS_WITHIN = 30.0
"""Seconds that the other ranks of a host give its first one to say what is wrong."""

GPUS = "h100, h200, a100, b200, or a JSON file of measured rates"
"""What --gpu takes."""
_MISSING = "the following arguments are required: "
"""What argparse says before the names of arguments that were not given."""


class Parser(argparse.ArgumentParser):
    """The parser of a subcommand, whose refusals show an example instead of every option."""

    def error(self, message: str) -> NoReturn:
        """Print the problem, the example and where help is; end the program with the exit code of bad input."""
        names = message.removeprefix(_MISSING)
        verb = "are" if ", " in names else "is"
        problem = message if names == message else f"{names} {verb} missing. Give what is missing as in the example."
        self.exit(REFUSED, f"{self.prog}: {problem}\n{self.epilog}\nhelp:    {self.prog} --help\n")


def parser(command: str, description: str, *, example: str) -> Parser:
    """Return the parser of a subcommand; options are not abbreviated, since unknown ones are overrides of keys."""
    return Parser(
        prog=f"mcpo {command}",
        description=description,
        epilog=f"example: mcpo {command} {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_config(parser: Parser) -> None:
    """Add the argument CONFIG, which is parsed as `config`."""
    help_text = "TOML configuration; overrides follow as --section.key VALUE"
    parser.add_argument("config", type=Path, metavar="CONFIG", help=help_text)


def refuse(error: ConfigError) -> int:
    """Print what is wrong on stderr, a line per problem and once per host; return the exit code of bad input."""
    say_why("\n".join(error.problems))
    return REFUSED


def say_why(text: str) -> None:
    """Print on stderr, once per host, why all ranks are about to end.

    torchrun ends all ranks as soon as one has ended. So the other ranks wait for the host's first one, which may still
    be starting, and speak themselves if it does not.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0" or not _ended_by_torchrun():
        print(text, file=sys.stderr)


def _ended_by_torchrun() -> bool:
    """Wait for torchrun to end this rank because another one has ended; return whether that happened in time."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return True
    deadline = time.monotonic() + _FIRST_SPEAKS_WITHIN
    while not asked_to_stop() and time.monotonic() < deadline:
        time.sleep(0.05)
    return asked_to_stop()
