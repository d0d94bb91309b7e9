"""Say what this machine and this environment have, what a run will use of it, and what is wrong, with the fix.

Without CONFIG: whether anything can be trained here. With one: whether this configuration can, as far as that is known
before a model is built; `mcpo train CONFIG --dry-run` then also reads the data. Exit code 1: it can't.
"""

import argparse
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_mcpo.cli import machine, machine_problems, options, preflight, probes
from megatron_mcpo.cli.machine import EXTENSIONS, TRANSFORMER_ENGINE, Driver, Machine
from megatron_mcpo.cli.machine_problems import Problem, blocking, warning
from megatron_mcpo.config.config import Config, ConfigError, load
from megatron_mcpo.config.environment import foreign_apex
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.weights.mapping import checkpoint_bytes


def main(arguments: Sequence[str]) -> int:
    known, overrides = _parse(arguments)
    found = machine.examine()
    problems = [
        *machine_problems.of_packages(found),
        *machine_problems.of_device(found),
        *machine_problems.of_limits(found),
    ]
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
            problems += [blocking("config", text) for text in new]
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
    yield from (blocking("config", text) for text in problems)


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
    yield from (blocking("memory", f"memory: {text}. {fix}") for text in plan.shortages)


def _of_disk(config: Config, model: ModelConfig) -> Iterator[Problem]:
    """Find out whether the checkpoints that are kept fit on the disk of run.dir."""
    folder = Path(config.run.dir).absolute()
    while not folder.exists():
        folder = folder.parent
    size = checkpoint_bytes(model, element_size=2 if config.model.dtype == "bf16" else 4)
    free, number = shutil.disk_usage(folder).free, config.run.keep_checkpoints + 1
    if free < size * number:
        yield warning(
            "disk",
            f"run.dir = {config.run.dir!r}: should have room for {number} checkpoints of {size / 2**30:.1f} GiB, its "
            f"disk has {free / 2**30:.1f} GiB free. Free some space, or lower run.keep_checkpoints.",
        )
    if not os.access(folder, os.W_OK):
        yield blocking("disk", f"run.dir = {config.run.dir!r}: must be writable ({folder} is not). Choose another.")


def _ranks(found: Machine, layout: Layout) -> str:
    """Say how the ranks and the GPUs of this host go together."""
    num_gpus = len(found.gpus)
    if not num_gpus:
        return f"{layout.world_size} rank(s) on this CPU: {layout}"
    if layout.world_size <= num_gpus:
        return f"{layout.world_size} of the {num_gpus} GPU(s) of this host: {layout}"
    hosts = -(-layout.world_size // num_gpus)
    return f"{layout.world_size} ranks, this host has {num_gpus} GPU(s): start it on {hosts} hosts (docs/clusters.md)"


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
        "layers": " ".join(filter(None, ("Transformer Engine", found.version("transformer-engine"))))
        if has_te
        else "torch's modules",
        "optimizer": f"Adam with {kernels} kernels",
        "gradient accumulation fusion": product if gpu else "none, only a GPU has it",
        "engine": str(found.vllm),
    }


def _values(found: Machine, problems: list[Problem], notes: list[str]) -> dict[str, Any]:
    """Return the answer as values for a JSON object. Other programs read it: these names stay."""
    torch = found.torch if isinstance(found.torch, dict) else {}
    driver = found.driver if isinstance(found.driver, Driver) else None
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
    gpus = [
        f"{gpu['name']}, {gpu['memory_gib'] or 'unknown'} GiB, capability {gpu['capability']}" for gpu in values["gpu"]
    ]
    cuda, te, apex = values["cuda"], values["transformer_engine"], values["apex"]
    shown = {
        "driver": f"none: {found.driver}"
        if isinstance(found.driver, str)
        else f"{found.driver.version} (CUDA {found.driver.cuda or 'unknown'})",
        "gpu": "; ".join(gpus) or "none",
        "python": values["python"],
        "torch": f"can't be imported: {found.torch}"
        if isinstance(found.torch, str)
        else f"{values['torch']} (CUDA {cuda['torch'] or 'none'}, NCCL {values['nccl'] or 'none'})",
        "transformer engine": ": ".join(filter(None, (te["version"], te["problem"]))) or "there",
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
    num_blocking = sum(problem.blocking for problem in problems)
    num_warnings = len(problems) - num_blocking
    yield (
        f"{num_blocking} problem(s), {num_warnings} warning(s)"
        if problems
        else "nothing is wrong that can be seen from here"
    )
