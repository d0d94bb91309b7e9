"""Count the bytes that a micro-batch keeps for the backward pass, tensor by tensor.

This refines https://arxiv.org/abs/2205.05198 (section 4) for gated MLPs, grouped queries and packed sequences. With
`PLAIN` kernels it is compared against what autograd keeps in a real model on a CPU (test_planner_memory.py). The
figures of Transformer Engine's kernels come from reading its code: a norm keeps its input instead of two fp32 tensors,
attention keeps one output.
Names: t tokens of a rank in a micro-batch, r response tokens among them, e bytes per element.
"""

from dataclasses import dataclass

from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.mcore.head import HeadSpec
from megatron_mcpo.mcore.logprob import MOST_LOGITS
from megatron_mcpo.mcore.model import padded_vocab_size

_INDEX = 8
_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """What a kind of kernels keeps for the backward pass.

    norm_bytes: of a norm, per element of its input; attention_outputs: copies of attention's output
    """

    norm_bytes: int
    attention_outputs: int


PLAIN = Kernels(norm_bytes=8, attention_outputs=2)
"""The kernels of mcore/spec.py and mcore/attention.py in bf16 on a CPU, for sequences of several hundred tokens."""
TRANSFORMER_ENGINE = Kernels(norm_bytes=2, attention_outputs=1)
"""Those of Transformer Engine in bf16. FlashAttention and the fused norm also keep a row statistic, as PLAIN does."""


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes that one micro-batch keeps.

    layer: of one layer; layer_selective, layer_input: what selective and full recompute keep of it
    ends: of the last chunk behind its layers; nothing is kept of logits
    logits_working: while logits are computed or differentiated; working: largest temporary tensors of a layer
    """

    layer: float
    layer_selective: float
    layer_input: float
    ends: float
    logits_working: float
    working: float


def activations(
    model: ModelConfig,
    layout: Layout,
    *,
    tokens: int,
    response: int,
    itemsize: int,
    head: HeadSpec | None,
    kernels: Kernels,
) -> Activations:
    """Count what one micro-batch of `tokens` tokens keeps on a rank, `response` of which have logits."""
    t, e, tp, hidden = tokens, itemsize, layout.tensor, model.hidden_size
    sp = tp if layout.sequence else 1
    q = model.num_heads // tp * model.head_dim
    kv = max(1, model.num_kv_heads // tp) * model.head_dim
    row = _FP32 / model.head_dim
    norm = kernels.norm_bytes * hidden + _FP32
    attention = e * (q + 2 * kv) + e * (q + kv) + row * q + kernels.attention_outputs * e * q
    if model.qk_norm:
        attention += (kernels.norm_bytes + row) * (q + kv)
    angles = 4 * model.head_dim * e  # cosines and sines, for queries and for keys
    mlp = _mlp_bytes(model, layout, e)
    layer = 2 * (norm + e * hidden) / sp + attention + angles + mlp
    vocabulary = padded_vocab_size(model, tp) // tp
    pooled = 0.0 if head is None else response * (_FP32 * hidden / sp + 2 * _INDEX)
    widest = 4 * (model.experts.per_token * model.experts.ffn_hidden_size / sp if model.experts else _ffn(model, tp))
    return Activations(
        layer=t * layer,
        layer_selective=t * (layer - mlp),
        layer_input=t * e * hidden / sp,
        ends=t * norm / sp + response * (e * hidden + 2 * _INDEX + _FP32) + pooled,
        # mcore/logprob.py: some logits, their fp32 copy and a product of that size; the gradients of its two operands.
        logits_working=(2 * _FP32 + e) * min(MOST_LOGITS, response * vocabulary)
        + response * hidden * _FP32
        + e * vocabulary * hidden,
        working=t * e * (hidden + widest),
    )


def _ffn(model: ModelConfig, tp: int) -> float:
    return model.ffn_hidden_size / tp


def _mlp_bytes(model: ModelConfig, layout: Layout, e: int) -> float:
    """Count bytes per token of an MLP: gate and up together, silu(gate), up + offset, their product.

    For experts also the product times the router's weight, for every expert that a token is sent to, with the copy of
    the token. Experts are assumed to get equally many tokens: a rank whose experts get twice as many needs twice this.
    """
    if model.experts is None:
        return 5 * e * _ffn(model, layout.tensor)
    share = model.experts.per_token / (layout.tensor if layout.sequence else 1)
    indices = 3 * _FP32 + 4 * _INDEX
    return share * (e * model.hidden_size + 6 * e * model.experts.ffn_hidden_size + indices)


def chunks_in_flight(layout: Layout, *, stage: int, micros: int) -> int:
    """Return how many forward passes of one chunk wait for their backward pass at the same time, at most.

    1F1B: https://arxiv.org/abs/2104.04473 (section 2.2); Megatron-Core's schedules.get_pp_rank_microbatches.
    """
    behind = layout.pipeline - stage - 1
    if layout.virtual_pipeline == 1:
        return min(behind + 1, micros)
    return min(2 * behind + (layout.virtual_pipeline - 1) * layout.pipeline + 1, micros * layout.virtual_pipeline)
