"""What it costs to bring the policy's weights into the engines: both executors on real gloo ranks.

The engine is a stand-in that copies what it is given into parameters of its own, as vLLM's loaders do.
"""

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mcpo import parallel
from megatron_mcpo.layout import Layout
from megatron_mcpo.model_config import Experts, ModelConfig
from megatron_mcpo.weights.engine_layout import engine_name, engine_shapes, engine_slices
from megatron_mcpo.weights.layout import cut_dim
from megatron_mcpo.weights.mapping import parameters
from megatron_mcpo.weights.reshard import Plan
from tools.measure import forget_peak, memory, timed
from tools.ranks import run_ranks

REPEATS = 5
SMALL = ModelConfig(
    family="llama",
    num_layers=30,
    hidden_size=576,
    ffn_hidden_size=1536,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    vocab_size=49152,
    max_positions=2048,
    norm_eps=1e-5,
    rope_theta=1e5,
    rope_scaling=None,
    tied_embeddings=True,
    qkv_bias=False,
    qk_norm=False,
    experts=None,
    eos_token_ids=(2,),
)
"""SmolLM2-135M's shapes."""
WIDE = replace(
    SMALL,
    family="qwen3",
    num_layers=2,
    hidden_size=5120,
    ffn_hidden_size=25600,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=8192,
    tied_embeddings=False,
    qk_norm=True,
)
"""Layers of Qwen3-32B's shapes, and a vocabulary that leaves memory for them."""

MANY = replace(
    SMALL,
    family="qwen3_moe",
    num_layers=4,
    hidden_size=256,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    vocab_size=8192,
    tied_embeddings=False,
    qk_norm=True,
    experts=Experts(count=128, per_token=8, ffn_hidden_size=96, normalized=True),
)
"""As many experts a layer as Qwen3-30B-A3B has, small ones: 1575 tensors."""


@dataclass(frozen=True)
class Case:
    name: str
    model: ModelConfig
    layout: Layout
    engine_ranks: int


CASES = (
    Case("135M, data 2 to 2 engines", SMALL, Layout(data=2), 1),
    Case("135M, pipeline 2 to 2 engines", SMALL, Layout(pipeline=2), 1),
    Case("135M, 60 layers, pipeline 2 to 2 engines", replace(SMALL, num_layers=60), Layout(pipeline=2), 1),
    Case("135M, pipeline 2 x data 2 to 4 engines", SMALL, Layout(pipeline=2, data=2), 1),
    Case("128 experts, pipeline 2 x experts over 2 to 4 engines", MANY, Layout(pipeline=2, data=2, expert=2), 1),
    Case("32B shapes, 2 layers, tensor 2 to 1 engine of 2", WIDE, Layout(tensor=2), 2),
    Case("32B shapes, 2 layers, pipeline 2 to 1 engine of 2", WIDE, Layout(pipeline=2), 2),
    Case("32B shapes, 1 layer, tensor 2 to 2 engines", replace(WIDE, num_layers=1), Layout(tensor=2), 1),
    Case("32B shapes, 1 layer, tensor 4 to 2 engines of 2", replace(WIDE, num_layers=1), Layout(tensor=4), 2),
)


def sync_rows() -> Iterator[dict[str, Any]]:
    """A row a case and executor. bytes_moved: over all ranks; peak_extra_bytes: of the rank that took most."""
    for case in CASES:
        plan = Plan(model=case.model, layout=case.layout, engine_ranks=case.engine_ranks)
        least = 2 * sum(plan.totals().received)
        for executor in ("gather", "direct"):
            ranks = run_ranks(case.layout.world_size, push, case, executor, timeout=600)
            moved = sum(rank["received"] for rank in ranks)
            seconds = max(rank["seconds"] for rank in ranks)
            yield {
                "case": case.name,
                "executor": executor,
                "seconds": round(seconds, 3),
                "seconds_memcpy": round(max(rank["seconds_memcpy"] for rank in ranks), 3),
                "bytes_moved": moved,
                "bytes_lower_bound": least,
                "ratio_to_lower_bound": round(moved / least, 3) if least else None,
                "peak_extra_bytes": max(rank["peak_extra"] for rank in ranks),
            }


class Engine:
    """An engine rank's parameters, and what a loader of full tensors does."""

    def __init__(self, model: ModelConfig, engine_ranks: int, rank: int):
        shapes = engine_shapes(model, engine_ranks)
        self.own = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        self.places: dict[str, list[tuple[Tensor, int, int, int]]] = {}
        for parameter in parameters(model, Layout()):
            if parameter.row.tied:
                continue
            name, expert = engine_name(parameter)
            target = self.own[name] if expert is None else self.own[name][expert]
            position, dim = 0, cut_dim(parameter.row)
            for each in engine_slices(parameter.row, rank=rank, num_ranks=engine_ranks):
                place = (target.narrow(dim, position, len(each)), dim, each.start, len(each))
                self.places.setdefault(parameter.hugging_face[each.tensor], []).append(place)
                position += len(each)

    def load(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in named_tensors:
            for target, dim, start, length in self.places.get(name, ()):
                target.copy_(tensor.narrow(dim, start, length))

    def parameters(self) -> dict[str, Tensor]:
        return self.own


def push(case: Case, name: str) -> dict[str, Any]:
    """One rank's share, measured over some pushes after one that is not counted."""
    from megatron_mcpo.mcore.model import build_chunks
    from megatron_mcpo.weights.transfer import Direct, Executor, Gather

    groups = parallel.init(case.layout, seed=0, timeout_seconds=600)
    chunks = build_chunks(case.model, groups, dtype=torch.bfloat16, head=None)
    with torch.no_grad():
        for parameter in (each for chunk in chunks for each in chunk.parameters()):
            parameter.fill_(0.5)
    engine = Engine(case.model, case.engine_ranks, groups.rank % case.engine_ranks)
    executor: Executor = Gather(chunks=chunks, model=case.model, groups=groups)
    if name == "direct":
        executor = Direct(chunks, case.model, groups, engine_ranks=case.engine_ranks)
    before = memory("VmRSS")
    forget_peak()
    meter = executor.push(engine)
    peak = memory("VmHWM")
    seconds = []
    for _ in range(REPEATS):
        dist.barrier()
        seconds.append(timed(lambda: executor.push(engine)))
    scratch = torch.empty(max(tensor.numel() for tensor in engine.own.values()), dtype=torch.bfloat16)

    def memcpy() -> None:
        for tensor in engine.own.values():
            scratch[: tensor.numel()].copy_(tensor.view(-1))

    return {
        "received": meter.received,
        "seconds": statistics.median(seconds),
        "seconds_memcpy": min(timed(memcpy) for _ in range(3)),
        "peak_extra": peak - before,
    }
