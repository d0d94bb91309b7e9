"""Read the sizes of a model from a Hugging Face folder without torch or transformers, so that it fails fast."""

from pathlib import Path
from typing import Any

from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.config.hf_fields import (
    FAMILIES,
    FIX,
    OTHER,
    POSITION_LIMITS,
    REQUIRED_INTS,
    field_problems,
    positive_float,
    positive_int,
    short,
    switch,
    window_problems,
)
from megatron_mcpo.config.hf_files import check_weights, read_json, special_problems
from megatron_mcpo.config.hf_rope import read_rope
from megatron_mcpo.config.model import Experts, Family, ModelConfig, RopeScaling

_DEFAULT_HEAD_DIM: dict[Family, int] = {"qwen3": 128}
"""The value of transformers where head_dim is missing; for other families hidden_size / num_attention_heads."""

_LISTED = 5
"""Names of a folder's contents that a message lists."""


def from_folder(path: Path, *, with_weights: bool = True) -> ModelConfig:
    """Read a Hugging Face folder: config.json, generation_config.json, and whether the weight files can be read.

    with_weights: whether the folder must have weights; those of a sharded checkpoint are checked when they are loaded
    Raises ConfigError with all problems at once: field, value, rule and fix.
    """
    _check_folder(path)
    files: list[str] = []
    values = read_json(path / "config.json", files)
    if values is None:
        raise ConfigError(files)
    asks = path / "generation_config.json"
    generation = read_json(asks, files) if asks.is_file() else {}
    try:
        if with_weights:
            check_weights(path)
    except ConfigError as error:
        files += error.problems
    problems: list[str] = []
    family = _family(values, problems)
    problems += field_problems(values, family)
    problems += window_problems(values, family)
    sizes = {key: positive_int(values, key, problems) for key in REQUIRED_INTS}
    num_heads = sizes["num_attention_heads"]
    num_kv_heads = _kv_heads(values, family, num_heads, problems)
    head_dim = _head_dim(values, family, sizes["hidden_size"], num_heads, problems)
    rope_theta, rope_scaling = read_rope(values, family, problems)
    norm_eps = positive_float(values, "rms_norm_eps", problems)
    experts = _experts(values, family, problems)
    tied_embeddings = switch(values, "tie_word_embeddings", problems)
    max_positions = _max_positions(values, sizes["max_position_embeddings"], rope_scaling, problems)
    eos_token_ids = _eos({asks.name: generation or {}, "config.json": values}, sizes["vocab_size"], problems)
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
        max_positions=max_positions,
        norm_eps=norm_eps,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tied_embeddings=tied_embeddings,
        qkv_bias=family == "qwen2",
        qk_norm=family in ("qwen3", "qwen3_moe"),
        experts=experts,
        eos_token_ids=eos_token_ids,
    )


def _check_folder(path: Path) -> None:
    """Check that there is a folder with a config.json. Raises ConfigError."""
    if not path.is_dir():
        fix = "Give one with config.json and safetensors. Ids of a hub are not taken: download the model first"
        raise ConfigError([f"model.path = {str(path)!r}: must be a folder (no such folder). {fix}."])
    if not (path / "config.json").exists():
        rule = "must hold a model: config.json, a tokenizer and safetensors"
        fix = "Get one with `hf download Qwen/Qwen3-0.6B --local-dir models/qwen3-0.6b` and name that folder"
        raise ConfigError([f"model.path = {str(path)!r}: {rule} (it holds {_contents(path)}). {fix}."])
    if special := special_problems(path):
        raise ConfigError(special)


def _contents(folder: Path) -> str:
    """Return the first names in a folder, in words."""
    names = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in folder.iterdir())
    more = [f"{len(names) - _LISTED} more"] if len(names) > _LISTED else []
    return ", ".join([*names[:_LISTED], *more]) or "nothing"


def _family(values: dict[str, Any], problems: list[str]) -> Family:
    """Return the family; if it is not supported, add a problem and return any, so that the other checks can run."""
    found = values.get("architectures")
    known = [name for name in FAMILIES if found == [name]]
    if not known:
        problems.append(f"architectures = {short(found)}: must be one of {', '.join(FAMILIES)}. {OTHER}.")
        return "llama"
    family = FAMILIES[known[0]]
    model_type = values.get("model_type", family)
    if model_type != family:
        problems.append(f"model_type = {short(model_type)}: must be {family!r} for the architecture {known[0]}. {FIX}.")
    return family


