"""Build the pipeline chunks of a GPTModel from what a Hugging Face configuration says."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import ModelConfig, RopeScaling
from megatron_mcpo.config.schema import Fp8, Recompute
from megatron_mcpo.distributed.device import device
from megatron_mcpo.distributed.parallel import Groups
from megatron_mcpo.mcore.gradient_fusion import fuses_gradients
from megatron_mcpo.mcore.head import ContrastiveHead, HeadSpec
from megatron_mcpo.mcore.precision import fp8_options
from megatron_mcpo.mcore.spec import layer_spec, uses_transformer_engine

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def padded_vocab_size(model: ModelConfig, tensor: int) -> int:
    """Return the vocabulary size, padded so that every tensor rank has the same number of rows, at least one real."""
    return -(-model.vocab_size // tensor) * tensor


def transformer_config(
    model: ModelConfig, groups: Groups, *, dtype: torch.dtype, recompute: Recompute, fp8: Fp8
) -> TransformerConfig:
    """Return Megatron's description of the layers and of how they are divided."""
    layout = groups.layout
    interleaved = layout.virtual_pipeline > 1
    config = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if interleaved else None,
        pipeline_model_parallel_layout=_stages(layout),
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=1,
        sequence_parallel=layout.sequence,
        # With two stages, previous and next rank are the same one and batched messages match in the wrong order:
        # the interleaved schedule is then silently wrong.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        gradient_accumulation_fusion=fuses_gradients(dtype),
        # Unfused it is a loop over the sequences of a pack, with 13 kernels for each. The fused kernel ignores the
        # attention factor of yarn (0.19.2).
        apply_rope_fusion=uses_transformer_engine() and not _is_yarn(model),
        use_cpu_initialization=device().type != "cuda",
        perform_initialization=False,
        **_expert_options(model),
        **_recompute_options(model, recompute),
        **fp8_options(fp8),
    )
    assert not (interleaved and config.batch_p2p_comm)
    for name, value in _yarn_options(model).items():
        setattr(config, name, value)
    return config


def _stages(layout: Layout) -> list[list[str]] | None:
    """Return what every chunk holds as Megatron-Core wants it; None: equally many layers."""
    if not layout.layers_per_stage:
        return None
    stages = [["decoder"] * layers for layers in layout.layers_per_stage]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages


def _is_yarn(model: ModelConfig) -> bool:
    return model.rope_scaling is not None and model.rope_scaling.kind == "yarn"


def _yarn_options(model: ModelConfig) -> dict[str, Any]:
    """Return what GPTModel and SelfAttention (0.19.2) look up in a configuration that has no such fields."""
    scaling = model.rope_scaling
    if scaling is None or scaling.kind != "yarn":
        return {}
    return {
        "yarn_rotary_scaling_factor": scaling.factor,
        "yarn_original_max_position_embeddings": scaling.original_max_positions,
        "yarn_beta_fast": scaling.beta_fast,
        "yarn_beta_slow": scaling.beta_slow,
        **_attention_factor(scaling),
        "yarn_correction_range_round_to_int": scaling.truncate,
    }


def _attention_factor(scaling: RopeScaling) -> dict[str, float | None]:
    """Return the two scales from which Megatron-Core (0.19.2) computes yarn's attention factor, their quotient.

    A scale m gives 0.1 m ln(factor) + 1 where factor is above 1, else 1; without both it is 0.1 ln(factor) + 1.
    """
    wanted = scaling.attention_factor
    if wanted is None:
        return {"yarn_mscale": None, "yarn_mscale_all_dim": None}
    numerator = (wanted - 1) / (0.1 * math.log(scaling.factor)) if scaling.factor > 1 else 0.0
    return {"yarn_mscale": numerator, "yarn_mscale_all_dim": 0.0}


