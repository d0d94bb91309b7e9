"""Count the bytes that all ranks together receive from other ranks in a step, by group.

Formulas of https://arxiv.org/abs/2205.05198 (section 4.2: tensor and sequence parallelism, an all-gather or a
reduce-scatter is a `unit`), https://arxiv.org/abs/1910.02054 (distributed optimizer) and of the code that they mirror.
Scalars, sizes, objects and the sums of norms' gradients are left out.
"""

from megatron_mcpo.config.config import Config
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.config.schema import Recompute
from megatron_mcpo.mcore.head import HeadSpec
from megatron_mcpo.planner.memory import ITEMSIZE, buffer_elements, shard_ranks
from megatron_mcpo.planner.push import received_bytes
from megatron_mcpo.planner.ranks import RankSize
from megatron_mcpo.planner.step_shape import StepShape

_FP32 = 4


def passes(config: Config) -> tuple[int, int]:
    """Return the number of forward-only passes over a step's rollouts (policy, reference), and of training passes."""
    return config.scores_policy + (config.algorithm.kl_weight > 0), 1


def tensor_units(model: ModelConfig, layout: Layout, *, recompute: Recompute) -> tuple[int, int]:
    """Count a layer's all-gathers and reduce-scatters of [tokens, hidden]: (forward, forward and backward together).

    With sequence parallelism a column-parallel layer gathers its input, and once more for its weight's gradient, whose
    own is scattered. Without it, each all-reduce counts as two units. Experts are not cut, only attention is.
    Selective recompute repeats those of the MLP.
    """
    blocks = 1 if model.experts else 2
    forward = 2 * blocks
    backward = (3 if layout.sequence else 2) * blocks
    again = {"none": 0, "selective": 2 * (blocks - 1), "full": forward}[recompute]
    return forward, forward + backward + again


def wire_bytes(
    config: Config,
    model: ModelConfig,
    layout: Layout,
    *,
    sizes: list[RankSize],
    head: HeadSpec | None,
    shape: StepShape,
) -> dict[str, float]:
    """Count the bytes of a step: tensor, pipeline, data, context, expert, sync (to the engines), contrastive."""
    e = ITEMSIZE[config.model.dtype]
    scores, updates = passes(config)
    micros = shape.micros * shape.updates  # of a replica, in a step
    stage_ranks = layout.world_size // layout.pipeline
    hidden = e * shape.micro_tokens * model.hidden_size
    forward, both = tensor_units(model, layout, recompute=config.model.recompute)
    layers = scores * forward + updates * both
    # Embedding and output layer take a unit each, and one for each backward pass.
    units = model.num_layers * layers + 2 * (scores + 2 * updates)
    logits = 2 * 4 * _FP32 * shape.response_tokens * (scores + updates)
    tensor = (layout.tensor - 1) / layout.tensor * (units * hidden + logits) * stage_ranks * micros
    boundaries = layout.pipeline * layout.virtual_pipeline - 1
    divided = layout.tensor if layout.sequence else 1
    pipeline = boundaries * hidden / divided * stage_ranks * micros * (scores + 2 * updates)
    if layout.pipeline == 1:
        pipeline = 0.0
    return {
        "tensor": tensor,
        "pipeline": pipeline,
        "data": shape.updates * sum(sum(data_bytes(size, layout, e)) for size in sizes) * stage_ranks,
        "context": context_bytes(model, layout, shape, e) * micros * (scores + 3 * updates) * layout.world_size,
        "expert": expert_bytes(config, model, layout, shape) * micros * layout.world_size,
        "sync": float(sum(received_bytes(config, model, layout, e))),
        "contrastive": gather_bytes(layout, shape, head) * layout.world_size,
    }


def data_bytes(size: RankSize, layout: Layout, itemsize: int) -> tuple[float, float]:
    """Count one rank's bytes in an optimizer step: fp32 gradients that are reduced, new weights that are gathered."""
    others = 0.0
    for chunk in size.chunks:
        for elements, ranks in zip((chunk.dense, chunk.expert), shard_ranks(layout), strict=True):
            others += buffer_elements(elements, ranks) * (ranks - 1) / ranks
    return _FP32 * others, itemsize * others


def context_bytes(model: ModelConfig, layout: Layout, shape: StepShape, itemsize: int) -> float:
    """Count one rank's bytes of keys and values per micro-batch and forward pass; backward also their gradients."""
    if layout.context == 1:
        return 0.0
    kv = max(1, model.num_kv_heads // layout.tensor) * model.head_dim
    layers = model.num_layers / layout.pipeline
    return (layout.context - 1) * 2 * itemsize * kv * shape.micro_tokens * layers


def expert_bytes(config: Config, model: ModelConfig, layout: Layout, shape: StepShape) -> float:
    """Count one rank's bytes per micro-batch: each token travels to its experts and back, forward and backward."""
    if model.experts is None or layout.expert == 1:
        return 0.0
    scores, updates = passes(config)
    rounds = 2 * (scores + updates * (3 if config.model.recompute != "none" else 2))
    picks = shape.micro_tokens / layout.tensor * model.experts.per_token
    once = ITEMSIZE[config.model.dtype] * picks * model.hidden_size * (layout.expert - 1) / layout.expert
    return rounds * once * model.num_layers / layout.pipeline


def gather_bytes(layout: Layout, shape: StepShape, head: HeadSpec | None) -> float:
    """Count one rank's bytes in a step: representations of the other replicas' rollouts (distributed/gather.py)."""
    if head is None:
        return 0.0
    return shape.updates * (layout.data - 1) * shape.replica_rollouts * head.dim * _FP32
