"""Configurations of small models, one per family."""

from dataclasses import replace

from megatron_mcpo.config.model import Experts, ModelConfig

MODEL = ModelConfig(
    family="qwen3",
    num_layers=8,
    hidden_size=12,
    ffn_hidden_size=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    vocab_size=21,
    max_positions=64,
    norm_eps=1e-6,
    rope_theta=1e4,
    rope_scaling=None,
    tied_embeddings=False,
    qkv_bias=False,
    qk_norm=True,
    experts=None,
    eos_token_ids=(2,),
)


FAMILIES = [
    replace(MODEL, family="llama", qk_norm=False),
    replace(MODEL, family="qwen2", qk_norm=False, qkv_bias=True, tied_embeddings=True),
    MODEL,
    replace(MODEL, family="mistral", qk_norm=False),
]


EXPERTS = Experts(count=4, per_token=2, ffn_hidden_size=8, normalized=True)


WITH_EXPERTS = [
    replace(MODEL, family="qwen3_moe", experts=EXPERTS),
    replace(MODEL, family="mixtral", qk_norm=False, experts=EXPERTS),
]
