"""Apply overrides of the command line, `--section.key VALUE`, to a configuration. Imports no torch."""

# Written by hand although pydantic-settings has CliSettingsSource (tried with 2.16.3), because argparse, which that is
# built on, takes messages away: it stops at the first kind of problem, before any value is validated; it does not name
# the known key that is nearest to an unknown one; it refuses `--optimizer.lr -1e-5` as an option without a value.
# Besides, it reads 3.0 as the integer 3, which a file is refused for, and it accepts whole tables (`--domain JSON`).
# Undoing each of these would take more code than this file has.

import tomllib
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from megatron_mcpo.config.explain import field_at
from megatron_mcpo.config.toml_io import Layers

COMMAND_LINE = "the command line"

SHORT = {"--resume": "--run.resume", "--init-from": "--model.init_from"}
"""Short forms of overrides that are typed often."""


def apply_overrides(layers: Layers, overrides: Sequence[str], model: type[BaseModel]) -> list[str]:
    """Set `--section.key VALUE` and `--section.key=VALUE` in the values of `layers`; return what could not be set."""
    problems = []
    rest = list(overrides)
    while rest:
        flag = rest.pop(0)
        name, equals, text = flag.partition("=")
        key = SHORT.get(name, name).removeprefix("--")
        section, dot, name = key.partition(".")
        if not (flag.startswith("--") and section and dot and name):
            meant = [f"--{table}.{key}" for table in model.model_fields if field_at([table, key], model)] if key else []
            hint = f" Did you mean {' or '.join(meant)}?" if meant else ""
            problems.append(f"{flag}: not an override. Write --section.key VALUE.{hint}")
            if not equals and rest and not rest[0].startswith("--"):
                rest.pop(0)
            continue
        if not equals:
            # A value may start with one dash, as -1 does; two dashes are the next override.
            if not rest or rest[0].startswith("--"):
                problems.append(f"{flag}: has no value. Write {flag} VALUE (or {flag}=VALUE).")
                continue
            text = rest.pop(0)
        table = {} if "." in name else layers.values.setdefault(section, {})
        if not isinstance(table, dict) or "." in name:
            problems.append(f"--{key}: overrides reach only the keys of single tables. Edit {section!r} in the file.")
            continue
        field = field_at([section, name], model)
        # Only TOML syntax tells a number from a text; where a text is wanted, '007' and '2026-01-01' are texts.
        table[name] = text if field is not None and field.annotation is str else _parse(text)
        layers.origins.setdefault(section, {})[name] = COMMAND_LINE
    return problems


def _parse(text: str) -> Any:
    """Return the TOML value that a text spells, or the text itself if it spells none: nobody has to quote twice."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError):
        return text
    return parsed["value"] if parsed.keys() == {"value"} else text
