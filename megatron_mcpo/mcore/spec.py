"""Choose the modules of a transformer layer: Transformer Engine's on a GPU, plain torch everywhere else."""

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_mcpo.config.layout import Layout
from megatron_mcpo.distributed.device import device
from megatron_mcpo.distributed.transformer_engine import transformer_engine_problem
from megatron_mcpo.mcore.attention import CoreAttention, PackedSelfAttention


class RMSNorm(nn.Module):
    """The norm x / sqrt(mean(x^2) + eps) * weight over the last dimension (https://arxiv.org/abs/1910.07467).

    Megatron-Core's torch norm refuses sequence parallelism. There the weight is replicated and its gradient partial;
    Megatron-Core sums it over the tensor group because of the attribute `sequence_parallel`.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device()))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., hidden_size]."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def uses_transformer_engine() -> bool:
    """Return whether layers are made of Transformer Engine's modules on this machine."""
    return device().type == "cuda" and transformer_engine_problem() is None


def shares_prompts(layout: Layout) -> bool:
    """Return whether the attention of these layers can put several responses behind one copy of their prompt.

    Transformer Engine's packed attention has no such mask, and context parallelism cuts sequences into equal chunks.
    """
    return layout.context == 1 and not uses_transformer_engine()


def layer_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Return the layers of this rank's stage (its chunk `vp_stage`, if interleaved) and the final norm, for GPTModel.

    Both kinds of modules write checkpoints with the same names.
    """
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    if uses_transformer_engine():
        from megatron.core.extensions.transformer_engine import TENorm

        layer = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
        return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=TENorm)
    return TransformerBlockSubmodules(layer_specs=[_plain_layer(config)] * num_layers, layer_norm=RMSNorm)


def _plain_layer(config: TransformerConfig) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention
    attention.module = PackedSelfAttention
    attention.submodules.core_attention = CoreAttention
    if config.num_moe_experts is not None:
        # Transformer Engine fuses this norm into dense MLPs only: with experts it keeps its own name.
        del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    if config.qk_layernorm:
        attention.submodules.q_layernorm = attention.submodules.k_layernorm = RMSNorm
    return layer
