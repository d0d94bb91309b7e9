"""List every key of the configuration with its type, default, range and meaning. Imports no torch.

`mcpo config keys` and the generator of the documentation print this list; the schema is where it is written down.
"""

import inspect
import json
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from megatron_mcpo.config.config import Config
from megatron_mcpo.config.explain import section_in
from megatron_mcpo.config.toml_io import EXTENDS, EXTENDS_MEANING

REQUIRED = "required"
UNSET = "unset"

_TYPES = {"string": "text", "boolean": "true or false", "object": "table"}
_BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table of the configuration.

    name: such as `run` or `domain.sources`
    repeated: whether there may be several, written in double brackets
    """

    name: str
    repeated: bool
    meaning: str

    @property
    def heading(self) -> str:
        """Return the name as TOML writes it, such as `[run]` or `[[domain]]`."""
        return f"[[{self.name}]]" if self.repeated else f"[{self.name}]"


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key of the configuration, in words.

    section: name of its table, such as `run` or `domain.sources`; empty for a key at the top of the file
    type: such as `integer`, `text` or `list of tables`
    default: a TOML value, or REQUIRED, or UNSET where the key has no value unless it is given
    range: the values that are allowed, such as `> 0`; empty where the type says all of it
    """

    section: str
    name: str
    type: str
    default: str
    range: str
    meaning: str


def tables() -> list[Table]:
    """Return every table of the configuration in the order of the schema, each followed by the tables within it."""
    return [table for table, _ in _tables_in("", Config)]


def keys() -> list[Key]:
    """Return every key, section by section in the order of the schema.

    Sections themselves are not keys, but lists of tables within a section (`domain.sources`) are. `extends` comes
    first: it belongs to the file, and the resolved configuration does not have it.
    """
    found = [Key(section="", name=EXTENDS, type="text", default=UNSET, range="not empty", meaning=EXTENDS_MEANING)]
    for table, model in _tables_in("", Config):
        schema = model.model_json_schema()
        found += [
            _key(table.name, name, about, required=name in schema.get("required", ()))
            for name, about in schema["properties"].items()
        ]
    return found


def _tables_in(prefix: str, model: type[BaseModel]) -> list[tuple[Table, type[BaseModel]]]:
    """Return the tables within a model, each followed by its own, with the models of their keys."""
    found: list[tuple[Table, type[BaseModel]]] = []
    for name, field in model.model_fields.items():
        if inner := section_in(field.annotation):
            meaning = inspect.cleandoc(inner.__doc__ or "")
            found.append(
                (Table(name=f"{prefix}{name}", repeated=inner is not field.annotation, meaning=meaning), inner)
            )
            found += _tables_in(f"{prefix}{name}.", inner)
    return found


def _key(section: str, name: str, schema: dict[str, Any], *, required: bool) -> Key:
    """Return the key that a property of a JSON schema describes."""
    value = next((part for part in schema.get("anyOf", ()) if part.get("type") != "null"), schema)
    default = json.dumps(schema.get("default"))
    return Key(
        section=section,
        name=name,
        type=_type(value),
        default=REQUIRED if required else UNSET if default == "null" else default,
        range=_range(value),
        meaning=schema["description"],
    )


def _type(schema: dict[str, Any]) -> str:
    if schema.get("type") == "array":
        items = schema["items"]
        return "list of tables" if "$ref" in items else f"list of {_type(items)}s"
    return _TYPES.get(schema["type"], schema["type"])


def _range(schema: dict[str, Any]) -> str:
    """Return the values that a JSON schema allows, in words; empty where it has no rule beyond the type."""
    if "enum" in schema:
        return "one of " + ", ".join(map(json.dumps, schema["enum"]))
    if "pattern" in schema:
        return f"matches {schema['pattern']}"
    if schema.get("minLength") or schema.get("minItems"):
        return "not empty"
    if items := (_range(schema["items"]) if schema.get("type") == "array" else ""):
        return f"each {items}"
    return ", ".join(f"{sign} {schema[bound]}" for bound, sign in _BOUNDS.items() if bound in schema)
