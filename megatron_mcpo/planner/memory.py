"""Count bytes on every rank: what is always there, what each phase adds, and the peak of each phase.

This mirrors mcore/policy.py (DDP with fp32 gradients, Megatron-Core's distributed optimizer), mcore/schedule.py and
mcore/logprob.py (logits), weights/full_sync.py (the weight sync), and trainer/trainer.py (outside of the rollout the
engine sleeps without weights and key-value cache; its weights return for the weight sync, the cache after it).
"""

from dataclasses import dataclass
from functools import cache
from math import ceil, lcm, prod

from megatron_mcpo.config.config import Config
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.mcore.head import HeadSpec
from megatron_mcpo.planner.activations import Activations, Kernels, activations, chunks_in_flight
from megatron_mcpo.planner.hardware import GIB, Gpu
from megatron_mcpo.planner.push import staged_bytes
from megatron_mcpo.planner.ranks import Chunk, RankSize, Sizes
from megatron_mcpo.planner.step_shape import StepShape
from megatron_mcpo.rollout.blockwise import BLOCK
from megatron_mcpo.weights.engine_layout import engine_shapes

ITEMSIZE = {"bf16": 2, "fp32": 4}
_FP32 = 4

CONTEXT_BYTES = 6 * GIB
"""Driver context, NCCL's buffers, kernels, CUDA graphs: vLLM's documentation of sleep mode reports that 5.8 GiB stayed
on a GPU whose engine of a large model slept."""
CONTEXT_WITHOUT_ENGINE_BYTES = 3 * GIB
"""The trainer's own share of these, which is all if the engines are servers; assumed."""
FRAGMENTATION = 0.05
"""The share lost of everything that a phase allocates and frees again; assumed."""
ENGINE_WORKING_BYTES = 2.5 * GIB
"""Activations of a prefill of 8,192 tokens and CUDA graphs, taken out of the engine's share of the GPU; assumed."""


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """The predicted bytes of one rank.

    parts: what is held, by name; phases: the most that is held at a time, by phase
    host: of host memory, for what is offloaded
    """

    rank: int
    stage: int
    params: int
    parts: dict[str, float]
    phases: dict[str, float]
    host: float

    @property
    def peak(self) -> float:
        return max(self.phases.values())

    @property
    def worst_phase(self) -> str:
        return max(self.phases, key=lambda phase: self.phases[phase])


@dataclass(frozen=True, kw_only=True)
class EngineMemory:
    """The predicted memory of one rank of an engine.

    engines: how many there are; in_ranks: they share the trainer's GPUs, else they have GPUs of their own
    weights, cache, budget: bytes; cache_tokens: tokens whose keys and values fit
    expert_share: the share of the bytes of weights that belongs to routed experts
    sequences: the most that are decoded together
    """

    engines: int
    in_ranks: bool
    weights: float
    expert_share: float
    cache: float
    budget: float
    cache_tokens: int
    sequences: int

    def on_a_rank(self, size: float) -> float:
        """Return the part of `size` that is on a GPU of the trainer."""
        return size if self.in_ranks else 0.0


