"""List the rows of the check: what teaches most comes first, for time may end before the rows do."""

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from benchmarks.gpu.outcome import Band, Outcome, Row
from megatron_mcpo.cli.machine import EXTENSIONS
from megatron_mcpo.distributed.device import uses_gpu
from megatron_mcpo.distributed.transformer_engine import transformer_engine_problem

ENGINE = ("vllm",)
FP8 = ("transformer_engine",)
TRAIN = ("vllm", "rich", "matplotlib", "sklearn", "filelock", "psutil", "pydantic")
"""What `mcpo train` imports besides what every row needs, where the configuration names a file and a function."""
PROGRAM = (*TRAIN, "tensorboard", "reasoning_gym", "math_verify", "pydantic_monty", "pyarrow")
"""What the quick start imports."""
_NO_LAYERS = ("ceilings", "logprob", "contrastive_terms", "fp8_products")
"""Rows that build no model."""


def environment() -> Outcome:
    """Report the device and the versions of everything that computes on it."""
    figures: dict[str, float | str] = {"python": sys.version.split()[0], "torch": torch.__version__}
    if uses_gpu():
        properties = torch.cuda.get_device_properties(0)
        figures |= {
            "device": properties.name,
            "memory_gib": properties.total_memory / 2**30,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    installed = importlib.util.find_spec("transformer_engine") is not None
    problem = transformer_engine_problem()
    for package in ("transformer-engine", "transformer-engine-torch", "megatron-core", "vllm", "transformers"):
        try:
            figures[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            figures[package] = "not installed"
    if installed and problem:
        figures["transformer-engine"] = f"{figures['transformer-engine']}, {problem}"
    for extension in EXTENSIONS:
        figures[f"apex's {extension}"] = "there" if importlib.util.find_spec(extension) else "not there"
    broken = Band(name="Transformer Engine is installed and can't be imported", value=bool(problem), low=0, high=0)
    return Outcome(bands=(broken,) if installed else (), figures=figures)


def _of(module: str, name: str) -> Outcome:
    """Run a check and state its layers: without Transformer Engine a GPU's rows would pass on torch's.

    Its module is imported late, because it imports Megatron-Core, which takes seconds.
    """
    check: Callable[[], Outcome] = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), name)
    outcome = check()
    if outcome.skipped or name in _NO_LAYERS:
        return outcome
    spec = importlib.import_module("megatron_mcpo.mcore.spec")
    layers = "Transformer Engine" if spec.uses_transformer_engine() else "torch"
    return replace(outcome, figures={"layers": layers, **outcome.figures})


def _row(module: str, name: str, seconds: int, *needs: str, oldest: tuple[tuple[str, str], ...] = ()) -> Row:
    return Row(name=name, run=partial(_of, module, name), seconds=seconds, needs=needs, oldest=oldest)


# A server says which weights it has since 0.28 only; in process 0.26 is enough.
_SERVES = (("vllm", "0.28"),)
ROWS = {
    row.name: row
    for row in (
        Row(name="environment", run=environment, seconds=60),
        # Do the layers compute the right values, and does the engine have the weights?
        _row("speed", "ceilings", 60),
        _row("numbers", "logprobs", 120),
        _row("layouts", "gradients", 180),
        _row("engine", "engine", 240, *ENGINE),
        # Does it train, and how fast?
        _row("program", "training_0_6b", 480, *TRAIN),
        _row("speed", "step_1_7b", 180),
        _row("numbers", "short_rollouts", 120),
        # What a run may meet sooner or later.
        _row("checkpoints", "checkpoint", 120),
        _row("checkpoints", "te_checkpoint", 240),
        _row("numbers", "recompute", 120),
        _row("numbers", "offload", 120),
        _row("layouts", "layouts", 240),
        _row("layouts", "experts", 180),
        _row("numbers", "grouped_experts", 120),
        _row("numbers", "fp8_products", 90, *FP8),
        _row("numbers", "fp8", 180, *FP8),
        _row("speed", "logprob", 90),
        _row("speed", "contrastive_terms", 120),
        _row("speed", "export", 120),
        _row("checkpoints", "conversion", 120),
        _row("engine", "engine_fp8", 240, *ENGINE),
        _row("engine", "moe_push", 240, *ENGINE),
        _row("server", "servers", 300, *ENGINE, oldest=_SERVES),
        _row("server", "trainer_dies", 420, *ENGINE, oldest=_SERVES),
        # Larger and longer.
        _row("program", "training_1_7b", 480, *TRAIN),
        _row("speed", "step_8b", 180),
        _row("speed", "fp8_speed", 240, *FP8),
        _row("program", "program", 300, *PROGRAM),
        _row("program", "study", 540, *TRAIN),
    )
}
