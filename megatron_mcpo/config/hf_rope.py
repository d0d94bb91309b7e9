"""Read the rotary embeddings of a Hugging Face config.json: the base, and the scaling of the frequencies."""

import math
from typing import Any

from megatron_mcpo.config.hf_fields import FIX, OTHER, positive_float, positive_int, short
from megatron_mcpo.config.model import Family, RopeScaling

_DEFAULT_THETA: dict[Family, float] = {"mixtral": 1e6}
"""The base where rope_theta is missing; for other families 10,000."""
_LLAMA3_CONSTANTS = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
"""Written into Megatron-Core's RotaryEmbedding (0.19.2); only the factor can be chosen."""
_YARN_FIELDS = {
    *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
    *("attention_factor", "mscale", "mscale_all_dim", "truncate"),
}


def read_rope(values: dict[str, Any], family: Family, problems: list[str]) -> tuple[float, RopeScaling | None]:
    """Return base and scaling from rope_parameters (transformers 5) or rope_theta and rope_scaling (transformers 4).

    A file that states both must state the same: transformers reads rope_scaling alone where it is there.
    """
    stated = {key: values[key] for key in ("rope_scaling", "rope_parameters") if values.get(key) not in (None, {})}
    tables = [_table(key, table, values, problems) for key, table in (stated or {"rope_parameters": {}}).items()]
    rope = tables[0]
    if any(table != rope for table in tables):
        problems.append(
            "rope_scaling and rope_parameters: must state the same (programs differ in which one they read). Remove "
            "the wrong one from config.json."
        )
    known_problems = len(problems)
    theta = positive_float({"rope_theta": _DEFAULT_THETA.get(family, 10000.0)} | rope, "rope_theta", problems)
    if theta <= 1 and len(problems) == known_problems:
        problems.append(f"rope_theta = {theta}: must be above 1 (it is the base of the wave lengths). {FIX}.")
    kind = rope.get("rope_type", "default")
    known = {"rope_theta", "rope_type", "partial_rotary_factor"}
    if rope.get("partial_rotary_factor") not in (None, 1):
        problems.append(f"partial_rotary_factor = {short(rope['partial_rotary_factor'])}: must be 1. {OTHER}.")
    scaling: RopeScaling | None = None
    if kind == "linear":
        known |= {"factor"}
        scaling = RopeScaling(kind="linear", factor=positive_float(rope, "factor", problems))
    elif kind == "llama3":
        known |= {"factor", *_LLAMA3_CONSTANTS}
        scaling = _llama3_scaling(rope, problems)
    elif kind == "yarn":
        known |= _YARN_FIELDS
        scaling = _yarn_scaling(rope, problems)
    elif kind != "default":
        problems.append(f"rope_type = {short(kind)}: must be default, linear, llama3 or yarn. {OTHER}.")
        return theta, None
    for key in sorted(set(rope) - known):
        problems.append(
            f"rope: {key} = {short(rope[key])}: must be absent (rope_type {short(kind)} does not use it). Remove it."
        )
    return theta, scaling


def _table(key: str, table: Any, values: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Return a table with `type` under its newer name and the base in it; add a problem where two values differ."""
    if not isinstance(table, dict):
        problems.append(f"{key} = {short(table)}: must be an object. {FIX}.")
        table = {}
    rope = {name: value for name, value in table.items() if name != "type"}
    others = [("rope_type", "type", table["type"])] if "type" in table else []
    others += [("rope_theta", "the one outside", values["rope_theta"])] if "rope_theta" in values else []
    for name, other, value in others:
        if rope.setdefault(name, value) != value and value is not None:
            problems.append(
                f"{key}: {name} = {short(rope[name])}: must be the same as {other}, which is {short(value)}. Remove "
                "the wrong one from config.json."
            )
    return rope


def _llama3_scaling(rope: dict[str, Any], problems: list[str]) -> RopeScaling:
    for key, needed in _LLAMA3_CONSTANTS.items():
        if rope.get(key) != needed:
            problems.append(
                f"rope: {key} = {short(rope.get(key))}: must be {needed} (Megatron-Core computes llama3 scaling "
                f"with no other value). {OTHER}."
            )
    return RopeScaling(
        kind="llama3",
        factor=positive_float(rope, "factor", problems),
        low_freq_factor=_LLAMA3_CONSTANTS["low_freq_factor"],
        high_freq_factor=_LLAMA3_CONSTANTS["high_freq_factor"],
        original_max_positions=_LLAMA3_CONSTANTS["original_max_position_embeddings"],
    )


def _yarn_scaling(rope: dict[str, Any], problems: list[str]) -> RopeScaling:
    betas = {key: rope[key] for key in ("beta_fast", "beta_slow") if rope.get(key)}  # as transformers: 0 is absent
    truncate = rope.get("truncate", True)
    if type(truncate) is not bool:
        problems.append(f"rope: truncate = {short(truncate)}: must be true or false. {FIX}.")
    factor = positive_float(rope, "factor", problems)
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_positions=positive_int(rope, "original_max_position_embeddings", problems),
        beta_fast=positive_float({"beta_fast": 32.0} | betas, "beta_fast", problems),
        beta_slow=positive_float({"beta_slow": 1.0} | betas, "beta_slow", problems),
        attention_factor=_attention_factor(rope, factor, problems),
        truncate=truncate is True,
    )


def _attention_factor(rope: dict[str, Any], factor: float, problems: list[str]) -> float | None:
    """Return what yarn multiplies queries and keys by; None for 0.1 ln(factor) + 1 (https://arxiv.org/abs/2309.00071).

    As transformers and vLLM: attention_factor itself, or what mscale and mscale_all_dim give, if both are there.
    """
    both = rope.get("mscale") and rope.get("mscale_all_dim")
    if rope.get("attention_factor") is not None:
        found = positive_float(rope, "attention_factor", problems)
    elif both:
        inner, outer = (positive_float(rope, key, problems) for key in ("mscale", "mscale_all_dim"))
        found = _mscale(factor, inner) / _mscale(factor, outer)
    else:
        return None
    if factor <= 1 and found != 1:
        problems.append(
            f"rope: attention_factor = {found!r}: must be 1 with factor = {factor!r} (Megatron-Core uses no other "
            f"where factor is at most 1). {OTHER}."
        )
    return found


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
