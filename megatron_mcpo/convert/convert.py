"""Convert Hugging Face folders to Megatron's sharded checkpoints and back, with few tensors in memory at a time.

Under torchrun all processes share the work: each writes one part at a time and compares one part at a time, in turns,
so that all of them stop when one fails. What is written is read back from the disk and compared with the source bit by
bit before the folder gets its name. The result does not depend on the number of processes.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from math import lcm
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_mcpo.config.config import ConfigError, load
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.hf_files import is_sharded
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import ModelConfig, layout_problems
from megatron_mcpo.convert import megatron_write
from megatron_mcpo.convert.compare import (
    Comparison,
    blocks,
    compare,
    head_problems,
    is_small,
    nbytes,
)
from megatron_mcpo.convert.staging import StagingFolder
from megatron_mcpo.convert.work_sharing import for_each_rank, together_on_files
from megatron_mcpo.distributed import peers
from megatron_mcpo.distributed.peers import Team, agree
from megatron_mcpo.storage import checkpoint_files
from megatron_mcpo.storage.checkpoint_files import Fingerprint
from megatron_mcpo.storage.files import write_atomically
from megatron_mcpo.storage.run_folder import CONFIG
from megatron_mcpo.weights.checkpoint_layout import DTYPES, MegatronFolder
from megatron_mcpo.weights.hf_io import RECORD, HfFolder, Source, check_files
from megatron_mcpo.weights.hf_write import (
    HEAD_FILE,
    copy_assets,
    file_names,
    spread,
    write_index,
    write_safetensors,
)

MAX_FILE_BYTES = 5 * 10**9
WAIT_SECONDS = 1800.0
"""How long a process waits for the others to finish a part, which is a gigabyte or a file of safetensors."""

Say = Callable[[str], None]


class VerificationError(ValueError):
    """The error of a conversion whose result differs from its source.

    compared: the comparison of the tensors; where these are all equal, something else differs
    """

    def __init__(self, message: str, compared: Comparison):
        super().__init__(message)
        self.compared = compared


def layout_of(
    *, tensor: int, pipeline: int, virtual_pipeline: int, expert: int, layers_per_stage: Sequence[int] = ()
) -> Layout:
    """Return the smallest layout of these sizes; sequence parallel with several tensor ranks, since experts need it."""
    return Layout(
        tensor=tensor,
        pipeline=pipeline,
        virtual_pipeline=virtual_pipeline,
        expert=expert,
        data=lcm(tensor, expert) // tensor,
        sequence=tensor > 1,
        layers_per_stage=tuple(layers_per_stage),
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

    Peak memory is a few slices of one tensor per process. When an interrupted call is repeated, with any number of
    processes, it continues where it was interrupted. Under torchrun all processes call this; the first one gives the
    folder its name.

    Args:
        source: A Hugging Face folder.
        final: The folder to be written; must not exist.
        layout: The layout whose ranks would save such a checkpoint.
        dtype: Of the weights; None keeps the source's.
        verify_forward: Whether to compare logits with transformers; None compares those of small models.
        say: Called with lines on the progress.

    Raises:
        ConfigError: The user can correct it.
        VerificationError: The result differs from the source.
    """
    with peers.team(timeout_seconds=WAIT_SECONDS) as team:
        with together_on_files(team):
            model, folder = _hf_source(source, layout)
            dtype = _dtype(folder, dtype)
        job = {"from": _fingerprint(source), "layout": asdict(layout), "dtype": str(dtype)}
        staging = _open_staging(source, final, job, sum(nbytes(folder, name, dtype) for name in folder.names), team)
        parts = {str(number): part for number, part in enumerate(megatron_write.parts(model, layout, dtype))}
        _write_parts(
            staging,
            parts,
            lambda number: megatron_write.write_part(staging.path, number, parts[number], folder, layout, dtype),
            team,
            say,
        )
        head = load_file(source / HEAD_FILE) if (source / HEAD_FILE).is_file() else {}
        head = {name: values.to(dtype) for name, values in head.items()}
        with together_on_files(team):
            if team.rank == 0:
                done = staging.done()
                megatron_write.write_rest(staging.path, model, layout, dtype, head, [done[number] for number in parts])
                copy_assets(source, staging.path)
                _set_dtype(staging.path / "config.json", dtype)
        with together_on_files(team):
            megatron = MegatronFolder.open(staging.path, model)
        compared = replace(compare(folder, megatron, dtype=dtype, team=team), left_out=folder.left_out)
    if team.rank == 0:
        problems = head_problems(head, megatron.head())
        if _wants(verify_forward, folder):
            problems += _logits_problems(megatron, model, source, dtype, say)
        _publish(staging, compared, problems, job, with_manifest=True)
    return compared


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

    The contrastive head is written to a file of its own. Memory, interruption and errors are those of `hf_to_megatron`.

    Args:
        source: A Megatron checkpoint.
        final: The folder to be written; must not exist.
        assets: A folder with config.json and tokenizer; None takes the checkpoint's own, or `model.path` of its run.
        dtype: Of the weights; None keeps the source's. For fp32 the optimizer's master weights of a model in bf16 are
            taken if the checkpoint has them.
        max_file_bytes: The most bytes of a safetensors file.
        verify_forward: Whether to compare logits with transformers; None compares those of small models.
        say: Called with lines on the progress.
    """
    with peers.team(timeout_seconds=WAIT_SECONDS) as team:
        with together_on_files(team):
            if not is_sharded(source):
                raise ConfigError([f"{source}: must be a Megatron checkpoint (it has no .metadata); {_hint(source)}"])
        check_files(source, team)
        with together_on_files(team):
            assets = assets or assets_of(source)
            model = from_folder(assets, with_weights=False)
            folder = MegatronFolder.open(source, model, masters=dtype is torch.float32)
            found, dtype = folder.dtype(folder.names[0]), _dtype(folder, dtype)
        say(_origin(folder, found, dtype))
        job = {"from": _fingerprint(source), "assets": str(assets), "dtype": str(dtype), "max_bytes": max_file_bytes}
        sizes = {name: nbytes(folder, name, dtype) for name in folder.names}
        staging = _open_staging(source, final, job, sum(sizes.values()), team)
        groups = spread(sizes, max_file_bytes)
        files = dict(zip(file_names(len(groups)), groups, strict=True))
        _write_parts(staging, files, lambda file: _write_file(staging, file, files[file], folder, dtype), team, say)
        head = folder.head()
        with together_on_files(team):
            if team.rank == 0:
                _write_others(staging.path, assets, files, sum(sizes.values()), head, dtype)
        with together_on_files(team):
            written = HfFolder(staging.path, model)
        compared = compare(folder, written, dtype=dtype, team=team)
    if team.rank == 0:
        problems = head_problems(head, load_file(staging.path / HEAD_FILE) if head else {})
        if _wants(verify_forward, folder):
            problems += _logits_problems(folder, model, staging.path, dtype, say)
        _publish(staging, compared, problems, job)
    return compared


def assets_of(checkpoint: Path) -> Path:
    """Return the folder with a checkpoint's config.json and tokenizer: the checkpoint itself, or its run's model.path.

    Raises ConfigError if neither has them.
    """
    if (checkpoint / "config.json").is_file():
        return checkpoint
    settings = checkpoint.resolve().parent.parent / CONFIG  # runs/NAME/checkpoints/step_N
    if settings.is_file():
        path = Path(load(settings).model.path)
        if (path / "config.json").is_file():
            return path
    rule = "must hold config.json, or belong to a run whose model.path holds it"
    raise ConfigError([f"{checkpoint}: {rule}; give --hf FOLDER"])


def _hf_source(source: Path, layout: Layout) -> tuple[ModelConfig, HfFolder]:
    """Open a Hugging Face folder. Raises ConfigError if it is none, or `layout` can't divide its model."""
    if is_sharded(source):
        fix = "it is a Megatron checkpoint, which `mcpo convert to-hf` converts"
        raise ConfigError([f"{source}: must be a Hugging Face folder; {fix}"])
    model = from_folder(source)
    folder = HfFolder(source, model)
    problems = layout_problems(model, layout, 1)
    if problems:
        raise ConfigError(problems)
    return model, folder


