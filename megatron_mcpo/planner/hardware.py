"""List what each kind of GPU can hold and do, with sources; a measurement can replace a figure (see `load`).

Only the h100's first two rates have been measured. A rate that is called assumed is a guess that has yet to be
measured; it is written down here so that nothing is hidden in a formula.
"""

import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from megatron_mcpo.config.config import ConfigError

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU, in nodes of `per_node`. Rates are those that programs reach, not those of data sheets.

    memory_gib: what torch calls the device's total memory
    gemm_tflops: bf16 products of a layer; attention_forward_tflops, attention_backward_tflops: causal flash attention,
        the masked half not counted as work
    copy_tbs: TB/s, bytes read plus bytes written, of a large copy; decode_share: the part of it that decoding reaches
    nvlink_gbs, network_gbs: GB/s that one GPU receives in a large collective, within a node and between nodes
    host_gbs: GB/s of a large copy between pinned host memory and the GPU, either way
    message_us: what every message costs besides; engine_step_ms: what a decoding step costs besides, on the host;
        tensor_us: what the engine's loader costs for every full tensor of a weight sync, on the host
    busy: share of a training step's time that is spent in kernels; the rest is launches and gaps
    sources: one sentence for every number above
    """

    name: str
    memory_gib: float
    gemm_tflops: float
    attention_forward_tflops: float
    attention_backward_tflops: float
    copy_tbs: float
    nvlink_gbs: float
    network_gbs: float
    decode_share: float = 0.8
    host_gbs: float = 45.0
    message_us: float = 10.0
    engine_step_ms: float = 3.0
    tensor_us: float = 110.0
    busy: float = 0.8
    per_node: int = 8
    sources: tuple[str, ...] = ()

    @property
    def memory_bytes(self) -> float:
        return self.memory_gib * GIB


_ASSUMED = (
    "decode_share 0.8, message_us 10, engine_step_ms 3: assumed",
    "tensor_us 110: vLLM's loader on one core of an AMD EPYC, measured with small experts (benchmarks/loading.py)",
    "host_gbs 45: PCIe 5.0 x16 is 63 GB/s a direction, times 0.7, assumed; half of it where the host has PCIe 4.0",
    "busy 0.8: assumed; 0.8 x the kernels' ceiling of 55 % is 44 % MFU for 1.7B shapes, where good code has 40-48 %",
)
_SCALED = "gemm, attention and copy: the h100's share of its data sheet's rate, times this data sheet's rate; assumed"

H100 = Gpu(
    name="h100",
    memory_gib=79.1,
    gemm_tflops=680,
    attention_forward_tflops=450,
    attention_backward_tflops=350,
    copy_tbs=3.0,
    nvlink_gbs=340,
    network_gbs=42,
    sources=(
        "memory: torch's total on an 80 GB SXM5, as its out-of-memory messages print it",
        "gemm: 798 TFLOP/s measured (8192 cubed, bf16), times 0.85 for the narrower products of a layer, assumed",
        "copy: 3.0 TB/s measured",
        "attention: below the 740 TFLOP/s forward of FlashAttention-3 (arXiv 2407.08608) at 16k tokens, because "
        "rollouts are shorter; assumed",
        "nvlink: 450 GB/s a direction (data sheet: 900 both ways) times 0.75, assumed",
        "network: one 400 Gbit/s adapter a GPU (DGX H100) is 50 GB/s, times 0.85, assumed",
        *_ASSUMED,
    ),
)


def _scaled(name: str, *, memory_gib: float, tflops: float, tbs: float, nvlink: float, network: float) -> Gpu:
    """Return a GPU by its data sheet, not measured: dense bf16 TFLOP/s, TB/s of memory, GB/s per direction."""
    compute, memory = tflops / 989, tbs / 3.35
    return replace(
        H100,
        name=name,
        memory_gib=memory_gib,
        gemm_tflops=H100.gemm_tflops * compute,
        attention_forward_tflops=H100.attention_forward_tflops * compute,
        attention_backward_tflops=H100.attention_backward_tflops * compute,
        copy_tbs=H100.copy_tbs * memory,
        nvlink_gbs=0.75 * nvlink,
        network_gbs=0.85 * network,
        sources=(
            f"data sheet: {tflops} TFLOP/s dense bf16, {tbs} TB/s, {nvlink} GB/s a direction; network {network} GB/s",
            _SCALED,
            *_ASSUMED,
        ),
    )


GPUS = {
    gpu.name: gpu
    for gpu in (
        H100,
        _scaled("h200", memory_gib=139.8, tflops=989, tbs=4.8, nvlink=450, network=50),
        _scaled("a100", memory_gib=79.1, tflops=312, tbs=2.04, nvlink=300, network=25),
        _scaled("b200", memory_gib=178.3, tflops=2250, tbs=8.0, nvlink=900, network=50),
    )
}


def load(name: str) -> Gpu:
    """Return a GPU of the table, or of a JSON file: {"base": a name of the table, and any of Gpu's numbers to replace}.

    Names of the table may be in capitals, as data sheets have them.
    A measurement on the machine writes such a file (see docs/gpu-validation.md); it must have "sources", a list of
    sentences. Those of the base follow them, because it has the other numbers.
    Raises ConfigError for an unknown name, an unreadable file, an unknown key or a value that its key can't have.
    """
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    path = Path(name)
    if not path.is_file():
        raise ConfigError([f"--gpu {name}: no such GPU and no such file; use one of {', '.join(GPUS)} or a JSON file"])
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        base = GPUS[values.pop("base").lower()]
        sources = values.pop("sources")
        if not isinstance(sources, list):
            raise TypeError(f"sources = {sources!r}: must be a list")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(
            [f'--gpu {name}: must be a JSON object with "base" ({", ".join(GPUS)}) and "sources" ({_said(error)})']
        ) from None
    values.pop("name", None)
    problems = [
        f"--gpu {name}: {key} = {value!r}: {rule}" for key, value in values.items() if (rule := _rule(key, value))
    ]
    if problems:
        raise ConfigError(problems)
    kept = (f"the numbers that are not replaced are those of {base.name}: {sentence}" for sentence in base.sources)
    return replace(base, name=path.stem, sources=(*map(str, sources), *kept), **values)


_WHOLE = ("per_node",)
_SHARES = ("decode_share", "busy")


def _rule(key: str, value: object) -> str | None:
    """Return the rule that a number of a file breaks; None if it breaks none. JSON may also have NaN and Infinity."""
    numbers = {field.name for field in fields(Gpu)} - {"name", "sources"}
    if key not in numbers:
        return f"must be one of {', '.join(sorted(numbers))}"
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        return "must be a positive, finite number"
    if key in _WHOLE and not isinstance(value, int):
        return "must be a whole number"
    if key in _SHARES and value > 1:
        return "must be at most 1 (it is a share, not a percentage)"
    return None


def _said(error: Exception) -> str:
    """Describe what is wrong with a file, without Python's names."""
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)
