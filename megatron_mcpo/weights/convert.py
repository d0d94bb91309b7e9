"""Hugging Face folders to Megatron's sharded checkpoints and back, from one process, a tensor at a time.

What is written is read back from the disk and compared with the source bit by bit before it gets its name.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import lcm
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_mcpo import checkpoint_files
from megatron_mcpo.config import ConfigError, load
from megatron_mcpo.hf_config import from_folder
from megatron_mcpo.hf_files import is_sharded
from megatron_mcpo.layout import Layout
from megatron_mcpo.model_config import ModelConfig, layout_problems
from megatron_mcpo.weights.draft import JOURNAL, Draft
from megatron_mcpo.weights.hf_io import HfFolder, Source, byte_view
from megatron_mcpo.weights.hf_write import (
    HEAD_FILE,
    copy_assets,
    file_names,
    spread,
    write_index,
    write_safetensors,
)
from megatron_mcpo.weights.layout import cut_dim, shard_shape
from megatron_mcpo.weights.mapping import HEAD_PREFIX, Parameter, Split, parameters
from megatron_mcpo.weights.stored import DTYPES, Chunk, MegatronFolder, Stored, chunks, global_shape, stored
from megatron_mcpo.weights.torch_dist import Entry, write_contents, write_object, write_tensor

RECORD = "conversion.json"
"""What a converted folder was made from, and the SHA-256 of every tensor."""
PART_BYTES = 1 << 30
SMALL_BYTES = 1 << 30
"""Up to this size in fp32, logits are compared without being asked for: a minute and four times the size in memory."""
MAX_FILE_BYTES = 5 * 10**9
_OBJECTS = "__objects.distcp"

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Tensors of two folders, bit by bit. differing: a line for each that is not the same; sha256: of those found"""

    num_tensors: int
    num_bits_different: int
    differing: tuple[str, ...]
    sha256: dict[str, str]


class VerificationError(ValueError):
    """What was read back is not what was written."""


def layout_of(*, tensor: int, pipeline: int, virtual_pipeline: int, expert: int) -> Layout:
    """The smallest layout with these sizes; sequence parallel with several tensor ranks, as experts need."""
    return Layout(
        tensor=tensor,
        pipeline=pipeline,
        virtual_pipeline=virtual_pipeline,
        expert=expert,
        data=lcm(tensor, expert) // tensor,
        sequence=tensor > 1,
    )


def hf_to_megatron(
    source: Path,
    final: Path,
    layout: Layout,
    *,
    dtype: torch.dtype | None = None,
    verify_forward: bool | None = None,
    say: Say,
) -> Comparison:
    """Write the model in `source` as the ranks of `layout` would save it, with configuration and tokenizer beside it.

    dtype: None keeps the source's
    verify_forward: compare logits with transformers; None: those of small models
    Peak memory is a few pieces of one tensor. An interrupted call goes on where it stopped when it is repeated.
    Raises ConfigError for what the user has to mend, VerificationError where the result is not the source.
    """
    if is_sharded(source):
        raise ConfigError([f"{source}: is a Megatron checkpoint; megatron_to_hf.py converts these"])
    model = from_folder(source)
    folder = HfFolder(source, model)
    problems = layout_problems(model, layout, 1)
    if problems:
        raise ConfigError(problems)
    dtype = _dtype(folder, dtype)
    plan = {"from": _fingerprint(source), "layout": asdict(layout), "dtype": str(dtype)}
    draft = _open_draft(source, final, plan, _size(folder, dtype))
    for number, part in enumerate(_parts(model, layout, dtype)):
        if str(number) not in draft.done:
            _write_part(draft, number, part, folder, layout, dtype)
            say(f"part {number + 1} written")
    head = load_file(source / HEAD_FILE) if (source / HEAD_FILE).is_file() else {}
    entries = [Entry(**entry) for record in draft.done.values() for entry in record]
    wanted = [stored(p) for p in parameters(model, Layout()) if not p.row.tied]
    shapes = {each.key: global_shape(model, each, layout.tensor) for each in wanted}
    shapes |= {HEAD_PREFIX + name: tuple(values.shape) for name, values in head.items()}
    with (draft.path / _OBJECTS).open("wb") as file:
        entries += _write_rest(file, model, wanted, {name: values.to(dtype) for name, values in head.items()})
    write_contents(draft.path, shapes, dtype, entries)
    copy_assets(source, draft.path)
    _set_dtype(draft.path / "config.json", dtype)
    checkpoint_files.sync(draft.path / _OBJECTS, forget=True)
    found = MegatronFolder(draft.path, model)
    compared = compare(folder, found, dtype=dtype)
    problems = _head_problems(head, found.head(), dtype)
    if is_small(folder) if verify_forward is None else verify_forward:
        problems += _logits_problems(found, model, source, lossless=dtype is folder.dtype(folder.names[0]), say=say)
    return _publish(draft, compared, problems, plan, with_manifest=True)


