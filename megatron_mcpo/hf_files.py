"""The files of a Hugging Face folder: JSON, and what its safetensors hold. Reads no weights and imports no torch."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron_mcpo.config import ConfigError

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class Header:
    """A tensor in a file. dtype: as safetensors spells it, such as BF16"""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def read_json(path: Path, problems: list[str]) -> dict[str, Any] | None:
    """The object in a file; None, with a problem noted, where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{path}: no such file; model.path must be a folder that transformers' save_pretrained wrote")
        return None
    except (OSError, ValueError) as error:
        problems.append(f"{path}: not readable as JSON: {error}")
        return None
    if not isinstance(values, dict):
        problems.append(f"{path}: must be a JSON object, is a {type(values).__name__}")
        return None
    return values


def is_sharded(folder: Path) -> bool:
    """Whether the weights in a folder are a sharded checkpoint of Megatron-Core's, not safetensors."""
    return (folder / ".metadata").is_file()


def read_headers(folder: Path) -> dict[str, Header]:
    """Name -> header of every tensor, but for the rotary frequencies of old checkpoints, which are computed.

    Raises ConfigError that names every file that is missing or can't be read.
    """
    problems: list[str] = []
    headers: dict[str, Header] = {}
    for file in _weight_files(folder):
        try:
            headers |= {name: header for name, header in _headers(file) if not name.endswith(".rotary_emb.inv_freq")}
        except FileNotFoundError:
            problems.append(f"{file}: listed in {_INDEX} but missing; download it again")
        except (OSError, SafetensorError) as error:
            problems.append(f"{file}: can't be read as safetensors ({error}); download it again")
    if problems:
        raise ConfigError(problems)
    return headers


def _headers(file: Path) -> Iterator[tuple[str, Header]]:
    # Of the frameworks that safe_open can be opened for, numpy alone is light; nothing but headers is asked for.
    with safe_open(file, framework="np") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            header = tensors.get_slice(name)
            yield name, Header(file=file, shape=tuple(header.get_shape()), dtype=header.get_dtype())


def _weight_files(folder: Path) -> list[Path]:
    """Raises ConfigError where there is neither one file nor an index of several."""
    if (folder / _INDEX).is_file():
        problems: list[str] = []
        names = (read_json(folder / _INDEX, problems) or {}).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            rule = f"{folder / _INDEX}: must have a table weight_map of file names; download it again"
            raise ConfigError(problems or [rule])
        return [folder / name for name in sorted(set(names.values()))]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickled:
        fix = "convert the folder with save_pretrained(..., safe_serialization=True)"
        raise ConfigError(
            [f"{folder}: {', '.join(pickled[:3])}: pickled weights are refused (loading them runs code); {fix}"]
        )
    raise ConfigError([f"{folder}: no weights; model.safetensors or {_INDEX} with its files is needed"])
