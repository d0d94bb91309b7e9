"""Measure what vLLM's loader costs for every tensor of a weight sync, with few and with many experts.

`.venv/bin/python -m benchmarks.loading [--json] [--out benchmarks/results/NAME.json]`
The tensors are small, so that their number and not their size takes the time. The engine is vLLM in this process.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.gpu.models import Shape, save_model
from benchmarks.measure import options, write_rows
from megatron_mcpo.rollout.vllm_engine import VllmEngine

EXPERTS, REPEATS = (8, 64, 128), 7


def main(arguments: Sequence[str]) -> int:
    return write_rows("loading", loading_rows(), options(__doc__).parse_args(arguments))


def loading_rows() -> Iterator[dict[str, Any]]:
    """Yield a row per number of experts: the tensors, and a sync's least processor time in microseconds per tensor."""
    for experts in EXPERTS:
        with TemporaryDirectory() as name:
            yield {"experts": experts, **_measured(Path(name), experts)}


def _measured(folder: Path, experts: int) -> dict[str, Any]:
    shape = Shape(
        hidden=128, ffn=64, layers=2, heads=4, kv_heads=2, head_dim=32, vocab=320, experts=experts, experts_per_token=2
    )
    save_model(folder, shape, dtype=torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    engine = VllmEngine(
        folder,
        dtype="bf16",
        quantization="none",
        tensor_parallel=1,
        max_model_len=64,
        max_concurrent=4,
        kv_cache_gib=0.05,
        gpu_memory_utilization=0.3,
        distributed=False,
        job_tag="loading",
    )
    seconds = []
    for version in range(REPEATS):
        start = time.process_time()
        engine.update(tensors.items(), version)
        seconds.append(time.process_time() - start)
    return {"tensors": len(tensors), "us_per_tensor": round(1e6 * min(seconds) / len(tensors), 1)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
