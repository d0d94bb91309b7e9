"""The files of a Hugging Face folder: JSON, and what its safetensors hold. Reads no weights and imports no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron_mcpo.config.config import ConfigError

_INDEX = "model.safetensors.index.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
"""Files of which a tokenizer has one at least, of all kinds."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """A tensor in a file.

    start: where in the file its values begin
    dtype: as safetensors spells it, such as BF16
    """

    file: Path
    start: int
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


def tokenizer_problems(folder: Path) -> list[str]:
    """Why prompts can't be made with what a folder holds, as far as its files tell."""
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        return [f"model.path = {str(folder)!r}: has no tokenizer ({_TOKENIZERS[0]}); download it, too"]
    problems: list[str] = []
    if (folder / _TOKENIZERS[0]).is_file():
        read_json(folder / _TOKENIZERS[0], problems)
    settings = folder / "tokenizer_config.json"
    told = (read_json(settings, problems) or {}) if settings.is_file() else {}
    if not problems and not told.get("chat_template") and not any(folder.glob("chat_template.*")):
        problems.append(f"model.path = {str(folder)!r}: has no chat template; use an instruction-tuned model")
    return problems


def is_sharded(folder: Path) -> bool:
    """Whether the weights in a folder are a sharded checkpoint of Megatron-Core's, not safetensors."""
    return (folder / ".metadata").is_file()


def read_headers(folder: Path) -> dict[str, Header]:
    """Name -> header of every tensor, but for the rotary frequencies of old checkpoints, which are computed.

    Files that an index doesn't name are not read.
    Raises ConfigError that names every file that is missing or can't be read, every tensor that is not where the index
    says, and every tensor that two of the files have.
    """
    problems: list[str] = []
    found: dict[Path, dict[str, Header]] = {}
    weight_map = _weight_map(folder)
    for file in sorted(set(weight_map.values())) or [_single_file(folder)]:
        try:
            found[file] = _headers(file)
        except FileNotFoundError:
            problems.append(f"{file}: listed in {_INDEX} but missing; download it again")
        except (OSError, SafetensorError) as error:
            problems.append(f"{file}: can't be read as safetensors ({error}); download it again")
    headers = _choose(found, weight_map, problems)
    if problems:
        raise ConfigError(problems)
    return headers


def _choose(
    found: Mapping[Path, Mapping[str, Header]], weight_map: Mapping[str, Path], problems: list[str]
) -> dict[str, Header]:
    """One header for every name."""
    headers: dict[str, Header] = {}
    for file, held in found.items():
        for name, header in held.items():
            # Refused whatever the index says: other libraries read the copy of the last file.
            if name in headers:
                problems.append(f"{headers[name].file}: {name} is also in {file}; download both again")
            headers.setdefault(name, header)
    for name, file in weight_map.items():
        if file in found and name not in found[file] and not _is_computed(name):
            problems.append(f"{file}: has no {name}, which {_INDEX} says is in it; download both again")
    return headers


def _is_computed(name: str) -> bool:
    return name.endswith(".rotary_emb.inv_freq")


def _headers(file: Path) -> dict[str, Header]:
    """As https://github.com/huggingface/safetensors#format says."""
    # Checks header and size, but doesn't tell where values begin. Of the frameworks to open for, numpy alone is light.
    with safe_open(file, framework="np"):
        pass
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        entries = json.loads(opened.read(length))
    return {
        name: Header(
            file=file,
            start=8 + length + entry["data_offsets"][0],
            shape=tuple(entry["shape"]),
            dtype=entry["dtype"],
        )
        for name, entry in entries.items()
        if name != "__metadata__" and not _is_computed(name)
    }


def _weight_map(folder: Path) -> dict[str, Path]:
    """Which file the index gives for every tensor; empty where there is no index."""
    index = folder / _INDEX
    if not index.is_file():
        return {}
    problems: list[str] = []
    names = (read_json(index, problems) or {}).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ConfigError(problems or [f"{index}: must have a table weight_map of file names; download it again"])
    return {name: folder / file for name, file in names.items()}


def _single_file(folder: Path) -> Path:
    """Raises ConfigError where a folder without an index has its weights in anything but one file."""
    if (folder / "model.safetensors").is_file():
        return folder / "model.safetensors"
    parts = sorted(file.name for file in folder.glob("model*.safetensors"))
    if parts:
        listed = ", ".join(parts[:3]) + (", ..." if len(parts) > 3 else "")
        rule = f"only {_INDEX} can say which tensors to read from them, and it is missing; download it too"
        raise ConfigError([f"{folder}: has {listed} but no model.safetensors: {rule}"])
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickled:
        fix = "convert the folder with save_pretrained(..., safe_serialization=True)"
        raise ConfigError(
            [f"{folder}: {', '.join(pickled[:3])}: pickled weights are refused (loading them runs code); {fix}"]
        )
    rule = f"model.safetensors or {_INDEX} with its files is needed; put them there, or name another folder"
    raise ConfigError([f"{folder}: no weights; {rule}"])
