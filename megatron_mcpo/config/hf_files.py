"""Read the files of a Hugging Face folder: JSON, and the headers of safetensors. Imports no torch.

Of weights nothing is read, except to compare two tensors.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron_mcpo.config.config import ConfigError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SHARDS = "model-*-of-*.safetensors"
_ADAPTER_SUFFIXES = (".safetensors", ".bin", ".pt", ".json")
_BLOCK_BYTES = 16 << 20
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
"""Every kind of tokenizer has at least one of these files."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """The place and the form of a tensor in a file.

    start, num_bytes: where its values are in the file, in bytes
    dtype: as safetensors spells it, such as BF16
    """

    file: Path
    start: int
    num_bytes: int
    shape: tuple[int, ...]
    dtype: str


def read_json(path: Path, problems: list[str]) -> dict[str, Any] | None:
    """Return the JSON object in a file; if there is none, add a problem and return None."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{path}: no such file. Set model.path to a folder that transformers' save_pretrained wrote.")
        return None
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path}: must be JSON ({error}). Replace the file.")
        return None
    if not isinstance(values, dict):
        problems.append(f"{path}: must be a JSON object (it is a {type(values).__name__}). Replace the file.")
        return None
    return values


def special_problems(folder: Path) -> list[str]:
    """Return what a folder holds besides files and folders: whatever opens a pipe waits for ever."""
    special = sorted(entry.name for entry in folder.iterdir() if is_special(entry) and not entry.is_dir())
    return [f"{folder / name}: must be a file (it is a pipe or a device). Download it again." for name in special]


def is_special(path: Path) -> bool:
    """Return whether a path is there, but is no file."""
    return path.exists() and not path.is_file()


def tokenizer_problems(folder: Path) -> list[str]:
    """Return why prompts cannot be made with the tokenizer of a folder, as far as its files tell."""
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        return [f"model.path = {str(folder)!r}: must have a tokenizer ({_TOKENIZERS[0]}). Download it, too."]
    problems: list[str] = []
    if (folder / _TOKENIZERS[0]).is_file():
        read_json(folder / _TOKENIZERS[0], problems)
    settings = folder / "tokenizer_config.json"
    told = (read_json(settings, problems) or {}) if settings.is_file() else {}
    template = told.get("chat_template")
    in_a_file = (folder / "chat_template.jinja").is_file() or (folder / "additional_chat_templates").is_dir()
    if not problems and not template and not in_a_file:
        problems.append(f"model.path = {str(folder)!r}: must have a chat template. Use an instruction-tuned model.")
    elif isinstance(template, list) and not in_a_file:
        names = [str(each.get("name")) for each in template if isinstance(each, dict)]
        if "default" not in names:
            rule = f"one of its chat templates must have the name default (they are {_listed(names)})"
            problems.append(f"model.path = {str(folder)!r}: {rule}. Rename the one for chats in tokenizer_config.json.")
    return problems


def is_sharded(folder: Path) -> bool:
    """Return whether the weights in a folder are a sharded checkpoint of Megatron-Core, not safetensors."""
    return (folder / ".metadata").is_file()


def check_weights(folder: Path) -> None:
    """Check that a folder holds weights, once; those of a sharded checkpoint are checked when they are loaded.

    Raises ConfigError as `read_headers`, and for safetensors of a model beside a sharded checkpoint.
    """
    if not is_sharded(folder):
        read_headers(folder)
    elif others := [file.name for file in _copies(folder)]:
        rule = f"must hold the weights once (it has a sharded checkpoint and {_listed(others)})"
        raise ConfigError([f"{folder}: {rule}. Move the copy that is not meant to another folder."])


def same_values(a: Header, b: Header) -> bool:
    """Return whether two tensors have the same type, shape and bytes."""
    if (a.dtype, a.shape, a.num_bytes) != (b.dtype, b.shape, b.num_bytes):
        return False
    with a.file.open("rb") as file_a, b.file.open("rb") as file_b:
        file_a.seek(a.start)
        file_b.seek(b.start)
        sizes = (min(_BLOCK_BYTES, a.num_bytes - done) for done in range(0, a.num_bytes, _BLOCK_BYTES))
        return all(file_a.read(size) == file_b.read(size) for size in sizes)


def read_headers(folder: Path) -> dict[str, Header]:
    """Return the header of every tensor by name.

    Files that an index does not name are not read, and refused where they may be a copy of the model: programs differ
    in which one they read.
    Raises ConfigError that names every file that is missing or cannot be read, every tensor that is not where the index
    says, every tensor that is in two files, copies of the model, and adapters.
    """
    found: dict[Path, dict[str, Header]] = {}
    weight_map = _weight_map(folder)
    files = sorted(set(weight_map.values())) or [_single_file(folder)]
    problems = _ambiguities(folder, files)
    for file in files:
        try:
            if is_special(file):
                problems.append(f"{file}: must be a file (it is a folder, a pipe or a device). Download it again.")
            else:
                found[file] = _headers(file)
        except FileNotFoundError:
            problems.append(f"{file}: missing, although {_INDEX} lists it. Download it again.")
        except (OSError, SafetensorError) as error:
            problems.append(f"{file}: must be a safetensors file ({error}). Download it again.")
    headers = _choose(found, weight_map, problems)
    if problems:
        raise ConfigError(problems)
    return headers