def megatron_to_hf(
    source: Path,
    final: Path,
    *,
    assets: Path | None = None,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    verify_forward: bool | None = None,
    say: Say,
) -> Comparison:
    """Write the model in a Megatron checkpoint (a run's, or a converted one) as a Hugging Face folder.

    assets: folder with config.json and tokenizer; None: the checkpoint's own, or model.path of the run it belongs to
    The contrastive head goes into a file of its own. Otherwise as `hf_to_megatron`.
    """
    if not is_sharded(source):
        raise ConfigError([f"{source}: no Megatron checkpoint (it has no .metadata); {_hint(source)}"])
    if (source / checkpoint_files.MANIFEST).is_file():
        damage = checkpoint_files.problems(source, part=0, num_parts=1)
        if damage:
            raise ConfigError([f"{source}: {problem}; convert another checkpoint" for problem in damage])
    assets = assets or assets_of(source)
    model = from_folder(assets, with_weights=False)
    folder = MegatronFolder(source, model)
    dtype = _dtype(folder, dtype)
    plan = {"from": _fingerprint(source), "assets": str(assets), "dtype": str(dtype), "max_file_bytes": max_file_bytes}
    sizes = {name: torch.Size(folder.shape(name)).numel() * dtype.itemsize for name in folder.names}
    draft = _open_draft(source, final, plan, sum(sizes.values()))
    groups = spread(sizes, max_file_bytes)
    files = dict(zip(file_names(len(groups)), groups, strict=True))
    for number, (file, names) in enumerate(files.items()):
        if file not in draft.done:
            tensors = ((name, folder.read(name).to(dtype)) for name in names)
            write_safetensors(draft.path / file, {name: folder.shape(name) for name in names}, dtype, tensors)
            draft.finish(file, [file], None)
            say(f"file {number + 1} of {len(files)} written")
    if len(files) > 1:
        write_index(draft.path, files, sum(sizes.values()))
    head = folder.head()
    if head:
        save_file(head, draft.path / HEAD_FILE)
    copy_assets(assets, draft.path)
    _set_dtype(draft.path / "config.json", dtype)
    compared = compare(folder, HfFolder(draft.path, from_folder(draft.path)), dtype=dtype)
    written = load_file(draft.path / HEAD_FILE) if head else {}
    problems = _head_problems(head, written, None)
    if is_small(folder) if verify_forward is None else verify_forward:
        problems += _logits_problems(
            folder, model, draft.path, lossless=dtype is folder.dtype(folder.names[0]), say=say
        )
    return _publish(draft, compared, problems, plan)


def compare(expected: Source, found: Source, *, dtype: torch.dtype | None = None) -> Comparison:
    """Every tensor of the model in two folders. dtype: what `found` must have; None: what `expected` has."""
    differing, sums, bits = [], {}, 0
    for name in expected.names:
        wanted_dtype = dtype or expected.dtype(name)
        if (found.dtype(name), found.shape(name)) != (wanted_dtype, expected.shape(name)):
            differing.append(f"{name}: is {found.dtype(name)} {list(found.shape(name))}, must be {wanted_dtype}")
            continue
        values = found.read(name)
        sums[name] = hashlib.sha256(byte_view(values)).hexdigest()
        different = bits_different(values, expected.read(name).to(wanted_dtype))
        if different:
            bits += different
            differing.append(f"{name}: {different} bits differ")
    return Comparison(num_tensors=len(expected.names), num_bits_different=bits, differing=tuple(differing), sha256=sums)