def _expert_options(model: ModelConfig) -> dict[str, Any]:
    """Return the options of experts: their router adds no loss and drops no token, as in the engine."""
    if model.experts is None:
        return {}
    return {
        "num_moe_experts": model.experts.count,
        "moe_router_topk": model.experts.per_token,
        "moe_ffn_hidden_size": model.experts.ffn_hidden_size,
        "moe_router_pre_softmax": not model.experts.normalized,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": uses_transformer_engine(),
    }


def _recompute_options(model: ModelConfig, recompute: Recompute) -> dict[str, Any]:
    if recompute == "none":
        return {}
    if recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    modules = ["moe" if model.experts else "mlp"]
    # Transformer Engine's fused attention keeps no scores, and computes them a second time by itself.
    return {
        "recompute_granularity": "selective",
        "recompute_modules": modules if uses_transformer_engine() else ["core_attn", *modules],
    }


def build_chunks(
    model: ModelConfig,
    groups: Groups,
    *,
    dtype: torch.dtype,
    head: HeadSpec | None,
    recompute: Recompute = "none",
    fp8: Fp8 = "off",
) -> list[nn.Module]:
    """Build this rank's chunks of the model, one per virtual pipeline stage; weights have yet to be loaded.

    In bf16 each chunk is wrapped in Megatron's Float16Module.

    Args:
        model: The model's numbers.
        groups: The groups of this rank.
        dtype: Of the parameters.
        head: Attached to the last chunk as `contrastive_head`; None for no head.
        recompute: See config.schema.ModelSection; takes effect in training mode.
        fp8: See config.schema.ModelSection; takes effect always.
    """
    config = transformer_config(model, groups, dtype=dtype, recompute=recompute, fp8=fp8)
    stages = range(groups.layout.virtual_pipeline)
    interleaved = len(stages) > 1
    chunks = []
    for stage in stages:
        is_first = groups.is_first_stage and stage == 0
        is_last = groups.is_last_stage and stage == stages[-1]
        vp_stage = stage if interleaved else None
        chunk: Any = GPTModel(
            config=config,
            transformer_layer_spec=layer_spec(config, vp_stage),
            vocab_size=padded_vocab_size(model, groups.layout.tensor),
            max_sequence_length=model.max_positions,
            pre_process=is_first,
            post_process=is_last,
            parallel_output=True,
            share_embeddings_and_output_weights=model.tied_embeddings,
            position_embedding_type="yarn" if _is_yarn(model) else "rope",
            rotary_base=model.rope_theta,
            rope_scaling=model.rope_scaling is not None and model.rope_scaling.kind == "llama3",
            rope_scaling_factor=model.rope_scaling.factor if model.rope_scaling else 1.0,
            seq_len_interpolation_factor=(
                model.rope_scaling.factor if model.rope_scaling and model.rope_scaling.kind == "linear" else None
            ),
            vp_stage=vp_stage,
        ).to(device())
        chunk.real_vocab_size = model.vocab_size
        if head is not None and is_last:
            chunk.contrastive_head = ContrastiveHead(model.hidden_size, head, dtype=dtype, device=device())
        chunks.append(Float16Module(config, chunk) if dtype is torch.bfloat16 else chunk)
    return chunks


def unwrap(module: nn.Module) -> Any:
    """Return the GPTModel inside Megatron's wrappers (DDP, Float16Module)."""
    inner: Any = module
    while hasattr(inner, "module"):
        inner = inner.module
    return inner


@torch.no_grad()
def logits(chunk: nn.Module, tokens_1T: Tensor) -> Tensor:
    """Return the logits (T, vocabulary), on the CPU, of one sequence in the only chunk of an undivided model."""
    length = tokens_1T.shape[1]
    ends = torch.tensor([0, length], dtype=torch.int32, device=device())
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=length, max_seqlen_kv=length
    )
    logits_1TV: Tensor = chunk.eval()(tokens_1T.to(device()), None, None, packed_seq_params=packed)
    return logits_1TV[0].cpu()
