"""Measure what it costs to bring the policy's weights into the engines, both ways, on real gloo ranks.

`.venv/bin/python -m benchmarks.push [--cases PART] [--json] [--out benchmarks/results/NAME.json]`
The engine is a substitute that copies what it is given into parameters of its own, as vLLM's loaders do.
"""

import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.measure import forget_peak, memory, options, timed, write_rows
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import Experts, ModelConfig
from megatron_mcpo.distributed import parallel
from megatron_mcpo.distributed.device import device
from megatron_mcpo.distributed.memory import trim
from megatron_mcpo.weights.engine_layout import engine_name, engine_shapes, engine_slices
from megatron_mcpo.weights.full_sync import default_bucket_bytes
from megatron_mcpo.weights.mapping import parameters
from megatron_mcpo.weights.reshard_plan import SyncPlan
from megatron_mcpo.weights.shards import cut_dim, placed
from tests.support.ranks import run_ranks

if TYPE_CHECKING:
    from megatron_mcpo.weights.reshard_sync import WeightSync

REPEATS, LARGE_REPEATS = 9, 3
LARGE = 10**9
"""Parameters of an engine rank from which a sync is repeated less often."""
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
    num_layers=6,
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
ONE = replace(WIDE, num_layers=1)
EVEN: dict[str, Any] = dict(num_heads=8, num_kv_heads=4)
"""A tensor-parallel engine can't divide nine heads and three key-value heads by two."""
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
    Case("135M, pipeline 2 to 2 engines", SMALL, Layout(pipeline=2), 1),
    Case("135M, 60 layers, pipeline 2 to 2 engines", replace(SMALL, num_layers=60), Layout(pipeline=2), 1),
    Case("135M, 120 layers, pipeline 2 to 2 engines", replace(SMALL, num_layers=120), Layout(pipeline=2), 1),
    Case("135M, pipeline 2 to 1 engine of 2", replace(SMALL, **EVEN), Layout(pipeline=2), 2),
    Case("135M, pipeline 2 x data 2 to 4 engines", SMALL, Layout(pipeline=2, data=2), 1),
    Case("135M, data 2 to 2 engines", SMALL, Layout(data=2), 1),
    Case("135M, tensor 2 x pipeline 2 to 2 engines of 2", replace(SMALL, **EVEN), Layout(tensor=2, pipeline=2), 2),
    Case("128 experts, experts over 2 to 1 engine of 2", MANY, Layout(data=2, expert=2), 2),
    Case("128 experts, pipeline 2 x experts over 2 to 4 engines", MANY, Layout(pipeline=2, data=2, expert=2), 1),
    Case("32B shapes, 1 layer, tensor 1 to 1 engine", ONE, Layout(), 1),
    Case("32B shapes, 1 layer, tensor 2 to 2 engines", ONE, Layout(tensor=2), 1),
    Case("32B shapes, 1 layer, tensor 4 to 4 engines", ONE, Layout(tensor=4), 1),
    Case("32B shapes, 1 layer, tensor 4 to 2 engines of 2", ONE, Layout(tensor=4), 2),
    Case("32B shapes, 6 layers, tensor 2 to 1 engine of 2", WIDE, Layout(tensor=2), 2),
    Case("32B shapes, 6 layers, pipeline 2 to 1 engine of 2", WIDE, Layout(pipeline=2), 2),
)
"""They grow with the layers, the engines, and tensor parallelism; the last two have 6 GB of weights."""


def main(arguments: Sequence[str]) -> int:
    parser = options(__doc__)
    parser.add_argument("--cases", default="", help="only those with this in their names")
    known = parser.parse_args(arguments)
    return write_rows("push", sync_rows(known.cases), known)


def sync_rows(part: str) -> Iterator[dict[str, Any]]:
    """Yield a row per case and way, of the cases with `part` in their names.

    Times are each rank's least, of the slowest rank.
    seconds_memcpy: of copying what the engine holds, by one rank at a time
    seconds_floor: of moving the same bytes between the same ranks without any work on them (see `floor`)
    seconds_processor, bytes_moved: over all ranks
    seconds_gathering: of full tensors for an engine that loads nothing; seconds_loading: of the engine's part in
        `seconds`. The two overlap by as much as they add up to more than `seconds`.
    peak_extra_bytes: of the rank that took most
    """
    for case in CASES:
        if part not in case.name:
            continue
        plan = SyncPlan(model=case.model, layout=case.layout, engine_ranks=case.engine_ranks)
        least = 2 * sum(plan.totals().received)
        ranks = run_ranks(case.layout.world_size, measure, case, timeout=600)
        for weight_sync in ("reshard", "full tensors"):
            costs: list[dict[str, float]] = [rank[weight_sync] for rank in ranks]
            highest = {key: max(cost[key] for cost in costs) for key in costs[0]}
            moved = sum(int(cost["received"]) for cost in costs)
            yield {
                "case": case.name,
                "weight_sync": weight_sync,
                **{key: round(value, 4) for key, value in highest.items() if key.startswith("seconds")},
                "seconds_processor": round(sum(cost["seconds_processor"] for cost in costs), 4),
                "ratio_to_memcpy": round(highest["seconds"] / highest["seconds_memcpy"], 2),
                "ratio_floor": round(highest["seconds"] / highest["seconds_floor"], 2),
                "bytes_moved": moved,
                "bytes_lower_bound": least,
                "ratio_to_lower_bound": round(moved / least, 3) if least else None,
                "peak_extra_bytes": int(highest["peak_extra"]),
            }