def bits_different(a: Tensor, b: Tensor) -> int:
    """How many bits of the memory of two tensors of one shape and type differ."""
    a, b = (x.contiguous().flatten().view(torch.uint8) for x in (a, b))
    whole = len(a) - len(a) % 8  # eight at a time is eight times as fast
    if torch.equal(a[:whole].view(torch.int64), b[:whole].view(torch.int64)) and torch.equal(a[whole:], b[whole:]):
        return 0
    return int(sum(((a ^ b) >> bit & 1).sum() for bit in range(8)))


def assets_of(checkpoint: Path) -> Path:
    """Where the configuration and tokenizer of a Megatron folder are: its own, or model.path of the run it belongs to.

    Raises ConfigError where neither is there.
    """
    if (checkpoint / "config.json").is_file():
        return checkpoint
    settings = checkpoint.resolve().parent.parent / "config.toml"  # runs/NAME/checkpoints/step_N
    if settings.is_file():
        path = Path(load(settings).model.path)
        if (path / "config.json").is_file():
            return path
    raise ConfigError([f"{checkpoint}: no config.json in it, and no run's config.toml names one; give --hf FOLDER"])


def _parts(model: ModelConfig, layout: Layout, dtype: torch.dtype) -> Iterator[list[tuple[Parameter, Stored]]]:
    """Parameters in order, in parts of about PART_BYTES: each with its place in `layout` and in the checkpoint."""
    there = [parameter for parameter in parameters(model, layout) if not parameter.row.tied]
    alone = [stored(parameter) for parameter in parameters(model, Layout()) if not parameter.row.tied]
    part: list[tuple[Parameter, Stored]] = []
    size = 0
    for pair in zip(there, alone, strict=True):
        part.append(pair)
        size += sum(torch.Size(shape).numel() for shape in pair[0].row.shapes) * dtype.itemsize
        if size >= PART_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def _write_part(
    draft: Draft,
    number: int,
    part: Sequence[tuple[Parameter, Stored]],
    source: HfFolder,
    layout: Layout,
    dtype: torch.dtype,
) -> None:
    """One file for every rank that has something of it."""
    entries = []
    files: dict[int, Any] = {}
    for parameter, where in part:
        num_shards = parameter.row.num_shards(layout)
        for shard in range(1 if parameter.row.split is Split.REPLICATED else num_shards):
            rank = parameter.stage * max(layout.tensor, layout.expert) + (parameter.expert_rank or shard)
            if rank not in files:
                files[rank] = (draft.path / f"__{rank}_{number}.distcp").open("wb")
            for chunk in chunks(parameter.row, rank=shard, num_ranks=num_shards):
                values = _values(where, chunk, source, num_shards, dtype)
                offsets = [0] * (values.dim() - len(where.index))
                offsets[cut_dim(where.row)] = chunk.start
                entries.append(write_tensor(files[rank], where.key, (*where.index, *offsets), values))
    for file in files.values():
        file.close()
    draft.finish(str(number), [Path(file.name).name for file in files.values()], [asdict(entry) for entry in entries])


def _values(where: Stored, chunk: Chunk, source: HfFolder, num_shards: int, dtype: torch.dtype) -> Tensor:
    """[1, ..., size, ...]: a chunk with the dimensions of its layer and expert."""
    dim = cut_dim(where.row)
    shape = list(shard_shape(where.row, num_shards))
    shape[dim] = chunk.size
    values = torch.empty((1,) * len(where.index) + tuple(shape), dtype=dtype)
    flat, position = values.view(shape), 0
    for piece in chunk.pieces:
        part = source.read(where.hugging_face[piece.tensor], piece.start, piece.stop)
        flat.narrow(dim, position, len(piece)).copy_(part)
        position += len(piece)
    flat.narrow(dim, position, chunk.size - position).zero_()
    return values


def _write_rest(file: Any, model: ModelConfig, wanted: Sequence[Stored], head: dict[str, Tensor]) -> Iterator[Entry]:
    """The head, and the empty state that Megatron's linear layers save beside their weights and want back."""
    for name, values in head.items():
        yield write_tensor(file, HEAD_PREFIX + name, (0,) * values.dim(), values.clone())
    counts = (model.num_layers, model.experts.count if model.experts else 0)
    for each in wanted:
        module, _, kind = each.key.rpartition(".")
        if kind == "weight" and module.rpartition(".")[2].startswith("linear_"):
            of = counts[: len(each.index)]
            shard = f"shard_{'.'.join(map(str, each.index))}_{'.'.join(map(str, of))}"
            yield write_object(file, f"{module}._extra_state/{shard}", None)
    yield write_object(file, "common_state/shard_0_1", {})