def _choose(
    found: Mapping[Path, Mapping[str, Header]], weight_map: Mapping[str, Path], problems: list[str]
) -> dict[str, Header]:
    """Return one header per name, and add a problem for each that is in two files or not where the index says."""
    headers: dict[str, Header] = {}
    for file, held in found.items():
        for name, header in held.items():
            # This is refused whatever the index says, because other libraries read the copy in the last file.
            if name in headers and not is_computed(name):
                problems.append(
                    f"{headers[name].file}: {name} must be in one file (it is also in {file}). Download both again."
                )
            headers.setdefault(name, header)
    for name, file in weight_map.items():
        if file in found and name not in found[file] and not is_computed(name):
            problems.append(f"{file}: must have {name} ({_INDEX} says so). Download both again.")
    return headers


def is_computed(name: str) -> bool:
    """Return whether a tensor holds rotary frequencies, which old checkpoints have and which are computed today."""
    return name.endswith(".rotary_emb.inv_freq")


def _headers(file: Path) -> dict[str, Header]:
    """Return the headers of a file, read as https://github.com/huggingface/safetensors#format says."""
    # This checks header and size, but does not tell where values begin. Of all frameworks only numpy is light.
    with safe_open(file, framework="np"):
        pass
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        entries = json.loads(opened.read(length))
    return {
        name: Header(
            file=file,
            start=8 + length + entry["data_offsets"][0],
            num_bytes=entry["data_offsets"][1] - entry["data_offsets"][0],
            shape=tuple(entry["shape"]),
            dtype=entry["dtype"],
        )
        for name, entry in entries.items()
        if name != "__metadata__"
    }


def _weight_map(folder: Path) -> dict[str, Path]:
    """Return the file of every tensor as the index gives it; empty if there is no index."""
    index = folder / _INDEX
    if not index.is_file():
        return {}
    problems: list[str] = []
    names = (read_json(index, problems) or {}).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ConfigError(problems or [f"{index}: must have a table weight_map of file names. Download it again."])
    outside = sorted({file for file in names.values() if file != Path(file).name or file in ("", "..")})
    if outside:
        rule = f"must name files of this folder (it names {outside[0][:80]!r})"
        raise ConfigError([f"{index}: {rule}. Download it again."])
    return {name: folder / file for name, file in names.items()}


def _single_file(folder: Path) -> Path:
    """Return the file with all weights of a folder without an index; raise ConfigError if there is no such file."""
    if (folder / _SINGLE).exists():
        return folder / _SINGLE
    parts = sorted(file.name for file in folder.glob("model*.safetensors"))
    if parts:
        rule = f"{_INDEX} is missing, which says which tensors to read from {_listed(parts)}"
        raise ConfigError([f"{folder}: must have model.safetensors or an index ({rule}). Download it, too."])
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickled:
        fix = "Convert the folder with save_pretrained(..., safe_serialization=True)"
        raise ConfigError(
            [f"{folder}: {', '.join(pickled[:3])}: must be safetensors (loading a pickle runs code). {fix}."]
        )
    rule = f"must have weights: model.safetensors, or {_INDEX} with its files"
    raise ConfigError([f"{folder}: {rule}. Put them there, or name another folder."])


def _copies(folder: Path) -> list[Path]:
    """Return the files of a folder that have a name of a model's weights."""
    names = (_SINGLE, _INDEX, _SHARDS)
    return sorted(file for name in names for file in folder.glob(name))


def _ambiguities(folder: Path, files: Sequence[Path]) -> list[str]:
    """Return why a folder may hold another model for other programs. files: those that the weights are read from"""
    problems = []
    source = _INDEX if (folder / _INDEX).exists() else _SINGLE
    if copies := [file.name for file in _copies(folder) if file not in files and file.name != source]:
        rule = f"must hold the weights once ({_listed(copies)} beside {source}, which does not name them)"
        problems.append(f"{folder}: {rule}. Move the copy that is not meant to another folder.")
    if adapters := sorted(file.name for file in folder.glob("adapter*") if file.suffix in _ADAPTER_SUFFIXES):
        rule = f"must be a whole model ({_listed(adapters)}: an adapter, which would be left out)"
        problems.append(f"{folder}: {rule}. Merge it with peft's merge_and_unload, or move it to another folder.")
    return problems


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
