"""Make the parsers of subcommands, and report bad input."""

import argparse
import os
import sys

from megatron_mcpo.config.config import ConfigError

FAILED = 1
REFUSED = 2


def parser(command: str, description: str, *, example: str) -> argparse.ArgumentParser:
    """Return the parser of a subcommand; options are not abbreviated, since unknown ones are overrides of keys."""
    return argparse.ArgumentParser(
        prog=f"mcpo {command}",
        description=description,
        epilog=f"example: mcpo {command} {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def refuse(error: ConfigError) -> int:
    """Print what is wrong on stderr, a line per problem and once per host; return the exit code of bad input."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("\n".join(error.problems), file=sys.stderr)
    return REFUSED