def _write_parts(
    staging: StagingFolder, parts: Iterable[str], write: Callable[[str], tuple[list[str], Any]], team: Team, say: Say
) -> None:
    """Write all parts that are not there already, each by one process.

    write: writes the part of a name; returns the names of its files, and its record
    """
    names = list(parts)
    done = agree(staging.done() if team.rank == 0 else {}, team)
    todo = [name for name in names if name not in done]
    before = len(names) - len(todo)
    for_each_rank(
        todo,
        team,
        lambda name: staging.finish(name, *write(name)),
        after=lambda count: say(f"{before + count} of {len(names)} parts written"),
    )


def _write_file(
    staging: StagingFolder, file: str, names: Sequence[str], source: MegatronFolder, dtype: torch.dtype
) -> tuple[list[str], None]:
    """Write one safetensors file; return its name, and no record."""

    def rows(name: str) -> Iterator[Tensor]:
        return (source.read(name, start, stop, dim=0).to(dtype) for start, stop in blocks(source, name))

    write_safetensors(staging.path / file, {name: source.shape(name) for name in names}, dtype, rows)
    return [file], None


def _origin(source: MegatronFolder, found: torch.dtype, dtype: torch.dtype) -> str:
    """Return a line that says which of a checkpoint's weights are written."""
    if source.masters:
        return "weights: those that the optimizer keeps in fp32"
    name = str(found).removeprefix("torch.")
    if found is dtype:
        return f"weights: {name}"
    return f"weights: {'widened' if dtype.itemsize > found.itemsize else 'rounded'} from {name}"


