"""Read the sizes of a model from a Hugging Face folder without torch or transformers, so that it fails fast.

Every field of config.json is honoured, known to be harmless, or must have the one value that is implemented. A field in
none of the tables is refused: it may change what the model computes without anyone noticing.
"""

import json
from pathlib import Path
from typing import Any

from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.config.hf_files import is_sharded, read_headers, read_json
from megatron_mcpo.config.model import Experts, Family, ModelConfig, RopeScaling

_OTHER = "Choose another model"
_FIX = "Correct config.json"
_FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MistralForCausalLM": "mistral",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "MixtralForCausalLM": "mixtral",
}
_DEFAULT_HEAD_DIM: dict[Family, int] = {"qwen3": 128}
"""The value of transformers where head_dim is missing; for other families hidden_size / num_attention_heads."""

_REQUIRED_INTS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
_HONOURED = {
    *_REQUIRED_INTS,
    *("architectures", "model_type", "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings"),
    *("rope_theta", "rope_scaling", "rope_parameters", "eos_token_id"),
    *("auto_map", "quantization_config", "use_sliding_window", "sliding_window", "layer_types"),
}
_DEFAULT_ROPE_THETA: dict[Family, float] = {"mixtral": 1e6}
"""The value where rope_theta is missing; for other families 10,000."""
_DEFAULT_WINDOW: dict[Family, int] = {"mistral": 4096}
"""Attention windows where sliding_window is missing, which is not the same as null."""
_MUST_BE: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu",), "only SwiGLU (silu) is implemented"),
    "attention_bias": ((False, None), "biases of the attention's projections are implemented only as Qwen2 has them"),
    "mlp_bias": ((False, None), "biases in the MLP are not implemented"),
    "attention_dropout": ((0, None), "log-probs of the trainer and the engine would differ by the dropout"),
    "hidden_dropout": ((0, None), "log-probs of the trainer and the engine would differ by the dropout"),
    "pretraining_tp": ((1, None), "only the unsplit computation is implemented"),
    "partial_rotary_factor": ((1, None), "rotary embeddings cover the whole head"),
    "rope_interleaved": ((False, None), "only the half-split rotary layout is implemented"),
    "use_mrope": ((False, None), "multimodal rotary embeddings are not implemented"),
    "is_encoder_decoder": ((False, None), "only decoders are implemented"),
    "add_cross_attention": ((False, None), "only decoders are implemented"),
    "tie_encoder_decoder": ((False, None), "only decoders are implemented"),
    "pruned_heads": (({}, None), "pruned heads are not implemented"),
}
_HONOURED_OF: dict[Family, set[str]] = {
    "qwen3_moe": {
        *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
        *("decoder_sparse_step", "mlp_only_layers"),
    },
    "mixtral": {"num_local_experts", "num_experts_per_tok", "router_jitter_noise"},
}
_HARMLESS_OF: dict[Family, set[str]] = {
    # Weights of pre-training losses: they do not change what the model computes.
    "qwen3_moe": {"router_aux_loss_coef", "output_router_logits"},
    "mixtral": {"router_aux_loss_coef", "output_router_logits"},
}
_HARMLESS = {
    # Where the file comes from and who reads it.
    *("_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "tokenizer_class", "is_llama_config"),
    *("transformers.js_config", "unsloth_fixed", "unsloth_version", "task_specific_params", "finetuning_task"),
    # Training from scratch, memory, output format.
    *("initializer_range", "use_cache", "gradient_checkpointing", "torch_dtype", "dtype", "torchscript"),
    *("use_bfloat16", "return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward"),
    *("_attn_implementation", "attn_implementation", "_attn_implementation_autoset", "use_flash_attn"),
    # Classification heads and encoder-decoder leftovers that every transformers 4 configuration may carry.
    *("id2label", "label2id", "num_labels", "problem_type", "is_decoder", "cross_attention_hidden_size", "prefix"),
    *("decoder_start_token_id", "sep_token_id", "pad_token_id", "bos_token_id"),
    # It is read only if use_sliding_window is true, which is refused.
    "max_window_layers",
    # Sampling defaults: a run takes them from its own configuration.
    *("temperature", "top_k", "top_p", "max_length", "max_new_tokens", "do_sample", "repetition_penalty"),
}
_LLAMA3_CONSTANTS = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
"""Written into Megatron-Core's RotaryEmbedding (0.19.2); only the factor can be chosen."""
_YARN_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_factor": (None,),
    "mscale": (None,),
    "mscale_all_dim": (None,),
    "truncate": (None, True),
}

