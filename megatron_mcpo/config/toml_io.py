"""Text to values and back for the configuration: TOML, command-line overrides, and what is wrong with a value.

Nothing here knows a key: the pydantic model that is passed in does. Imports no torch.
"""

import difflib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

Values = dict[str, Any]
_LONGEST_SHOWN_VALUE = 60


def read_toml(path: Path) -> tuple[Values, list[str]]:
    """The tables of a TOML file, or nothing and the problem that stood in the way."""
    fix = "give the path of a TOML configuration"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig")), []
    except FileNotFoundError:
        return {}, [f"{path}: no such file; {fix}"]
    except IsADirectoryError:
        return {}, [f"{path}: is a folder; {fix}"]
    except OSError as error:
        return {}, [f"{path}: can't be read ({error.strerror}); {fix}"]
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        return {}, [f"{path}: not valid TOML: {error}; correct the file there"]


def apply_overrides(values: Values, overrides: Sequence[str], model: type[BaseModel]) -> list[str]:
    """Set `--section.key VALUE` and `--section.key=VALUE` in `values`; returns what could not be set."""
    problems = []
    rest = list(overrides)
    while rest:
        flag = rest.pop(0)
        key, equals, text = flag.removeprefix("--").partition("=")
        section, dot, name = key.partition(".")
        if not (flag.startswith("--") and section and dot and name):
            problems.append(f"{flag}: not an override; write --section.key VALUE")
            if not equals and rest and not rest[0].startswith("--"):
                rest.pop(0)
            continue
        if not equals:
            # A value may start with one dash, as -1 does; two dashes are the next override.
            if not rest or rest[0].startswith("--"):
                problems.append(f"{flag}: has no value; write {flag} VALUE (or {flag}=VALUE)")
                continue
            text = rest.pop(0)
        table = {} if "." in name else values.setdefault(section, {})
        if not isinstance(table, dict) or "." in name:
            problems.append(f"--{key}: overrides reach the keys of single tables only; edit {section!r} in the file")
            continue
        field = _field([section, name], model)
        # Only TOML syntax tells a number from a text; where a text is wanted, '007' and '2026-01-01' are texts.
        table[name] = text if field is not None and field.annotation is str else _parse(text)
    return problems


def to_toml(values: Values) -> str:
    """Tables as TOML: dictionaries of plain values, and lists of dictionaries as [[tables]]. None is left out."""
    return "\n".join(_tables(values, "")) + "\n"


def explain(error: ErrorDetails, model: type[BaseModel]) -> str:
    """One line for one pydantic error: key, value, rule, fix."""
    loc = error["loc"]
    where = _dotted(loc)
    kind = error["type"]
    if kind == "extra_forbidden":
        known = list(_section(loc[:-1], model).model_fields)
        near = difflib.get_close_matches(str(loc[-1]), known, n=1)
        return f"{where}: unknown key; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}")
    field = _field(loc, model)
    meaning = field.description if field else None
    if kind == "missing":
        return f"{where}: missing; add {_what_to_add(field, where)}" + (f" ({meaning})" if meaning else "")
    if kind in ("model_type", "dict_type"):
        return f"{where} = {_shown(error['input'])}: must be a table; write it with its keys as [{where}]"
    if kind == "list_type" and field and _model_of(field.annotation):
        return f"{where} = {_shown(error['input'])}: must be a list of tables; write [[{where}]], in double brackets"
    rule = (
        error["msg"]
        .removeprefix("Value error, ")
        .replace("Input should", "must")
        .replace("String should", "must")
        .replace("List should", "must")
    )
    default = field.default if field else None
    hints = [str(meaning)] if meaning else []
    if default is not None and default is not PydanticUndefined:
        hints.append(f"default: {default!r}")
    return f"{where} = {_shown(error['input'])}: {rule}" + (f"; {'; '.join(hints)}" if hints else "")


def _tables(values: Values, prefix: str) -> list[str]:
    plain = {key: value for key, value in values.items() if value is not None and not _is_table_list(value)}
    lines = []
    for key, value in plain.items():
        if prefix or not isinstance(value, dict):
            lines.append(f"{key} = {_literal(value)}")
        else:
            pairs = [f"{name} = {_literal(item)}" for name, item in value.items() if item is not None]
            lines += [f"[{key}]", *pairs, ""]
    for key, tables in values.items():
        if _is_table_list(tables):
            for table in tables:
                lines += ["", f"[[{prefix}{key}]]", *_tables(table, f"{prefix}{key}.")]
    return lines


def _is_table_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _literal(value: Any) -> str:
    if isinstance(value, dict):
        pairs = ", ".join(f"{_string(key)} = {_literal(item)}" for key, item in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    if isinstance(value, list):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, bool):
        return str(value).lower()
    assert isinstance(value, int | float), f"{value!r} has no TOML form"
    return repr(value)


def _string(text: str) -> str:
    # JSON's escapes are TOML's, except that JSON leaves DEL as it is.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _parse(text: str) -> Any:
    """A TOML value, or, where `text` is none, the text itself, so that nobody has to quote twice."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError):
        return text
    return parsed["value"] if parsed.keys() == {"value"} else text


def _dotted(loc: Sequence[int | str]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN_VALUE else text[:_LONGEST_SHOWN_VALUE] + "..."


def _what_to_add(field: FieldInfo | None, where: str) -> str:
    section = _model_of(field.annotation) if field else None
    if section is None:
        return "it"
    required = [key for key, info in section.model_fields.items() if info.is_required()]
    return f"a table {where!r} with {', '.join(required)}"


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The section in an annotation such as Section, list[Section] or Section | None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_of(part))), None)


def _section(loc: Sequence[int | str], model: type[BaseModel]) -> type[BaseModel]:
    field = _field(loc, model)
    return (_model_of(field.annotation) if field else None) or model


def _field(loc: Sequence[int | str], model: type[BaseModel]) -> FieldInfo | None:
    """The innermost known field on the way to `loc`: below a free-form table that is the table's own field."""
    field: FieldInfo | None = None
    section: type[BaseModel] | None = model
    for key in loc:
        if isinstance(key, int) or section is None:
            continue
        if key not in section.model_fields:
            return None
        field = section.model_fields[key]
        section = _model_of(field.annotation)
    return field