def buffer_elements(sizes: Sizes, num_ranks: int) -> int:
    """Return the length of Megatron-Core's buffer for such parameters (core/optimizer/param_layout.py, 0.19.2).

    Every parameter begins at a multiple of 64, the end is padded so that `num_ranks` shards of whole 128s fit.
    """
    padded = sum(count * -(-size // 64) * 64 for size, count in sizes)
    divisor = lcm(num_ranks, 128)
    return -(-padded // divisor) * divisor


def shard_ranks(layout: Layout) -> tuple[int, int]:
    """Return how many ranks share the optimizer of a dense parameter, and of an expert."""
    return layout.data * layout.context, layout.world_size // (layout.pipeline * layout.expert)


def buffers(chunk: Chunk, layout: Layout) -> tuple[int, int]:
    """Return the elements of a chunk's buffers and of this rank's shard of them, padding included."""
    elements, shards = 0, 0
    for sizes, ranks in zip((chunk.dense, chunk.expert), shard_ranks(layout), strict=True):
        length = buffer_elements(sizes, ranks)
        elements += length
        shards += length // ranks
    return elements, shards


def trained_bytes(size: RankSize, layout: Layout, itemsize: int) -> dict[str, float]:
    """Count weights, gradients (fp32) and optimizer of a rank: two moments, and an fp32 copy of bf16 weights."""
    elements, shards = (sum(each) for each in zip(*(buffers(chunk, layout) for chunk in size.chunks), strict=True))
    master = _FP32 if itemsize < _FP32 else 0
    return {
        "weights": float(itemsize * elements),
        "gradients": float(_FP32 * elements),
        "optimizer": float((master + 2 * _FP32) * shards),
    }


def reference_bytes(config: Config, size: RankSize, itemsize: int) -> float:
    """Count the weights of the reference; 0 without one."""
    return float(itemsize * (size.params - size.head)) if config.algorithm.kl_weight > 0 else 0.0


def engine_memory(config: Config, model: ModelConfig, layout: Layout, gpu: Gpu, shape: StepShape) -> EngineMemory:
    """Do vLLM's arithmetic: its share of the GPU, less weights and working memory, is cache."""
    ranks, e = config.engine.tensor_parallel, ITEMSIZE[config.model.dtype]
    of_experts, of_others = _engine_bytes(model, ranks, e, config.engine.quantization != "none")
    weights = of_experts + of_others
    budget = config.engine.gpu_memory_utilization * gpu.memory_bytes
    cache = max(0.0, budget - weights - ENGINE_WORKING_BYTES)
    a_token = 2 * e * model.num_layers * max(1, model.num_kv_heads // ranks) * model.head_dim
    tokens = int(cache // a_token)
    engines = len(config.engine.servers) or layout.world_size // ranks
    ahead = 1 + config.engine.prompts_ahead
    return EngineMemory(
        engines=engines,
        in_ranks=not config.engine.servers,
        weights=weights,
        expert_share=of_experts / weights,
        cache=cache,
        budget=budget,
        cache_tokens=tokens,
        sequences=min(config.engine.max_concurrent, tokens // shape.length, ceil(ahead * shape.rollouts / engines)),
    )


@cache
def _engine_bytes(model: ModelConfig, ranks: int, itemsize: int, quantized: bool) -> tuple[float, float]:
    """Count the weights of an engine rank: routed experts, and everything else.

    quantized: the layers' matrices are FP8, with an fp32 scale per block (rollout/blockwise.py)
    """
    experts = others = 0.0
    for name, shape in engine_shapes(model, ranks).items():
        routed = ".routed_experts." in name
        size = float(itemsize * prod(shape))
        if quantized and (routed or name.endswith("_proj.weight")):
            *number, rows, columns = shape
            size = float(prod(shape) + _FP32 * prod(number) * -(-rows // BLOCK) * -(-columns // BLOCK))
        experts, others = (experts + size, others) if routed else (experts, others + size)
    return experts, others


def rank_memory(
    config: Config,
    model: ModelConfig,
    layout: Layout,
    *,
    size: RankSize,
    head: HeadSpec | None,
    shape: StepShape,
    engine: EngineMemory,
    kernels: Kernels,
) -> RankMemory:
    """Count everything of one rank; its peak in a phase is what is held, what the phase adds, and the allowances."""
    e = ITEMSIZE[config.model.dtype]
    last = size.stage == layout.pipeline - 1
    kept = activations(
        model,
        layout,
        tokens=shape.micro_tokens,
        response=shape.response_tokens,
        itemsize=e,
        head=head,
        kernels=kernels,
    )
    logits_working = kept.logits_working if last else 0.0
    saved = _saved_bytes(config, model, layout, kept=kept, stage=size.stage, micros=shape.micros)
    largest = max(elements for chunk in size.chunks for elements, _ in chunk.dense + chunk.expert)
    # The gradient of a weight is a tensor of its own before it is added to the buffer.
    working = max(logits_working, kept.working + e * largest)
    trained, reference = trained_bytes(size, layout, e), reference_bytes(config, size, e)
    parts = {
        **trained,
        "reference": reference,
        "activations": saved,
        "working": working,
        "contrastive": contrast_bytes(shape, head) if last else 0.0,
        "engine_weights": engine.on_a_rank(engine.weights),
        "kv_cache": engine.on_a_rank(engine.cache),
        "sync_buckets": staged_bytes(config, model, layout, e),
        "allowance": CONTEXT_BYTES if engine.in_ranks else CONTEXT_WITHOUT_ENGINE_BYTES,
    }
    loose = 1 + FRAGMENTATION
    added = {
        "rollout": engine.on_a_rank(engine.budget),
        "score": loose * max(logits_working, kept.layer + kept.working),
        "update": loose * (saved + working + parts["contrastive"]),
        "sync": parts["engine_weights"] + loose * parts["sync_buckets"],
    }
    return RankMemory(
        rank=size.rank,
        stage=size.stage,
        params=size.params,
        parts=parts,
        phases=_phases(config, trained, reference, added, parts["allowance"]),
        host=reference * config.model.offload_reference + trained["optimizer"] * config.optimizer.offload,
    )


def _phases(
    config: Config, trained: dict[str, float], reference: float, added: dict[str, float], allowance: float
) -> dict[str, float]:
    """Count what each phase holds: what it adds, and all else that is not in host memory (mcore/offload.py)."""
    held = dict.fromkeys(added, trained["weights"] + allowance)
    for phase in held:
        if phase == "score" or not config.model.offload_reference:
            held[phase] += reference
        if not config.optimizer.offload:
            held[phase] += trained["gradients"] + trained["optimizer"]
    phases = {phase: held[phase] + added[phase] for phase in added}
    if config.optimizer.offload:
        # The backward pass is over when the optimizer's state arrives.
        phases["update"] = held["update"] + trained["gradients"] + max(added["update"], trained["optimizer"])
    return phases


def _saved_bytes(
    config: Config, model: ModelConfig, layout: Layout, *, kept: Activations, stage: int, micros: int
) -> float:
    """Count the most that autograd keeps on a rank of `stage` at a time."""
    layers = max(layout.stage_layers(model.num_layers, stage))
    flying = chunks_in_flight(layout, stage=stage, micros=micros)
    # Megatron-Core keeps a chunk's output until its gradient arrives.
    outputs = 0.0 if layout.pipeline == 1 else kept.layer_input
    behind = kept.ends if stage == layout.pipeline - 1 else 0.0
    if config.model.recompute == "full":
        # What is behind the layers is freed when the first of them is computed again.
        return flying * (layers * kept.layer_input + outputs) + max(kept.layer, behind)
    if config.model.recompute == "selective":
        return flying * (layers * kept.layer_selective + outputs) + max(kept.layer - kept.layer_selective, behind)
    return flying * (layers * kept.layer + outputs) + behind


def contrast_bytes(shape: StepShape, head: HeadSpec | None) -> float:
    """Count the representations of an optimizer step's rollouts, their gradient, and a few tiles (algo/contrastive.py).

    The terms work in blocks of rows: memory grows with the number of rollouts, not with its square.
    """
    if head is None:
        return 0.0
    rollouts = shape.rollouts / shape.updates
    return 6 * _FP32 * rollouts * head.dim