def _experts(values: dict[str, Any], family: Family, problems: list[str]) -> Experts | None:
    """Return the experts in the MLP of every layer; None for a dense family."""
    if family == "qwen3_moe":
        if values.get("decoder_sparse_step", 1) != 1 or values.get("mlp_only_layers") not in (None, []):
            problems.append(
                f"decoder_sparse_step = {short(values.get('decoder_sparse_step'))}, mlp_only_layers = "
                f"{short(values.get('mlp_only_layers'))}: must be 1 and [] (only models with experts in every layer "
                f"are implemented). {OTHER}."
            )
        counts = [key for key in ("num_local_experts", "num_experts") if key in values]  # transformers 5 and 4
        if len(counts) > 1 and values[counts[0]] != values[counts[1]]:
            problems.append(f"num_local_experts and num_experts: must be the same number. {FIX}.")
        count = (counts or ["num_experts"])[0]
        ffn, normalized = "moe_intermediate_size", switch(values, "norm_topk_prob", problems)
    elif family == "mixtral":
        if values.get("router_jitter_noise"):
            problems.append(
                f"router_jitter_noise = {short(values['router_jitter_noise'])}: must be 0 (log-probs of the trainer "
                f"and the engine would differ by the noise). {OTHER}."
            )
        count, ffn, normalized = "num_local_experts", "intermediate_size", True
    else:
        return None
    known = len(problems)
    num_experts, per_token = (positive_int(values, key, problems) for key in (count, "num_experts_per_tok"))
    if per_token > num_experts and len(problems) == known:
        problems.append(f"num_experts_per_tok = {per_token}: must be at most {count} = {num_experts}. {FIX}.")
    if per_token == 1 and normalized and len(problems) == known:
        problems.append(
            f"num_experts_per_tok = 1: must be at least 2 if the weights of the chosen experts are normalized (the "
            f"weight of a single one is always 1, so that its router cannot learn). {OTHER}."
        )
    return Experts(
        count=num_experts,
        per_token=per_token,
        ffn_hidden_size=positive_int(values, ffn, problems),
        normalized=normalized,
    )


def _kv_heads(values: dict[str, Any], family: Family, num_heads: int, problems: list[str]) -> int:
    if values.get("num_key_value_heads") is None and (family == "llama" or "num_key_value_heads" in values):
        return num_heads
    num_kv_heads = positive_int(values, "num_key_value_heads", problems)
    if num_heads % num_kv_heads:
        problems.append(f"num_key_value_heads = {num_kv_heads}: must divide num_attention_heads = {num_heads}. {FIX}.")
    return num_kv_heads


def _head_dim(values: dict[str, Any], family: Family, hidden_size: int, num_heads: int, problems: list[str]) -> int:
    if values.get("head_dim") is not None:
        head_dim = positive_int(values, "head_dim", problems)
    elif "head_dim" not in values and family in _DEFAULT_HEAD_DIM:
        return _DEFAULT_HEAD_DIM[family]
    elif hidden_size % num_heads:
        problems.append(f"hidden_size = {hidden_size}: must be a multiple of num_attention_heads = {num_heads}. {FIX}.")
        return 2
    else:
        head_dim = hidden_size // num_heads
    if head_dim % 2:
        problems.append(f"head_dim = {head_dim}: must be even (rotary embeddings turn pairs). {OTHER}.")
    return head_dim


def _max_positions(values: dict[str, Any], max_positions: int, scaling: RopeScaling | None, problems: list[str]) -> int:
    """Return the fewest positions that a field states, as vLLM, or that its table of yarn's frequencies has."""
    stated = [key for key in POSITION_LIMITS if values.get(key) is not None]
    limits = [max_positions, *(positive_int(values, key, problems) for key in stated)]
    if scaling is not None and scaling.kind == "yarn" and scaling.original_max_positions is not None:
        limits.append(max(1, int(min(max_positions, scaling.original_max_positions * scaling.factor))))
    return min(limits)


def _eos(files: dict[str, dict[str, Any]], vocab_size: int, problems: list[str]) -> tuple[int, ...]:
    """Return every token that one of the files names as an end of text; null and [] name none.

    files: the contents of each file, by its name
    """
    found: dict[int, None] = {}
    for name, values in files.items():
        stated = values.get("eos_token_id")
        ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
        if all(type(i) is int and 0 <= i < vocab_size for i in ids):
            found |= dict.fromkeys(ids)
            continue
        problems.append(
            f"{name}: eos_token_id = {short(stated)}: must be token ids below vocab_size = {vocab_size} (others are "
            "never sampled, so that responses would not end). Correct it."
        )
    return tuple(found)