def _write_others(
    folder: Path,
    assets: Path,
    files: Mapping[str, Sequence[str]],
    total_size: int,
    head: dict[str, Tensor],
    dtype: torch.dtype,
) -> None:
    """Write what belongs into a Hugging Face folder beside the model's tensors."""
    if len(files) > 1:
        write_index(folder, files, total_size)
    if head:
        save_file(head, folder / HEAD_FILE)
    copy_assets(assets, folder)
    _set_dtype(folder / "config.json", dtype)


def _dtype(source: Source, asked: torch.dtype | None) -> torch.dtype:
    found = sorted({str(source.dtype(name)).removeprefix("torch.") for name in source.names})
    if asked is not None:
        return asked
    dtype = source.dtype(source.names[0])
    if len(found) > 1 or dtype not in DTYPES:
        rule = "they must all be bfloat16 or all float32; give --dtype bf16 or fp32 to convert them"
        raise ConfigError([f"the tensors are {', '.join(found)}: {rule}"])
    return dtype


def _wants(verify_forward: bool | None, source: Source) -> bool:
    return is_small(source) if verify_forward is None else verify_forward


def _open_staging(source: Path, final: Path, job: dict[str, Any], size: int, team: Team) -> StagingFolder:
    """Open the staging folder: the first process begins it, then the others join."""
    with together_on_files(team):
        if team.rank == 0:
            if final.resolve().is_relative_to(source.resolve()):
                raise ConfigError([f"{final}: must lie outside of the source; give another folder"])
            staging = StagingFolder.begin(final, job)
            needed = size + size // 50 - staging.bytes()
            free = shutil.disk_usage(staging.path).free
            if free < needed:
                rule = f"needs {needed:,} bytes, the disk has {free:,} free; free some, or choose another disk"
                raise ConfigError([f"{final}: {rule}"])
    with together_on_files(team):
        if team.rank != 0:
            staging = StagingFolder.join(final)
    return staging


def _logits_problems(megatron: Source, model: ModelConfig, folder: Path, dtype: torch.dtype, say: Say) -> list[str]:
    from megatron_mcpo.convert.compare_logits import (  # late: it imports all of transformers
        TOLERANCE,
        logits_error,
    )

    error = logits_error(megatron, model, folder, dtype)
    say(f"logits against transformers: largest difference {error:.1e} of the largest logit")
    # A comparison with NaN must fail.
    return [] if error <= TOLERANCE else [f"logits differ from those of transformers by {error:.1e} of the largest one"]


def _publish(
    staging: StagingFolder,
    compared: Comparison,
    problems: list[str],
    job: dict[str, Any],
    *,
    with_manifest: bool = False,
) -> None:
    """Give the folder its name if it is correct, else delete it and raise. One process calls this.

    with_manifest: also write the manifest that a run's checkpoint has
    """
    problems = [*compared.differing, *problems]
    if problems:
        staging.discard()
        lines = [f"{staging.final}: not written, because it would differ from the source:", *problems]
        raise VerificationError("\n".join(lines), compared)
    with together_on_files(Team()):
        record = {**job, "sha256": compared.sha256}
        (staging.path / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
        if with_manifest:
            parts = [record["files"] for record in staging.done().values()]
            measured = {name: Fingerprint(**each) for part in parts for name, each in part.items()}
            others = set(staging.names()) - measured.keys() - {checkpoint_files.MANIFEST}
            checkpoint_files.write_manifest(staging.path, measured | checkpoint_files.measure(staging.path, others))
        staging.publish()


def _fingerprint(folder: Path) -> dict[str, Any]:
    """Describe what a folder holds by names, sizes and times of its files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stats = {str(path.relative_to(folder)): path.stat() for path in files}
    return {"folder": str(folder.resolve()), "files": {name: [s.st_size, s.st_mtime_ns] for name, s in stats.items()}}


def _set_dtype(path: Path, dtype: torch.dtype) -> None:
    """Make config.json state the dtype of the weights."""
    values = json.loads(path.read_text(encoding="utf-8"))
    name = str(dtype).removeprefix("torch.")
    stated = {key for key in ("dtype", "torch_dtype") if key in values}
    if any(values[key] != name for key in stated) or not stated:
        values |= dict.fromkeys(stated or {"dtype"}, name)
        write_atomically(path, (json.dumps(values, indent=2) + "\n").encode())


def _hint(folder: Path) -> str:
    steps = sorted(folder.glob("**/step_*/.metadata"))
    return f"its newest checkpoint is {steps[-1].parent}" if steps else "give a run's checkpoints/step_NNNNNN"
