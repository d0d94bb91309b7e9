"""Describe a model by its sizes, and check whether it can be divided and served as asked. Imports no torch."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_mcpo.config.environment import vllm_on_cpu
from megatron_mcpo.config.layout import Layout, nearly_even

Family = Literal["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral"]

_CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""CPUAttentionBackend.get_supported_head_sizes() of vLLM (0.30.0)."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """The scaling of rotary frequencies; fields that a kind does not have are None.

    low_freq_factor, high_freq_factor: of llama3; original_max_positions: of llama3 and yarn; all others: of yarn
    attention_factor: what yarn multiplies queries and keys by; None: 0.1 ln(factor) + 1
    truncate: whether yarn rounds the range of dimensions between the two kinds of frequencies
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_positions: int | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None
    truncate: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The experts that replace a layer's MLP: `count` MLPs, of which a router chooses `per_token` for every token.

    ffn_hidden_size: of one expert
    normalized: whether the weights of the chosen experts sum to 1; else they are their softmax weights over all experts
    """

    count: int
    per_token: int
    ffn_hidden_size: int
    normalized: bool


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The sizes of a decoder of one of the supported families; `experts` is None for a dense model.

    eos_token_ids: the ends of text that config.json and generation_config.json name; the tokenizer may name another
    """

    family: Family
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    experts: Experts | None
    eos_token_ids: tuple[int, ...]

    @property
    def qkv_rows(self) -> int:
        """Return the number of rows of the fused query-key-value matrix, over all tensor-parallel ranks."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


def layout_problems(
    model: ModelConfig, layout: Layout, engine_tensor_parallel: int, *, engine_in_ranks: bool = True
) -> list[str]:
    """Return why this model cannot be divided like this: value, rule, and the possible values; empty if it can.

    engine_in_ranks: whether the engines run in the ranks of the layout
    A vocabulary that the ranks do not divide is padded to a multiple of them by the trainer.
    """
    problems = [
        f"parallel.tensor = {layout.tensor}: {problem}. Possible: {_listed(_possible_tensor(model))}."
        for problem in _tensor_problems(model, layout.tensor)
    ]
    problems += _layer_problems(model, layout)
    if layout.virtual_pipeline > 1 and layout.pipeline < 2:
        problems.append(
            f"parallel.virtual_pipeline = {layout.virtual_pipeline}: requires parallel.pipeline >= 2 (the "
            "schedule interleaves stages). Set virtual_pipeline to 1 or raise pipeline."
        )
    problems += _expert_problems(model, layout)
    ranks = layout.world_size if engine_in_ranks else 0
    possible_engine = [n for n in _possible_tensor(model, in_engine=True) if ranks % n == 0]
    engine = _tensor_problems(model, engine_tensor_parallel, in_engine=True)
    if ranks % engine_tensor_parallel:
        engine.append(f"must divide the {layout.world_size} ranks of the run")
    problems += [
        f"engine.tensor_parallel = {engine_tensor_parallel}: {problem}. Possible: {_listed(possible_engine)}."
        for problem in engine
    ]
    return problems


def engine_problems(model: ModelConfig, *, max_prompt_tokens: int, max_response_tokens: int, on_cpu: bool) -> list[str]:
    """Return why vLLM would not generate with this model: value, rule and fix; empty if it would.

    With linear scaling vLLM allows more positions than config.json states; this check allows only those stated.
    """
    problems = []
    if on_cpu and model.head_dim not in _CPU_HEAD_DIMS:
        problems.append(
            f"head_dim = {model.head_dim}: must be one of {_listed(_CPU_HEAD_DIMS)} on a CPU (vLLM's attention "
            "has no other kernels there). Choose another model or run on GPUs."
        )
    if max_prompt_tokens + max_response_tokens > model.max_positions:
        problems.append(
            f"rollout.max_prompt_tokens + rollout.max_response_tokens = {max_prompt_tokens} + {max_response_tokens}: "
            f"must be at most the model's max_position_embeddings = {model.max_positions} (the smallest "
            "limit in config.json). Lower one of them or choose another model."
        )
    return problems


def quantization_problems(
    model: ModelConfig, engine_tensor_parallel: int, *, in_servers: bool, on_cpu: bool
) -> list[str]:
    """Return why vLLM's FP8 kernels would not take the matrices of a layer: value, rule and fix; empty if they would.

    in_servers: whether the engines are servers, which on a CPU lack the fixes of vllm_cpu_fixes.cpu_fp8
    The rules are on the matrices of one rank. On a GPU the kernels take inputs in groups of 128, and outputs are held
    to whole blocks here; on a CPU they pack 16 outputs x 32 inputs (0.30.0). vLLM pads experts.
    """
    if in_servers and on_cpu:
        return [
            "engine.quantization = 'fp8_per_block': must be 'none' for a server on a CPU (vLLM lacks the kernels). "
            "Leave engine.servers empty, or set it to 'none'."
        ]
    of_inputs, of_outputs = (32, 16) if on_cpu else (128, 128)
    ranks = engine_tensor_parallel
    kv_heads = max(1, model.num_kv_heads // ranks)
    sizes = {
        "hidden size": (model.hidden_size, of_inputs),
        "query rows": (model.num_heads // ranks * model.head_dim, of_inputs),
        "query, key and value rows": ((model.num_heads // ranks + 2 * kv_heads) * model.head_dim, of_outputs),
    }
    if model.experts is None:
        sizes["MLP units"] = (model.ffn_hidden_size // ranks, of_inputs)
    return [
        f"engine.quantization = 'fp8_per_block': requires a multiple of {multiple} for vLLM's kernels, an engine rank "
        f"has {size} {name} (engine.tensor_parallel = {ranks}). Choose other ranks or another model, or set 'none'."
        for name, (size, multiple) in sizes.items()
        if size % multiple
    ]


def padded_vocabulary(vocab_size: int) -> int:
    """Return the rows of vLLM's embeddings over all ranks of an engine, padded by VocabParallelEmbedding (0.30.0)."""
    return -(-vocab_size // 64) * 64


def fast_dtype() -> Literal["bf16", "fp32"]:
    """Return the meaning of `model.dtype = "auto"`: bf16 on GPUs (see `vllm_on_cpu`) and CPUs with AVX-512, else fp32.

    With AVX2 alone bf16 is multiplied by way of fp32 (distributed/cpu_bf16.py): training is as fast, sampling took 1.6
    times as long. ATEN_CPU_CAPABILITY can restrict torch's kernels to less than the CPU has, so it counts, too.
    """
    if not vllm_on_cpu():
        return "bf16"
    if os.environ.get("ATEN_CPU_CAPABILITY", "").lower() in ("default", "avx2"):
        return "fp32"
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "fp32"
    return "bf16" if re.search(r"\bavx512bw\b", flags) else "fp32"


def _layer_problems(model: ModelConfig, layout: Layout) -> list[str]:
    """Return why the layers can't be divided over the pipeline's chunks."""
    given = list(layout.layers_per_stage)
    if given and (len(given) != layout.chunks or sum(given) != model.num_layers):
        return [
            f"parallel.layers_per_stage = {given}: must be {layout.chunks} numbers (pipeline x virtual_pipeline) that "
            f"add up to the {model.num_layers} layers (they are {len(given)} and add up to {sum(given)}). Correct it."
        ]
    if given or model.num_layers % layout.chunks == 0:
        return []
    possible = [n for n in range(1, model.num_layers + 1) if model.num_layers % n == 0]
    problem = (
        f"parallel.pipeline x virtual_pipeline = {layout.pipeline} x {layout.virtual_pipeline}: must divide the "
        f"{model.num_layers} layers. Possible products: {_listed(possible)}"
    )
    if layout.chunks > model.num_layers:
        return [f"{problem}."]
    return [f"{problem}; or set layers_per_stage = {list(nearly_even(model.num_layers, layout.chunks))}."]


def _expert_problems(model: ModelConfig, layout: Layout) -> list[str]:
    """Check the rules of Megatron-Core (MoELayer, parallel_state) on how experts are divided."""
    if model.experts is None:
        if layout.expert == 1:
            return []
        return [f"parallel.expert = {layout.expert}: must be 1 (the model has no experts). Set it to that."]
    count, ranks = model.experts.count, layout.world_size // layout.pipeline
    problems = []
    if count % layout.expert or ranks % layout.expert:
        possible = [n for n in range(1, count + 1) if count % n == 0 and ranks % n == 0]
        problems.append(
            f"parallel.expert = {layout.expert}: must divide the {count} experts and the {ranks} ranks of a pipeline "
            f"stage. Possible: {_listed(possible)}."
        )
    if layout.tensor > 1 and not layout.sequence:
        problems.append("parallel.sequence = false: must be true for experts on several tensor ranks. Set it to true.")
    return problems


def _tensor_problems(model: ModelConfig, tensor: int, *, in_engine: bool = False) -> list[str]:
    """Check the rules of Megatron-Core (TransformerConfig, SelfAttention) and vLLM; in the engine also vLLM's own."""
    problems = []
    if -(-model.vocab_size // tensor) * (tensor - 1) >= model.vocab_size:
        problems.append(f"must leave every rank a row of the vocabulary's {model.vocab_size}")
    if model.num_heads % tensor:
        problems.append(f"must divide the {model.num_heads} attention heads")
    if model.num_kv_heads % tensor and tensor % model.num_kv_heads:
        problems.append(f"must divide the {model.num_kv_heads} key-value heads or be a multiple of them")
    if model.experts is None and model.ffn_hidden_size % tensor:
        problems.append(f"must divide the MLP's {model.ffn_hidden_size} hidden units")
    if in_engine and model.experts is not None and model.experts.ffn_hidden_size % tensor:
        problems.append(f"must divide the {model.experts.ffn_hidden_size} hidden units of an expert")
    if in_engine and padded_vocabulary(model.vocab_size) % tensor:
        problems.append(f"must divide the vocabulary's {padded_vocabulary(model.vocab_size)} padded rows")
    if not problems and model.qkv_rows % tensor:
        problems.append(f"must divide the {model.qkv_rows} rows of the fused query-key-value matrix")
    return problems


def _possible_tensor(model: ModelConfig, *, in_engine: bool = False) -> list[int]:
    sizes = range(1, model.num_heads + 1)
    return [n for n in sizes if not _tensor_problems(model, n, in_engine=in_engine)]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
