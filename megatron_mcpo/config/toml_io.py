"""Read a configuration from TOML, with the files that it extends, and write one. Imports no torch.

This file knows one key, `extends`. All others belong to the schema (schema.py).
"""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

Values = dict[str, Any]

EXTENDS = "extends"
EXTENDS_MEANING = (
    "path of a TOML file that this one is based on, relative to the folder of this file; the base may have a base "
    "itself. Tables are merged key by key: a key of this file replaces the same key of the base, and the command line "
    "replaces both. Lists, and so all [[domain]] tables together, are replaced as a whole: a run has exactly the "
    "domains that one file shows, whereas a merge by name could drop neither a domain nor a source. Other paths remain "
    "relative to the folder that the command is started in"
)


@dataclass
class Layers:
    """The values of a configuration before they are validated, and where each of them comes from.

    origins: for every table the file of each of its keys, and for every other value its file
    files: the configuration and its bases; the first is the outermost base
    """

    values: Values = field(default_factory=dict)
    origins: Values = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)

    def put(self, file: Path, values: Values) -> None:
        """Lay the values of a file over those that are already here."""
        name = str(file)
        origins = {key: dict.fromkeys(value, name) if _is_table(value) else name for key, value in values.items()}
        self.values = _merge(self.values, values)
        self.origins = _merge(self.origins, origins)
        self.files.append(file)

    def origin(self, section: str, key: str) -> str:
        """Return which file, or the command line, gave a value its value; empty where none did.

        Args:
            section: name of the table, or of a value that is not in a table
            key: name in the table; empty for the table itself, which may come from several files
        """
        found = self.origins.get(section, "")
        if not _is_table(found):
            return str(found)
        return found.get(key, "") if key else " and ".join(dict.fromkeys(found.values()))


def read_layers(path: Path) -> tuple[Layers, list[str]]:
    """Read a TOML file and its bases, and merge them; the problems are empty unless a file cannot be used."""
    chain: list[tuple[Path, Values]] = []
    file: Path | None = path
    while file is not None:
        values, unreadable = _read(file)
        if unreadable and chain:
            below, said = chain[-1][0], chain[-1][1][EXTENDS]
            fix = f"Correct it; a relative path starts at the folder of {below}"
            return Layers(), [f"{below}: {EXTENDS} = {said!r}: must be a TOML file ({file}: {unreadable}). {fix}."]
        if unreadable:
            return Layers(), [f"{file}: must be a TOML file ({unreadable}). Correct it or give another path."]
        visited = [known.resolve() for known, _ in chain]
        if file.resolve() in visited:
            circle = [*(known for known, _ in chain), file][visited.index(file.resolve()) :]
            names = " -> ".join(map(str, circle))
            return Layers(), [
                f"{EXTENDS}: {names}: must not lead back to the same file. Remove one {EXTENDS} of these."
            ]
        base = values.get(EXTENDS)
        if base is not None and not isinstance(base, str):
            rule = "must be the path of one TOML file, as text in quotes"
            return Layers(), [f'{file}: {EXTENDS} = {base!r}: {rule}. Write {EXTENDS} = "other.toml".']
        chain.append((file, values))
        file = None if base is None else file.parent / base
    layers = Layers()
    for known, values in reversed(chain):
        layers.put(known, {key: value for key, value in values.items() if key != EXTENDS})
    return layers, []


def to_toml(values: Values) -> str:
    """Return tables as TOML text; keys without a value (None) are left out, since TOML has no null."""
    return tomli_w.dumps(_without_none(values))


def _read(path: Path) -> tuple[Values, str]:
    """Return the tables of a file, and why they cannot be read: empty if they can."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig")), ""
    except FileNotFoundError:
        return {}, "no such file"
    except IsADirectoryError:
        return {}, "is a folder"
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        return {}, f"not valid TOML: {error}"
    except (OSError, ValueError) as error:
        return {}, f"cannot be read: {error}"


def _merge(base: Values, over: Values) -> Values:
    """Return `over` laid over `base`: tables key by key, every other value as a whole."""
    both = {key: base[key] | value for key, value in over.items() if _is_table(value) and _is_table(base.get(key))}
    return base | over | both


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value
