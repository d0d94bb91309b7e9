"""Check the fields of a Hugging Face config.json: each is honoured, known to be harmless, or must have one value."""

import json
import sys
from typing import Any

from megatron_mcpo.config.model import Family

OTHER = "Choose another model"
FIX = "Correct config.json"
FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MistralForCausalLM": "mistral",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "MixtralForCausalLM": "mixtral",
}
REQUIRED_INTS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
POSITION_LIMITS = ("max_seq_len", "seq_length", "model_max_length", "max_sequence_length", "max_seq_length", "seq_len")
"""Other names under which vLLM (0.30.0) looks for the number of positions; it takes the smallest."""

_HONOURED = {
    *REQUIRED_INTS,
    *POSITION_LIMITS,
    *("architectures", "model_type", "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings"),
    *("rope_theta", "rope_scaling", "rope_parameters", "eos_token_id"),
    *("auto_map", "quantization_config", "use_sliding_window", "sliding_window", "layer_types"),
}
_SWITCHES_WINDOW: set[Family] = {"qwen2", "qwen3", "qwen3_moe"}
"""Families that have a window only with `use_sliding_window`; the others read `sliding_window` alone."""
_DEFAULT_WINDOW: dict[Family, int] = {"mistral": 4096}
"""Attention windows where sliding_window is missing, which is not the same as null."""
_ATTENTION_DROPOUT = "log-probs of the trainer and the engine would differ by the dropout"
_MUST_BE: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu",), "only SwiGLU (silu) is implemented"),
    "activation": (("swiglu", "silu", None), "only SwiGLU (silu) is implemented"),
    "attention_bias": ((False, None), "biases of the attention's projections are implemented only as Qwen2 has them"),
    "mlp_bias": ((False, None), "biases in the MLP are not implemented"),
    "attention_dropout": ((0, None), _ATTENTION_DROPOUT),
    "hidden_dropout": ((0, None), _ATTENTION_DROPOUT),
    "pretraining_tp": ((1, None), "only the unsplit computation is implemented"),
    "partial_rotary_factor": ((1, None), "rotary embeddings cover the whole head"),
    "rope_interleaved": ((False, None), "only the half-split rotary layout is implemented"),
    "use_mrope": ((False, None), "multimodal rotary embeddings are not implemented"),
    "is_encoder_decoder": ((False, None), "only decoders are implemented"),
    "add_cross_attention": ((False, None), "only decoders are implemented"),
    "tie_encoder_decoder": ((False, None), "only decoders are implemented"),
    "pruned_heads": (({}, None), "pruned heads are not implemented"),
}
_MUST_BE_OF: dict[Family, dict[str, tuple[tuple[Any, ...], str]]] = {
    # Qwen3-Coder-30B-A3B states what the family is without them; transformers does not read them.
    "qwen3_moe": {
        "qkv_bias": ((False,), "biases of the attention's projections are implemented only as Qwen2 has them"),
        "shared_expert_intermediate_size": ((0,), "experts that all tokens share are not implemented"),
        "use_qk_norm": ((True,), "queries and keys of the family are normalized"),
    },
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
    *("_flash_attn_2_enabled", "tf_legacy_loss"),
    # Classification heads and encoder-decoder leftovers that every transformers 4 configuration may carry.
    *("id2label", "label2id", "num_labels", "problem_type", "is_decoder", "cross_attention_hidden_size", "prefix"),
    *("decoder_start_token_id", "sep_token_id", "pad_token_id", "bos_token_id"),
    # It is read only if use_sliding_window is true, which is refused.
    "max_window_layers",
    # Settings of generation, which every transformers 4 configuration may carry: a run takes them from its own.
    *("temperature", "top_k", "top_p", "typical_p", "max_length", "min_length", "max_new_tokens", "do_sample"),
    *("early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "repetition_penalty", "length_penalty"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences"),
    *("output_scores", "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id"),
    *("remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"),
}
_LARGEST = {"num_hidden_layers": 1000, "num_experts": 1024, "num_local_experts": 1024}
_LARGEST_OTHER = 2**31 - 1
"""Sizes above these are mistakes, and would be counted up to for hours before anything else refused them."""


