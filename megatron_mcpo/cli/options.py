"""Make the parsers of subcommands, and report bad input."""

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from megatron_mcpo.config.config import ConfigError

FAILED = 1
REFUSED = 2


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
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("\n".join(error.problems), file=sys.stderr)
    return REFUSED