_LISTED = 5
"""Names of a folder's contents that a message lists."""


def from_folder(path: Path, *, with_weights: bool = True) -> ModelConfig:
    """Read a Hugging Face folder: config.json, generation_config.json, and whether the weight files can be read.

    with_weights: whether the folder must have weights; those of a sharded checkpoint are checked when they are loaded
    Raises ConfigError with all problems at once: field, value, rule and fix.
    """
    if not path.is_dir():
        fix = "Give one with config.json and safetensors. Ids of a hub are not taken: download the model first"
        raise ConfigError([f"model.path = {str(path)!r}: must be a folder (no such folder). {fix}."])
    if not (path / "config.json").is_file():
        rule = "must hold a model: config.json, a tokenizer and safetensors"
        fix = "Get one with `hf download Qwen/Qwen3-0.6B --local-dir models/qwen3-0.6b` and name that folder"
        raise ConfigError([f"model.path = {str(path)!r}: {rule} (it holds {_contents(path)}). {fix}."])
    files: list[str] = []
    values = read_json(path / "config.json", files)
    if values is None:
        raise ConfigError(files)
    asks = path / "generation_config.json"
    generation = read_json(asks, files) if asks.is_file() else {}
    try:
        if with_weights and not is_sharded(path):
            read_headers(path)
    except ConfigError as error:
        files += error.problems
    problems: list[str] = []
    family = _family(values, problems)
    problems += _field_problems(values, family)
    problems += _attention_window_problems(values, family)
    sizes = {key: _positive_int(values, key, problems) for key in _REQUIRED_INTS}
    num_heads = sizes["num_attention_heads"]
    num_kv_heads = _kv_heads(values, family, num_heads, problems)
    head_dim = _head_dim(values, family, sizes["hidden_size"], num_heads, problems)
    rope_theta, rope_scaling = _rope(values, family, problems)
    norm_eps = _positive_float(values, "rms_norm_eps", problems)
    experts = _experts(values, family, problems)
    eos_token_ids = _eos(generation or {}, values, sizes["vocab_size"], problems)
    if problems or files:
        raise ConfigError([f"{path}: {problem}" for problem in problems] + files)
    return ModelConfig(
        family=family,
        num_layers=sizes["num_hidden_layers"],
        hidden_size=sizes["hidden_size"],
        ffn_hidden_size=sizes["intermediate_size"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=sizes["vocab_size"],
        max_positions=sizes["max_position_embeddings"],
        norm_eps=norm_eps,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tied_embeddings=bool(values.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2",
        qk_norm=family in ("qwen3", "qwen3_moe"),
        experts=experts,
        eos_token_ids=eos_token_ids,
    )


def _contents(folder: Path) -> str:
    """Return the first names in a folder, in words."""
    names = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in folder.iterdir())
    more = [f"{len(names) - _LISTED} more"] if len(names) > _LISTED else []
    return ", ".join([*names[:_LISTED], *more]) or "nothing"


def _family(values: dict[str, Any], problems: list[str]) -> Family:
    """Return the family; if it is not supported, add a problem and return any, so that the other checks can run."""
    found = values.get("architectures")
    known = [name for name in found if name in _FAMILIES] if isinstance(found, list) else []
    if not isinstance(found, list) or len(found) != 1 or not known:
        problems.append(f"architectures = {found!r}: must be one of {', '.join(_FAMILIES)}. {_OTHER}.")
        return "llama"
    family = _FAMILIES[known[0]]
    model_type = values.get("model_type", family)
    if model_type != family:
        problems.append(f"model_type = {model_type!r}: must be {family!r} for the architecture {known[0]}. {_FIX}.")
    return family


def _field_problems(values: dict[str, Any], family: Family) -> list[str]:
    known = _HONOURED | _HONOURED_OF.get(family, set()) | _HARMLESS | _HARMLESS_OF.get(family, set())
    problems = []
    if values.get("auto_map"):
        problems.append(
            "auto_map: must be absent (code from the model's folder is never run). Use a folder without custom code."
        )
    if values.get("quantization_config"):
        problems.append(
            "quantization_config: must be absent (quantized weights cannot be trained). Use the bf16 or fp32 model."
        )
    for key, value in values.items():
        if key in _MUST_BE:
            allowed, why = _MUST_BE[key]
            if value not in allowed:
                problems.append(f"{key} = {value!r}: must be {allowed[0]!r} ({why}). {_OTHER}.")
        elif key not in known:
            problems.append(
                f"{key} = {json.dumps(value)[:60]}: must be a known field (an unknown one may change what the model "
                "computes). If it does not, remove it from config.json (or add it to _HARMLESS in config/hf_config.py)."
            )
    return problems


def _attention_window_problems(values: dict[str, Any], family: Family) -> list[str]:
    """Check that attention is full: a window is used if use_sliding_window says so or, without it, if one is given."""
    problems = []
    window = values.get("sliding_window", _DEFAULT_WINDOW.get(family))
    if values.get("use_sliding_window", window is not None):
        problems.append(f"sliding_window = {window!r}: must be off (only full attention is implemented). {_OTHER}.")
    other = sorted({str(kind) for kind in values.get("layer_types") or ()} - {"full_attention"})
    if other:
        problems.append(
            f"layer_types has {', '.join(other)}: must be full_attention (nothing else is implemented). {_OTHER}."
        )
    return problems


def _positive_int(values: dict[str, Any], key: str, problems: list[str]) -> int:
    value = values.get(key)
    if type(value) is int and value > 0:
        return value
    problems.append(f"{key} = {value!r}: must be a positive integer. {_FIX}.")
    return 1


def _positive_float(values: dict[str, Any], key: str, problems: list[str]) -> float:
    value: Any = values.get(key)
    if type(value) in (int, float) and 0 < value < float("inf"):
        return float(value)
    problems.append(f"{key} = {value!r}: must be a positive number. {_FIX}.")
    return 1.0


def _experts(values: dict[str, Any], family: Family, problems: list[str]) -> Experts | None:
    """Return the experts in the MLP of every layer; None for a dense family."""
    if family == "qwen3_moe":
        if values.get("decoder_sparse_step", 1) != 1 or values.get("mlp_only_layers"):
            problems.append(
                f"decoder_sparse_step = {values.get('decoder_sparse_step')!r}, mlp_only_layers = "
                f"{values.get('mlp_only_layers')!r}: must be 1 and [] (only models with experts in every layer "
                f"are implemented). {_OTHER}."
            )
        count = "num_local_experts" if "num_local_experts" in values else "num_experts"  # transformers 5 and 4
        ffn, normalized = "moe_intermediate_size", values.get("norm_topk_prob", False)
    elif family == "mixtral":
        if values.get("router_jitter_noise"):
            problems.append(
                f"router_jitter_noise = {values['router_jitter_noise']!r}: must be 0 (log-probs of the trainer and the "
                f"engine would differ by the noise). {_OTHER}."
            )
        count, ffn, normalized = "num_local_experts", "intermediate_size", True
    else:
        return None
    known = len(problems)
    num_experts, per_token = (_positive_int(values, key, problems) for key in (count, "num_experts_per_tok"))
    if per_token > num_experts and len(problems) == known:
        problems.append(f"num_experts_per_tok = {per_token}: must be at most {count} = {num_experts}. {_FIX}.")
    return Experts(
        count=num_experts,
        per_token=per_token,
        ffn_hidden_size=_positive_int(values, ffn, problems),
        normalized=bool(normalized),
    )


def _kv_heads(values: dict[str, Any], family: Family, num_heads: int, problems: list[str]) -> int:
    if values.get("num_key_value_heads") is None and (family == "llama" or "num_key_value_heads" in values):
        return num_heads
    num_kv_heads = _positive_int(values, "num_key_value_heads", problems)
    if num_heads % num_kv_heads:
        problems.append(f"num_key_value_heads = {num_kv_heads}: must divide num_attention_heads = {num_heads}. {_FIX}.")
    return num_kv_heads


def _head_dim(values: dict[str, Any], family: Family, hidden_size: int, num_heads: int, problems: list[str]) -> int:
    if values.get("head_dim") is not None:
        head_dim = _positive_int(values, "head_dim", problems)
    elif "head_dim" not in values and family in _DEFAULT_HEAD_DIM:
        return _DEFAULT_HEAD_DIM[family]
    elif hidden_size % num_heads:
        problems.append(
            f"hidden_size = {hidden_size}: must be a multiple of num_attention_heads = {num_heads}. {_FIX}."
        )
        return 2
    else:
        head_dim = hidden_size // num_heads
    if head_dim % 2:
        problems.append(f"head_dim = {head_dim}: must be even (rotary embeddings turn pairs). {_OTHER}.")
    return head_dim


def _rope(values: dict[str, Any], family: Family, problems: list[str]) -> tuple[float, RopeScaling | None]:
    """Return base and scaling from rope_parameters (transformers 5) or rope_theta and rope_scaling (transformers 4)."""
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        table = values.get(key) or {}
        if not isinstance(table, dict):
            problems.append(f"{key} = {table!r}: must be an object. {_FIX}.")
            table = {}
        rope |= table
    default = {"rope_theta": _DEFAULT_ROPE_THETA.get(family, 10000.0)}
    theta = _positive_float(default | values | rope, "rope_theta", problems)
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
    if rope.get("partial_rotary_factor") not in (None, 1):
        problems.append(f"partial_rotary_factor = {rope['partial_rotary_factor']!r}: must be 1. {_OTHER}.")
    scaling: RopeScaling | None = None
    if kind == "linear":
        known |= {"factor"}
        scaling = RopeScaling(kind="linear", factor=_positive_float(rope, "factor", problems))
    elif kind == "llama3":
        known |= {"factor", *_LLAMA3_CONSTANTS}
        scaling = _llama3_scaling(rope, problems)
    elif kind == "yarn":
        known |= {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", *_YARN_FIXED}
        scaling = _yarn_scaling(rope, problems)
    elif kind != "default":
        problems.append(f"rope_type = {kind!r}: must be default, linear, llama3 or yarn. {_OTHER}.")
        return theta, None
    for key in sorted(set(rope) - known):
        problems.append(f"rope: {key} = {rope[key]!r}: must be absent (rope_type {kind!r} does not use it). Remove it.")
    return theta, scaling


def _llama3_scaling(rope: dict[str, Any], problems: list[str]) -> RopeScaling:
    for key, needed in _LLAMA3_CONSTANTS.items():
        if rope.get(key) != needed:
            problems.append(
                f"rope: {key} = {rope.get(key)!r}: must be {needed} (Megatron-Core computes llama3 scaling "
                f"with no other value). {_OTHER}."
            )
    return RopeScaling(
        kind="llama3",
        factor=_positive_float(rope, "factor", problems),
        low_freq_factor=_LLAMA3_CONSTANTS["low_freq_factor"],
        high_freq_factor=_LLAMA3_CONSTANTS["high_freq_factor"],
        original_max_positions=_LLAMA3_CONSTANTS["original_max_position_embeddings"],
    )


def _yarn_scaling(rope: dict[str, Any], problems: list[str]) -> RopeScaling:
    for key, allowed in _YARN_FIXED.items():
        if rope.get(key) not in allowed:
            problems.append(
                f"rope: {key} = {rope[key]!r}: must be absent (vLLM takes yarn's attention factor from factor "
                f"alone and rounds its range). {_OTHER}."
            )
    betas = {key: rope[key] for key in ("beta_fast", "beta_slow") if rope.get(key)}  # as transformers: 0 is absent
    return RopeScaling(
        kind="yarn",
        factor=_positive_float(rope, "factor", problems),
        original_max_positions=_positive_int(rope, "original_max_position_embeddings", problems),
        beta_fast=_positive_float({"beta_fast": 32.0} | betas, "beta_fast", problems),
        beta_slow=_positive_float({"beta_slow": 1.0} | betas, "beta_slow", problems),
    )


def _eos(generation: dict[str, Any], values: dict[str, Any], vocab_size: int, problems: list[str]) -> tuple[int, ...]:
    found = generation.get("eos_token_id", values.get("eos_token_id"))
    ids = found if isinstance(found, list) else [found]
    if ids and all(type(i) is int and 0 <= i < vocab_size for i in ids):
        return tuple(ids)
    problems.append(
        f"eos_token_id = {found!r}: must be token ids below vocab_size = {vocab_size} (else no response would ever "
        "end). Set it in generation_config.json or config.json."
    )
    return ()