def field_problems(values: dict[str, Any], family: Family) -> list[str]:
    """Return why fields of config.json are refused, a line per field.

    A field in none of the tables is refused: it may change what the model computes without anyone noticing.
    """
    known = _HONOURED | _HONOURED_OF.get(family, set()) | _HARMLESS | _HARMLESS_OF.get(family, set())
    must_be = _MUST_BE | _MUST_BE_OF.get(family, {})
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
        if key in must_be:
            allowed, why = must_be[key]
            if value not in allowed:
                problems.append(f"{key} = {short(value)}: must be {allowed[0]!r} ({why}). {OTHER}.")
        elif key not in known:
            problems.append(
                f"{key} = {short(value)}: must be a known field (an unknown one may change what the model "
                "computes). If it does not, remove it from config.json (or add it to _HARMLESS in config/hf_fields.py)."
            )
    return problems


def window_problems(values: dict[str, Any], family: Family) -> list[str]:
    """Return why attention would not be full in every layer, as transformers and vLLM read the family's fields."""
    problems = []
    window = values.get("sliding_window", _DEFAULT_WINDOW.get(family))
    on = values.get("use_sliding_window")
    if family in _SWITCHES_WINDOW:
        if on not in (None, False):
            problems.append(
                f"use_sliding_window = {short(on)} (sliding_window = {short(window)}): must be false (only full "
                f"attention is implemented). {OTHER}."
            )
    elif window is not None:
        ignored = "" if on is None else f"; {family} models do not read use_sliding_window = {short(on)}"
        problems.append(
            f"sliding_window = {short(window)}: must be null (only full attention is implemented{ignored}). {OTHER}."
        )
    types = values.get("layer_types")
    if family == "mistral" and "layer_types" in values:
        problems.append(f"layer_types: must be absent (transformers reads such a model as Ministral). {OTHER}.")
    elif types is None:
        return problems
    elif not isinstance(types, list) or len(types) != values.get("num_hidden_layers"):
        problems.append(f"layer_types = {short(types)}: must be a list with an entry for each layer. {FIX}.")
    elif other := sorted({str(kind) for kind in types} - {"full_attention"}):
        problems.append(
            f"layer_types has {', '.join(other)[:60]}: must be full_attention (nothing else is implemented). {OTHER}."
        )
    return problems


def positive_int(values: dict[str, Any], key: str, problems: list[str]) -> int:
    """Return a size; if it is none, or too large to be one, add a problem and return 1."""
    value, largest = values.get(key), _LARGEST.get(key, _LARGEST_OTHER)
    if type(value) is int and 0 < value <= largest:
        return value
    problems.append(f"{key} = {short(value)}: must be a positive integer, at most {largest}. {FIX}.")
    return 1


def positive_float(values: dict[str, Any], key: str, problems: list[str]) -> float:
    """Return a number; if it is none, or not positive and finite, add a problem and return 1."""
    value: Any = values.get(key)
    if type(value) in (int, float) and 0 < value <= sys.float_info.max:
        return float(value)
    problems.append(f"{key} = {short(value)}: must be a positive number. {FIX}.")
    return 1.0


def switch(values: dict[str, Any], key: str, problems: list[str]) -> bool:
    """Return whether a field is true, which it is not where it is missing; if it is no boolean, add a problem."""
    value = values.get(key, False)
    if type(value) is not bool:
        problems.append(f"{key} = {short(value)}: must be true or false. {FIX}.")
    return value is True


def short(value: Any) -> str:
    """Return a value as JSON, cut where it is long: it comes from a file that may hold anything."""
    if isinstance(value, int) and abs(value) > 10**18:
        return "an integer of more than 18 digits"
    try:
        return json.dumps(value)[:60]
    except RecursionError:
        return "a deeply nested value"
