"""Explain an error of pydantic in one line: the key, its value, the rule and the fix. Imports no torch.

Except for `extends`, this file knows no keys: it asks the pydantic model that is passed in.
"""

import difflib
from collections.abc import Sequence
from datetime import date, time
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from megatron_mcpo.config.toml_io import EXTENDS

_LONGEST_SHOWN_VALUE = 60

RULES: dict[str, tuple[str, str]] = {
    "int_type": ("be an integer", "Write it without quotes and without a decimal point, such as 8"),
    "float_type": ("be a number", "Write it without quotes, such as 0.5"),
    "bool_type": ("be true or false", "Write one of them, without quotes"),
    "string_type": ("be a text", "Put it in quotes"),
    "string_unicode": ("be valid Unicode", "Write it with valid characters"),
    "string_too_short": ("not be empty", "Fill it in"),
    "string_pattern_mismatch": ("match {pattern}", "Write it{example}"),
    "list_type": ("be a list", "Put it in square brackets"),
    "too_short": ("not be empty", "Add {table}"),
    "literal_error": ("be {expected}", "Choose one of the allowed values"),
    "finite_number": ("be finite", "Write a number, such as 0.5"),
    "greater_than": ("be greater than {gt}", "Raise it"),
    "greater_than_equal": ("be at least {ge}", "Raise it"),
    "less_than": ("be less than {lt}", "Lower it"),
    "less_than_equal": ("be at most {le}", "Lower it"),
    "invalid-json-value": ("be a text, a number, true or false, a list or a table", "Put a date or a time in quotes"),
    "recursion_depth_exceeded": ("nest lists and tables less than 250 deep", "Flatten it"),
}
"""What a value must do and how to correct it, by pydantic's type of error: those that single values can cause."""


def explain(error: ErrorDetails, model: type[BaseModel]) -> str:
    """Return one line for one error: key, value, rule and fix."""
    kind = error["type"]
    field = field_at(error["loc"], model)
    loc = _place(error, model)
    where = dotted(loc)
    if kind == "extra_forbidden":
        if loc[-1] == EXTENDS:
            return f"{where}: must be a key of the whole file. Move it to the top, above the first [table]."
        top = [] if len(loc) > 1 else [EXTENDS]
        return f"{where}: unknown key. {_nearest(str(loc[-1]), [*_section(loc[:-1], model).model_fields, *top])}"
    if kind == "missing":
        return f"{where}: missing. Add {_what_to_add(field, loc)}.{_meaning(field)}"
    if kind in ("model_type", "dict_type"):
        return f"{where} = {shown(error['input'])}: must be a table. Write it with its keys as {_header(loc)}."
    if kind == "list_type" and field and section_in(field.annotation):
        return (
            f"{where} = {shown(error['input'])}: must be a list of tables. Write [{_header(loc)}], in double brackets."
        )
    if kind == "value_error":  # from a validator of the schema, which says all of it
        return f"{where} = {shown(error['input'])}: {error['msg'].removeprefix('Value error, ')}"
    rule, fix = RULES[kind]
    words = {"table": f"[{_header(loc)}]", "example": _example(field.annotation, field.examples) if field else ""}
    words |= {name: _plain(value) for name, value in error.get("ctx", {}).items()}
    default = field.default if field else None
    hint = "" if default is None or default is PydanticUndefined else f" Default: {shown(default)}."
    said = f"must {rule.format(**words)}. {fix.format(**words)}."
    return f"{where} = {shown(error['input'])}: {said}{_meaning(field)}{hint}"


def dotted(loc: Sequence[int | str]) -> str:
    """Return a location as text, such as `domain[0].sources[1].file`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")


def shown(value: Any) -> str:
    """Return a value as a message shows it: Python's form, but TOML's of true and dates; cut off where it is long."""
    text = str(value) if isinstance(value, bool | date | time) else repr(value)
    text = text.lower() if isinstance(value, bool) else text
    return text if len(text) <= _LONGEST_SHOWN_VALUE else text[:_LONGEST_SHOWN_VALUE] + "..."


def _header(loc: Sequence[int | str]) -> str:
    """Return the line that begins a table, such as [run], [[domain]] or [domain.sources.options]."""
    name = ".".join(part for part in loc if isinstance(part, str))
    return f"[[{name}]]" if isinstance(loc[-1], int) else f"[{name}]"


def section_in(annotation: Any) -> type[BaseModel] | None:
    """Return the section in an annotation such as Section, list[Section] or Section | None; None if there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := section_in(part))), None)


def field_at(loc: Sequence[int | str], model: type[BaseModel]) -> FieldInfo | None:
    """Return the innermost known field on the way to `loc`: below a free-form table that is the field of the table."""
    field: FieldInfo | None = None
    section: type[BaseModel] | None = model
    for key in loc:
        if isinstance(key, int) or section is None:
            continue
        if key not in section.model_fields:
            return None
        field = section.model_fields[key]
        section = section_in(field.annotation)
    return field


def _place(error: ErrorDetails, model: type[BaseModel]) -> tuple[int | str, ...]:
    """Return the location of an error, in a free-form table without the tags that pydantic puts before nested keys."""
    loc = error["loc"]
    if error["type"] not in ("invalid-json-value", "recursion_depth_exceeded"):
        return loc
    field = field_at(loc, model)
    depth = next(n for n in range(1, len(loc) + 1) if field_at(loc[:n], model) is field)
    # The place at which the nesting was given up is hundreds of keys long.
    return loc[:depth] + (loc[depth::2] if error["type"] == "invalid-json-value" else ())


def _example(annotation: Any, examples: list[Any] | None) -> str:
    """Return " like" and the first example of a type such as Name, Name | None or list[Name]; "" if it has none."""
    parts = [annotation]
    while parts and not examples:
        part = parts.pop()
        parts += get_args(part)
        examples = part.examples if isinstance(part, FieldInfo) else None
    return f" like {examples[0]!r}" if examples else ""


def _plain(value: Any) -> Any:
    """Return a bound as it would be written: 0 where pydantic says 0.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(known)}."


def _meaning(field: FieldInfo | None) -> str:
    return f" Meaning: {field.description}." if field and field.description else ""


def _what_to_add(field: FieldInfo | None, loc: Sequence[int | str]) -> str:
    section = section_in(field.annotation) if field else None
    if field is None or section is None:
        return "it"
    header = _header(loc) if section is field.annotation else f"[{_header(loc)}]"
    required = [key for key, info in section.model_fields.items() if info.is_required()]
    return f"a table {header}" + (f" with {', '.join(required)}" if required else "")


def _section(loc: Sequence[int | str], model: type[BaseModel]) -> type[BaseModel]:
    field = field_at(loc, model)
    return (section_in(field.annotation) if field else None) or model
