"""List the keys of a configuration with type, default, range and meaning.

SECTION is the name of a table, such as `run` or `domain.sources`; a table is printed with the tables within it. Keys of
single tables can be set on the command line, as --section.key VALUE; those of [[tables]] only in the file.
"""

import difflib
import json
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import asdict

from megatron_mcpo.cli import options
from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.config.reference import Key, Table, keys, tables

_WIDEST = 120


def main(arguments: Sequence[str]) -> int:
    """Print the keys of all sections or of one; return the exit code."""
    parser = options.parser("config keys", __doc__, example="contrastive")
    parser.add_argument(
        "section",
        nargs="?",
        metavar="SECTION",
        help="only the keys of this table, or one key, such as contrastive.top_k",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per key")
    known = parser.parse_args(arguments)
    names = [table.name for table in tables()]
    is_section = known.section is None or known.section in names
    single = [] if is_section else [key for key in keys() if f"{key.section}.{key.name}" == known.section]
    if not is_section and not single:
        near = difflib.get_close_matches(known.section, names, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        rule = f"SECTION = {known.section!r}: must be a section. {hint}Sections: {', '.join(names)}."
        return options.refuse(ConfigError([rule]))
    within = f"{known.section}."
    chosen = single or [key for key in keys() if known.section is None or f"{key.section}.".startswith(within)]
    if known.json:
        print("\n".join(json.dumps(asdict(key)) for key in chosen))
    else:
        print(_page(chosen, tables(), width=min(_WIDEST, shutil.get_terminal_size().columns)))
    return 0


def _page(chosen: Sequence[Key], sections: Sequence[Table], *, width: int) -> str:
    """Return the keys under the headings of their sections, with lines of at most `width` characters if possible."""
    headings = {table.name: [table.heading, *textwrap.wrap(table.meaning, width), ""] for table in sections}
    lines: list[str] = []
    for key in chosen:
        lines += headings.pop(key.section, [])
        of_values = f"{key.type}, {key.range}" if key.range else key.type
        lines += [f"  {key.name} = {key.default}", *_wrapped(of_values, width), *_wrapped(key.meaning, width), ""]
    return "\n".join(lines).rstrip()


def _wrapped(text: str, width: int) -> list[str]:
    indent = " " * 6
    return textwrap.wrap(text, max(width, 40), initial_indent=indent, subsequent_indent=indent, break_long_words=False)
