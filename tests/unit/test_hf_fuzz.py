"""config.json with random fields, read by us and by transformers' AutoConfig: what we accept means the same to both.

Not covered here: what a model computes from the same numbers (test_hf_parity.py), and vLLM's own reading.
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.hf_fields import FAMILIES
from megatron_mcpo.config.model import ModelConfig

NUM_CONFIGS = 400
"""For each family."""

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 1,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_experts": 4}
ODD: list[Any] = [None, True, False, 0, -1, 1, 3, 2.5, 1e308, 10**400, "x", "", "false", [], [1], {}, {"a": 1}]
ROPES: list[Any] = [
    None,
    {},
    {"rope_theta": 5e5},
    {"rope_type": "default", "rope_theta": 1e6},
    {"type": "linear", "factor": 2.0},
    {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
    {"type": "linear", "rope_type": "default", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.3},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 1.5},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.7},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "truncate": False, "beta_fast": 2},
    {"rope_type": "yarn", "factor": 1e308, "original_max_position_embeddings": 64},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "default", "partial_rotary_factor": 0.5},
]
USUAL: dict[str, list[Any]] = {
    "rope_scaling": ROPES,
    "rope_parameters": ROPES,
    "rope_theta": [10000.0, 1e6, None],
    "sliding_window": [None, 8, 4096],
    "use_sliding_window": [False, True, None],
    "max_window_layers": [0, 2, 28],
    "layer_types": [None, ["full_attention"] * 3, ["full_attention"] * 2, ["sliding_attention"] * 3],
    "tie_word_embeddings": [True, False],
    "head_dim": [None, 16, 32],
    "num_key_value_heads": [None, 1, 2, 4],
    "num_experts": [4, 8],
    "num_local_experts": [4, 8],
    "num_experts_per_tok": [1, 2],
    "norm_topk_prob": [True, False],
    "eos_token_id": [None, 2, [2, 3], [], 101],
    "max_sequence_length": [None, 64, 512],
    "min_length": [0],
    "activation": ["swiglu", "gelu"],
    "attention_bias": [True, False],
    "mlp_bias": [True, False],
    "hidden_act": ["silu", "gelu"],
    "attention_dropout": [0.0, 0.1],
}
MISSING = object()


def random_values(family: str, architecture: str, rng: random.Random) -> dict[str, Any]:
    """Return a usual configuration with some fields of this or another family changed, odd, or left out."""
    values = {"architectures": [architecture], "model_type": family, **SIZES}
    if family == "mistral":
        values["sliding_window"] = None
    if family == "qwen3_moe":
        values |= EXPERTS
    if family == "mixtral":
        values |= {"num_experts_per_tok": 2, "num_local_experts": 4}
    for key in rng.sample([*USUAL, *SIZES], rng.randint(1, 4)):
        if "experts" in key and key not in values and rng.random() < 0.8:
            continue
        choices = USUAL.get(key, [])
        value = rng.choice([*choices, *choices, *choices, *ODD, MISSING])
        if value is MISSING:
            values.pop(key, None)
        else:
            values[key] = value
    return values


def ours(model: ModelConfig) -> dict[str, Any]:
    scaling = model.rope_scaling
    return {
        "family": model.family,
        "sizes": (model.num_layers, model.hidden_size, model.ffn_hidden_size, model.vocab_size),
        "heads": (model.num_heads, model.num_kv_heads, model.head_dim),
        "eps": model.norm_eps,
        "tied": model.tied_embeddings,
        "plain": ("silu", False, False, 0),
        "window": None,
        "experts": model.experts and (model.experts.count, model.experts.per_token, model.experts.normalized),
        "rope": (model.rope_theta, scaling.kind if scaling else "default", scaling.factor if scaling else None),
        "factor": scaling.attention_factor if scaling else None,
    }


def theirs(config: Any) -> dict[str, Any]:
    """Return the same from transformers' configuration, with the attributes and defaults that its models read."""
    rope = config.rope_parameters
    heads = config.num_attention_heads
    config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    experts = None
    if config.model_type in ("qwen3_moe", "mixtral"):
        normalized = config.model_type == "mixtral" or config.norm_topk_prob
        experts = (config.num_local_experts, config.num_experts_per_tok, normalized)
    window = getattr(config, "sliding_window", None)
    windows = {window} if config.model_type in ("mistral", "mixtral", "qwen3_moe") else set()
    windows |= {kind for kind in getattr(config, "layer_types", None) or () if kind != "full_attention"}
    stated = rope.get("attention_factor") or (rope.get("mscale") and rope.get("mscale_all_dim"))
    factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")[1] if rope["rope_type"] == "yarn" and stated else None
    return {
        "family": config.model_type,
        "sizes": (config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.vocab_size),
        "heads": (heads, config.num_key_value_heads, config.head_dim),
        "eps": config.rms_norm_eps,
        "tied": config.tie_word_embeddings,
        "plain": (
            config.hidden_act,
            bool(getattr(config, "attention_bias", False)),
            bool(getattr(config, "mlp_bias", False)),
            config.attention_dropout or 0,
        ),
        "window": next(iter(windows - {None}), None),
        "experts": experts,
        "rope": (rope["rope_theta"], rope["rope_type"], rope.get("factor")),
        "factor": factor,
    }


@pytest.mark.parametrize(("architecture", "family"), FAMILIES.items())
def test_what_is_accepted_means_the_same_to_transformers(tmp_path: Path, architecture: str, family: str) -> None:
    rng = random.Random(family)
    accepted = 0
    for _ in range(NUM_CONFIGS):
        values = random_values(family, architecture, rng)
        (tmp_path / "config.json").write_text(json.dumps(values))
        try:
            model = from_folder(tmp_path, with_weights=False)
        except ConfigError as error:
            assert error.problems and all(len(problem) < 600 for problem in error.problems)
            continue
        try:
            config = AutoConfig.from_pretrained(tmp_path)
        except Exception:  # of many kinds; the start of a run refuses what transformers refuses
            continue
        assert ours(model) == theirs(config), values
        accepted += 1
    assert accepted > NUM_CONFIGS / 20, "the comparison needs configurations that are accepted"
