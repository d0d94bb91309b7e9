"""Explain an error of pydantic in one line: the key, its value, the rule and the fix. Imports no torch.

Except for `extends`, this file knows no keys: it asks the pydantic model that is passed in.
"""

import difflib
import re
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from megatron_mcpo.config.toml_io import EXTENDS

_LONGEST_SHOWN_VALUE = 60


def explain(error: ErrorDetails, model: type[BaseModel]) -> str:
    """Return one line for one error: key, value, rule and fix."""
    loc = error["loc"]
    where = dotted(loc)
    kind = error["type"]
    field = field_at(loc, model)
    if kind == "extra_forbidden":
        if loc[-1] == EXTENDS:
            return f"{where}: must be a key of the whole file. Move it to the top, above the first [table]."
        top = [] if len(loc) > 1 else [EXTENDS]
        return f"{where}: unknown key. {_nearest(str(loc[-1]), [*_section(loc[:-1], model).model_fields, *top])}"
    if kind == "missing":
        return f"{where}: missing. Add {_what_to_add(field, where)}.{_meaning(field)}"
    if kind in ("model_type", "dict_type"):
        return f"{where} = {shown(error['input'])}: must be a table. Write it with its keys as [{where}]."
    if kind == "list_type" and field and section_in(field.annotation):
        return f"{where} = {shown(error['input'])}: must be a list of tables. Write [[{where}]], in double brackets."
    if kind == "value_error":  # from a validator of the schema, which says all of it
        return f"{where} = {shown(error['input'])}: {error['msg'].removeprefix('Value error, ')}"
    rule = re.sub(r"^(Input|String|List) should", "must", error["msg"])
    default = field.default if field else None
    hint = "" if default is None or default is PydanticUndefined else f" Default: {default!r}."
    return f"{where} = {shown(error['input'])}: {rule}.{_meaning(field)}{hint}"


def dotted(loc: Sequence[int | str]) -> str:
    """Return a location as text, such as `domain[0].sources[1].file`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")


def shown(value: Any) -> str:
    """Return a value as a message shows it: its Python form, cut off where it is long."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN_VALUE else text[:_LONGEST_SHOWN_VALUE] + "..."


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


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(known)}."


def _meaning(field: FieldInfo | None) -> str:
    return f" Meaning: {field.description}." if field and field.description else ""


def _what_to_add(field: FieldInfo | None, where: str) -> str:
    section = section_in(field.annotation) if field else None
    if section is None:
        return "it"
    required = [key for key, info in section.model_fields.items() if info.is_required()]
    return f"a table {where!r} with {', '.join(required)}"


def _section(loc: Sequence[int | str], model: type[BaseModel]) -> type[BaseModel]:
    field = field_at(loc, model)
    return (section_in(field.annotation) if field else None) or model
