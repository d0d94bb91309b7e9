"""Predict the seconds of a step's phases from kernel rates; no figure here is fitted to a measured step.

Training: products at a layer's rate, attention and memory-bound work at theirs, collectives that nothing hides, the
pipeline's bubble, the gaps between kernels. Rollout: decoding reads all weights and the cache for every token and is
memory-bound; reading prompts is compute-bound. Rewards, data and checkpoints are left out: they depend on the task.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from megatron_mcpo.config.config import Config
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.mcore.head import HeadSpec
from megatron_mcpo.planner.hardware import Gpu
from megatron_mcpo.planner.lengths import Lengths
from megatron_mcpo.planner.memory import ITEMSIZE, EngineMemory, buffers, reference_bytes, trained_bytes
from megatron_mcpo.planner.push import is_resharded, num_tensors, received_bytes
from megatron_mcpo.planner.ranks import RankSize
from megatron_mcpo.planner.step_shape import StepShape
from megatron_mcpo.planner.wire import (
    context_bytes,
    data_bytes,
    expert_bytes,
    gather_bytes,
    passes,
    tensor_units,
)
from megatron_mcpo.weights.mapping import total_params

_TERA, _GIGA = 1e12, 1e9
_OPTIMIZER_BYTES = 30
"""Bytes of Adam per parameter: read gradient, master copy and two moments; write weight, master copy and moments."""
_GRADIENT_BYTES = 16
"""Bytes per gradient: it is zeroed, checked for infinities, used for the norm, and reduced."""
_POINTS = 128
"""Of the course of a rollout, at which it is looked at."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """The seconds of one micro-batch on an average stage, forward and backward; last: what the last stage adds.

    hand_on: the part of `forward` and of `backward` that does not grow with the layers
    """

    forward: float
    backward: float
    hand_on: float
    last_forward: float
    last_backward: float


def layer_flops(model: ModelConfig) -> float:
    """Count the forward FLOPs of one layer's products per token: 2 for every weight that the token meets."""
    hidden = model.hidden_size
    attention = hidden * model.qkv_rows + model.num_heads * model.head_dim * hidden
    if model.experts is None:
        return 2.0 * (attention + 3 * hidden * model.ffn_hidden_size)
    experts = model.experts.per_token * 3 * hidden * model.experts.ffn_hidden_size + hidden * model.experts.count
    return 2.0 * (attention + experts)


def mlp_share(model: ModelConfig) -> float:
    """Return the share of a layer's products in its MLP or experts, which selective recompute does again."""
    attention = model.hidden_size * model.qkv_rows + model.num_heads * model.head_dim * model.hidden_size
    return 1 - 2.0 * attention / layer_flops(model)


def attention_flops(model: ModelConfig, length: int) -> float:
    """Count the forward FLOPs of one layer's causal attention per token of a sequence of `length`."""
    return 2.0 * length * model.num_heads * model.head_dim


def memory_bound_bytes(model: ModelConfig, layout: Layout, itemsize: int) -> float:
    """Count a layer's bytes read and written per token outside of products: norms, residuals, rotations, the gate."""
    sp = layout.tensor if layout.sequence else 1
    heads = (model.num_heads + model.num_kv_heads) * model.head_dim / layout.tensor
    if model.experts is None:
        gate = 7 * model.ffn_hidden_size / layout.tensor
    else:
        gate = model.experts.per_token / sp * (10 * model.experts.ffn_hidden_size + 6 * model.hidden_size)
    return itemsize * (10 * model.hidden_size / sp + (10 + 2 * model.qk_norm) * heads + gate)


def link(gpu: Gpu, *, first: int, ranks: int) -> float:
    """Return the bytes per second that a rank receives in a group of `ranks` ranks, `first` ranks apart."""
    return _GIGA * (gpu.nvlink_gbs if first * ranks <= gpu.per_node else gpu.network_gbs)