def _dtype(source: Source, asked: torch.dtype | None) -> torch.dtype:
    found = sorted({str(source.dtype(name)).removeprefix("torch.") for name in source.names})
    if asked is not None:
        return asked
    dtype = source.dtype(source.names[0])
    if len(found) > 1 or dtype not in DTYPES:
        rule = "must all be bfloat16 or all float32"
        raise ConfigError([f"the tensors are {', '.join(found)}: {rule}, or be converted: give --dtype bf16 or fp32"])
    return dtype


def is_small(source: Source) -> bool:
    """Whether logits are compared without being asked for."""
    return _size(source, torch.float32) <= SMALL_BYTES


def _logits_problems(megatron: Source, model: ModelConfig, folder: Path, *, lossless: bool, say: Say) -> list[str]:
    from megatron_mcpo.mcore.compare_logits import TOLERANCE, logits_error  # all of transformers: not for large models

    if not lossless:
        say("logits not compared: the type changes, and they with it")
        return []
    error = logits_error(megatron, model, folder)
    say(f"logits against transformers: largest difference {error:.1e} of the largest logit")
    # A comparison with NaN must fail.
    return [] if error <= TOLERANCE else [f"logits differ from those of transformers by {error:.1e} of the largest one"]


def _size(source: Source, dtype: torch.dtype) -> int:
    return sum(torch.Size(source.shape(name)).numel() for name in source.names) * dtype.itemsize


def _open_draft(source: Path, final: Path, plan: dict[str, Any], size: int) -> Draft:
    if source.resolve() == final.resolve():
        raise ConfigError([f"{final}: is the source; give another folder"])
    draft = Draft(final, plan)
    needed = size + size // 50 - draft.bytes()
    free = shutil.disk_usage(draft.path).free
    if free < needed:
        raise ConfigError([f"{final}: needs {needed:,} bytes, the disk has {free:,} left; free some or choose another"])
    return draft


def _publish(
    draft: Draft, compared: Comparison, head_problems: list[str], plan: dict[str, Any], *, with_manifest: bool = False
) -> Comparison:
    problems = [*compared.differing, *head_problems]
    if problems:
        draft.discard()
        raise VerificationError("\n".join([f"{draft.final}: not written, it would not be the source:", *problems]))
    (draft.path / RECORD).write_text(json.dumps({**plan, "sha256": compared.sha256}, indent=1), encoding="utf-8")
    if with_manifest:
        names = [name for name in checkpoint_files.names(draft.path) if name != JOURNAL]
        checkpoint_files.write_manifest(draft.path, checkpoint_files.measure(draft.path, names))
    draft.publish()
    return compared


def _head_problems(expected: dict[str, Tensor], found: dict[str, Tensor], dtype: torch.dtype | None) -> list[str]:
    if expected.keys() != found.keys():
        return [f"contrastive head: has {sorted(found)}, must have {sorted(expected)}"]
    pairs = {name: (values.to(dtype or values.dtype), found[name]) for name, values in expected.items()}
    return [f"contrastive head: {name} differs" for name, (a, b) in pairs.items() if not torch.equal(a, b)]


def _fingerprint(folder: Path) -> dict[str, Any]:
    """What a folder holds, as far as names, sizes and times of its files tell."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stats = {str(path.relative_to(folder)): path.stat() for path in files}
    return {"folder": str(folder.resolve()), "files": {name: [s.st_size, s.st_mtime_ns] for name, s in stats.items()}}


def _set_dtype(path: Path, dtype: torch.dtype) -> None:
    """Make config.json say in which type the weights are, where it says anything else."""
    values = json.loads(path.read_text(encoding="utf-8"))
    name = str(dtype).removeprefix("torch.")
    stated = {key for key in ("dtype", "torch_dtype") if key in values}
    if any(values[key] != name for key in stated) or not stated:
        values |= dict.fromkeys(stated or {"dtype"}, name)
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _hint(folder: Path) -> str:
    steps = sorted(folder.glob("**/step_*/.metadata"))
    return f"its newest checkpoint is {steps[-1].parent}" if steps else "give a run's checkpoints/step_NNNNNN"