class Engine:
    """An engine rank's parameters, with a loader of full tensors."""

    def __init__(self, model: ModelConfig, engine_ranks: int, rank: int):
        self.loading: list[float] = []
        shapes = engine_shapes(model, engine_ranks)
        self.own = {name: torch.ones(shape, dtype=torch.bfloat16, device=device()) for name, shape in shapes.items()}
        self.places: dict[str, list[tuple[Tensor, int, int, int]]] = {}
        for parameter in parameters(model, Layout()):
            if parameter.mapping.tied:
                continue
            name, expert = engine_name(parameter)
            target = self.own[name] if expert is None else self.own[name][expert]
            dim = cut_dim(parameter.mapping)
            for each, position in placed(engine_slices(parameter.mapping, rank=rank, num_ranks=engine_ranks)):
                place = (target.narrow(dim, position, len(each)), dim, each.start, len(each))
                self.places.setdefault(parameter.hugging_face[each.tensor], []).append(place)

    def update(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> int:
        self.loading.append(0.0)
        for name, tensor in named_tensors:
            start_time = time.perf_counter()
            for target, dim, start, length in self.places.get(name, ()):
                target.copy_(tensor.narrow(dim, start, length))
            self.loading[-1] += time.perf_counter() - start_time
        return 0

    def parameters(self) -> dict[str, Tensor]:
        return self.own

    @contextmanager
    def rewriting(self, version: int) -> Iterator[dict[str, Tensor]]:
        yield self.own


class Drain:
    """An engine that loads nothing."""

    def update(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> int:
        return sum(0 for _ in named_tensors)


def measure(case: Case) -> dict[str, dict[str, float]]:
    """Return one rank's costs of each way."""
    from megatron_mcpo.mcore.model import build_chunks
    from megatron_mcpo.weights.reshard_sync import FullTensorSync, ReshardSync

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // case.layout.world_size))  # or they would wait for each other
    groups = parallel.init(case.layout, seed=0, timeout_seconds=600)
    chunks = build_chunks(case.model, groups, dtype=torch.bfloat16, head=None)
    with torch.no_grad():
        for parameter in (each for chunk in chunks for each in chunk.parameters()):
            parameter.fill_(0.5)
    engine = Engine(case.model, case.engine_ranks, groups.rank % case.engine_ranks)
    largest = max(engine.own.values(), key=Tensor.numel)
    scratch = torch.ones_like(largest).view(-1)

    def memcpy() -> None:
        for tensor in engine.own.values():
            scratch[: tensor.numel()].copy_(tensor.view(-1))

    for rank in range(groups.world_size):  # one after the other, or they would share the memory's bandwidth
        if rank == groups.rank:
            memcpy()
            copying = min(timed(memcpy) for _ in range(REPEATS))
        dist.barrier()
    repeats = LARGE_REPEATS if sum(map(Tensor.numel, engine.own.values())) > LARGE else REPEATS
    full = FullTensorSync(chunks=chunks, model=case.model, groups=groups, engine=engine)
    costs = {
        ReshardSync.name: cost(
            ReshardSync(chunks, case.model, groups, engine, engine_ranks=case.engine_ranks), repeats
        ),
        full.name: cost(full, repeats),
    }
    costs[full.name]["seconds_loading"] = min(engine.loading)
    costs[full.name]["seconds_gathering"] = cost(replace(full, engine=Drain()), repeats)["seconds"]
    least = floor(SyncPlan(model=case.model, layout=case.layout, engine_ranks=case.engine_ranks), groups, repeats)
    return {name: each | {"seconds_memcpy": copying, "seconds_floor": least} for name, each in costs.items()}


def floor(plan: SyncPlan, groups: parallel.Groups, repeats: int) -> float:
    """Return the least seconds in which this rank's bytes of a plan move, by one message per peer and bucket.

    Messages are sent from and received into one buffer each; what the rank holds itself is copied between two buffers.
    All ranks do so at once, as in a sync.
    """
    sends, receives, local = Counter[int](), Counter[int](), 0
    for step in plan.steps():
        for message in step.messages:
            elements = step.elements(message)
            if message.source == message.target == groups.rank:
                local += elements
            elif message.source == groups.rank:
                sends[message.target] += elements
            elif message.target == groups.rank:
                receives[message.source] += elements
    most = default_bucket_bytes() // 4 // torch.bfloat16.itemsize
    buffer, other = (torch.zeros(most, dtype=torch.bfloat16) for _ in range(2))

    def move() -> None:
        for start in range(0, local, most):
            size = min(most, local - start)
            other[:size].copy_(buffer[:size])
        for start in range(0, max([*sends.values(), *receives.values()], default=0), most):
            work = [
                dist.P2POp(operation, kept[: min(most, elements - start)], peer, groups.world)
                for operation, kept, by_peer in ((dist.isend, buffer, sends), (dist.irecv, other, receives))
                for peer, elements in by_peer.items()
                if elements > start
            ]
            for each in dist.batch_isend_irecv(work) if work else []:
                each.wait()

    seconds = []
    for _ in range(repeats):
        dist.barrier()
        seconds.append(timed(move))
    return min(seconds)


def cost(weight_sync: "WeightSync", repeats: int) -> dict[str, float]:
    """Return the memory of a first sync, and the least time of some more: other work on the machine only adds to it."""
    trim()
    before = memory("VmRSS")
    forget_peak()
    stats = weight_sync.sync(1)
    peak = memory("VmHWM")
    seconds, processor = [], time.process_time()
    for _ in range(repeats):
        dist.barrier()
        seconds.append(timed(lambda: weight_sync.sync(1)))
    return {
        "received": stats.received,
        "seconds": min(seconds),
        "seconds_processor": (time.process_time() - processor) / repeats,
        "peak_extra": peak - before,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