def micro_pass(config: Config, model: ModelConfig, layout: Layout, gpu: Gpu, shape: StepShape) -> Pass:
    """Predict the seconds of one micro-batch on a stage with an average number of layers."""
    e, tokens = ITEMSIZE[config.model.dtype], shape.micro_tokens
    layers = model.num_layers / layout.pipeline
    products = layers * tokens * layer_flops(model) / layout.tensor / (gpu.gemm_tflops * _TERA)
    attention = layers * tokens * attention_flops(model, shape.length) / layout.tensor / _TERA
    attending, attending_back = (
        attention / gpu.attention_forward_tflops,
        2.5 * attention / gpu.attention_backward_tflops,
    )
    copies = layers * tokens * memory_bound_bytes(model, layout, e) / (gpu.copy_tbs * _TERA)
    messages, experts, context, hand_on = _message_seconds(config, model, layout, gpu, shape)
    forward = (products + attending + copies) / gpu.busy + messages + experts + hand_on
    # A ring of keys and values hides behind attention as far as that takes longer.
    forward += max(0.0, context - attending)
    # Of a backward pass's messages, those of column-parallel layers hide behind their products.
    backward = (2 * products + attending_back + 2 * copies) / gpu.busy + messages / 2 + experts + hand_on
    backward += max(0.0, 2 * context - attending_back)
    if config.model.recompute == "full":
        backward += forward - hand_on
    elif config.model.recompute == "selective":
        backward += mlp_share(model) * products / gpu.busy + (experts if model.experts else messages / 2)
    logits = shape.response_tokens * model.vocab_size / layout.tensor
    last = 2 * logits * model.hidden_size / (gpu.gemm_tflops * _TERA)
    # mcore/logprob.py passes over the logits and their fp32 copies some nine times, and again in the backward pass.
    over = (6 * 4 + 3 * e) * logits / (gpu.copy_tbs * _TERA)
    return Pass(
        forward=forward,
        backward=backward,
        hand_on=hand_on,
        last_forward=(last + over) / gpu.busy,
        # Logits are computed a second time, and then multiplied by each of their operands.
        last_backward=(3 * last + over) / gpu.busy,
    )


def _message_seconds(
    config: Config, model: ModelConfig, layout: Layout, gpu: Gpu, shape: StepShape
) -> tuple[float, float, float, float]:
    """Return seconds of messages in a micro-batch's forward pass: tensor, expert, context ranks, and the next stage."""
    e = ITEMSIZE[config.model.dtype]
    hidden, layers = e * shape.micro_tokens * model.hidden_size, model.num_layers / layout.pipeline
    tensor = experts = hand_on = 0.0
    if layout.tensor > 1:
        unit = hidden * (layout.tensor - 1) / layout.tensor / link(gpu, first=1, ranks=layout.tensor)
        units, _ = tensor_units(model, layout, recompute="none")
        tensor = layers * units * (unit + gpu.message_us * 1e-6)
    if layout.expert > 1:
        rounds = sum(passes(config)) + 1 + (config.model.recompute != "none")
        experts = expert_bytes(config, model, layout, shape) / rounds / link(gpu, first=1, ranks=layout.expert)
        experts += 2 * layers * gpu.message_us * 1e-6
    if layout.pipeline > 1:
        size = hidden / (layout.tensor if layout.sequence else 1)
        speed = link(gpu, first=layout.world_size // layout.pipeline, ranks=layout.pipeline)
        hand_on = layout.virtual_pipeline * (size / speed + gpu.message_us * 1e-6)
    context = context_bytes(model, layout, shape, e) / link(gpu, first=layout.tensor, ranks=layout.context)
    return tensor, experts, context, hand_on


def pipeline_seconds(layout: Layout, micros: int, stages: Sequence[float]) -> float:
    """Return the seconds of a pipeline at the pace of its slowest stage. stages: of one micro-batch on each

    The bubble, the time of a micro-batch on all other stages, is divided by the number of chunks of a stage:
    https://arxiv.org/abs/2104.04473 (section 2.2).
    """
    return micros * max(stages) + (sum(stages) - max(stages)) / layout.virtual_pipeline


def stage_seconds(model: ModelConfig, layout: Layout, *, whole: float, hand_on: float, last: float) -> list[float]:
    """Return the seconds of one micro-batch on every stage.

    whole: on a stage with an average number of layers; hand_on: the part of it that does not grow with the layers;
    last: what the last stage adds
    """
    average = model.num_layers / layout.pipeline
    found = []
    for stage in range(layout.pipeline):
        layers = sum(layout.stage_layers(model.num_layers, stage))
        found.append((whole - hand_on) * layers / average + hand_on + last * (stage == layout.pipeline - 1))
    return found


def decode_seconds(
    config: Config, model: ModelConfig, gpu: Gpu, shape: StepShape, engine: EngineMemory, together: float
) -> float:
    """Predict the seconds in which an engine decodes one token of each of so many sequences."""
    ranks, e = config.engine.tensor_parallel, ITEMSIZE[config.model.dtype]
    reading = gpu.decode_share * gpu.copy_tbs * _TERA
    a_token = 2 * e * model.num_layers * max(1, model.num_kv_heads // ranks) * model.head_dim
    cache = together * (shape.prompt + shape.response / 2) * a_token
    products = together * _token_flops(model) / ranks / (gpu.gemm_tflops * _TERA)
    weights = _weights_read(model, engine, together)
    messages = 0.0
    if ranks > 1:
        size = 2 * e * together * model.hidden_size * (ranks - 1) / ranks
        messages = 2 * model.num_layers * (size / link(gpu, first=1, ranks=ranks) + gpu.message_us * 1e-6)
    return max(weights / reading, products) + cache / reading + messages + gpu.engine_step_ms * 1e-3


def rollout_seconds(
    config: Config, model: ModelConfig, gpu: Gpu, shape: StepShape, lengths: Lengths, engine: EngineMemory
) -> tuple[float, float]:
    """Predict the seconds of a rollout on all engines, and of the longest response if others fill its engine.

    A prompt is read once for all its samples (prefix caching). An engine is full while sequences wait; the last of them
    end one after the other, until the longest of all rollouts has ended. Where engines sample ahead of the trainer they
    are always full, and sequences that a sync interrupts are read again, on average with half of their responses.
    """
    if engine.sequences == 0:
        return float("inf"), float("inf")
    mine = -(-shape.rollouts // engine.engines)
    ahead = config.engine.prompts_ahead > 0
    waves = mine / engine.sequences if ahead else -(-mine // engine.sequences)
    together = engine.sequences if ahead else ceil(mine / waves)
    full = decode_seconds(config, model, gpu, shape, engine, together)
    tokens = [lengths.limit * (number + 0.5) / _POINTS for number in range(_POINTS)]
    decoded = lengths.limit / _POINTS  # at each of these points, by sequences that go on so far
    longest = decoded * full * sum(lengths.any_longer(token, shape.rollouts) for token in tokens)
    read = float(-(-config.batch.prompts // engine.engines) * shape.prompt)
    if ahead and config.engine.in_flight == "keep":
        read += together * (shape.prompt + lengths.mean / 2)
    per_token = _token_flops(model) / config.engine.tensor_parallel / (gpu.gemm_tflops * _TERA) / gpu.busy
    decoding = waves * lengths.mean * full
    if not ahead:
        decoding = (waves - 1) * lengths.mean * full + decoded * sum(
            lengths.any_longer(token, shape.rollouts)
            * decode_seconds(config, model, gpu, shape, engine, max(1.0, together * lengths.share_longer(token)))
            for token in tokens
        )
    return decoding + read * per_token, longest


def _token_flops(model: ModelConfig) -> float:
    """Count the FLOPs of all products for one token."""
    return model.num_layers * layer_flops(model) + 2.0 * model.hidden_size * model.vocab_size


def _weights_read(model: ModelConfig, engine: EngineMemory, sequences: float) -> float:
    """Count the bytes of weights that a decoding step reads: only those experts that some sequence is sent to."""
    if model.experts is None:
        return engine.weights
    met = 1 - (1 - model.experts.per_token / model.experts.count) ** sequences
    return engine.weights * (1 - engine.expert_share * (1 - met))


def sync_seconds(config: Config, model: ModelConfig, layout: Layout, gpu: Gpu, engine: EngineMemory) -> float:
    """Predict a weight sync: the largest receive of a rank, those of a server's workers, and the engine's loading."""
    e = ITEMSIZE[config.model.dtype]
    across = link(gpu, first=1, ranks=layout.tensor)
    if is_resharded(config, model):
        across = link(gpu, first=1, ranks=layout.world_size)
    elif layout.pipeline > 1:
        across = link(gpu, first=layout.world_size // layout.pipeline, ranks=layout.pipeline)
    seconds = max(received_bytes(config, model, layout, e)) / across + 4 * engine.weights / (gpu.copy_tbs * _TERA)
    if not is_resharded(config, model):
        seconds += num_tensors(model) * gpu.tensor_us * 1e-6
    if engine.in_ranks:
        return seconds
    # A rank sends every full tensor to each of its servers over the network.
    mine = -(-engine.engines // layout.world_size)
    return seconds + mine * e * total_params(model) / (gpu.network_gbs * _GIGA)


def step_seconds(
    config: Config,
    model: ModelConfig,
    layout: Layout,
    gpu: Gpu,
    *,
    sizes: list[RankSize],
    head: HeadSpec | None,
    shape: StepShape,
    lengths: Lengths,
    engine: EngineMemory,
) -> dict[str, float]:
    """Predict the seconds of rollout, score, update and sync, and of step.

    A step takes their sum. Where engines sample ahead of the trainer it takes the longer of rollout and learning, and
    the sync; and the longest response must end in k + 1 steps' rollouts, less the learning in the last (k:
    engine.staleness).

    shape: with responses of mean length
    """
    e = ITEMSIZE[config.model.dtype]
    once = micro_pass(config, model, layout, gpu, shape)
    scores, _ = passes(config)
    forward = stage_seconds(model, layout, whole=once.forward, hand_on=once.hand_on, last=once.last_forward)
    backward = stage_seconds(model, layout, whole=once.backward, hand_on=once.hand_on, last=once.last_backward)
    score = scores * shape.updates * pipeline_seconds(layout, shape.micros, forward)
    both = [sum(each) for each in zip(forward, backward, strict=True)]
    update = shape.updates * pipeline_seconds(layout, shape.micros, both)
    shared = layout.data * layout.context
    of_data = link(gpu, first=layout.tensor, ranks=shared)
    elements, shards = zip(*(buffers(chunk, layout) for size in sizes for chunk in size.chunks), strict=True)
    per_stage = len(elements) / len(sizes)
    optimizer = per_stage * (max(shards) * _OPTIMIZER_BYTES + max(elements) * _GRADIENT_BYTES) / (gpu.copy_tbs * _TERA)
    reduced, gathered = (part / of_data for part in max(data_bytes(size, layout, e) for size in sizes))
    # Gradients are reduced during the last micro-batch's backward pass.
    update += shape.updates * (max(0.0, reduced - once.backward) + gathered + optimizer)
    update += gather_bytes(layout, shape, head) / of_data
    if config.optimizer.offload:
        state = max(trained_bytes(size, layout, e)["optimizer"] for size in sizes)
        update += shape.updates * 2 * state / (gpu.host_gbs * _GIGA)
    if config.model.offload_reference:
        score += shape.updates * max(reference_bytes(config, size, e) for size in sizes) / (gpu.host_gbs * _GIGA)
    rollout, longest = rollout_seconds(config, model, gpu, shape, lengths, engine)
    sync = sync_seconds(config, model, layout, gpu, engine)
    seconds = {"rollout": rollout, "score": score, "update": update, "sync": sync}
    learning = score + update
    if config.engine.prompts_ahead == 0:
        return {**seconds, "step": rollout + learning + sync}
    in_time = (longest + learning) / (config.engine.staleness + 1)
    return {**seconds, "step": max(rollout, learning, in_time) + sync}
