"""Translate our settings to options of vLLM, for the trainer's process and for a server. Imports no torch, no vllm."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from megatron_mcpo.rollout.engine import SamplingRequest

IN_PROCESS = "megatron_mcpo"
PROCESS_GROUP = "megatron_mcpo_group"
"""The names under which vllm_transfer registers our transports of weights."""

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1"}
LOGPROBS_MODE = "processed_logprobs"
OPTIONS = "mcpo_options"
"""Where a server of `mcpo serve` keeps the run's own options of vLLM."""
_CPU_BATCH_TOKENS = 4096
_ROUTERS = "re:.*mlp.gate$"
"""Modules that stay unquantised: vLLM has no quantised kernel for matrices as small as a router."""


def engine_options(
    model_path: Path,
    *,
    dtype: Literal["bf16", "fp32"],
    quantization: Literal["none", "fp8_per_block"],
    tensor_parallel: int,
    max_model_len: int,
    max_concurrent: int,
    kv_cache_gib: float,
    gpu_memory_utilization: float,
    load_weights: bool,
    routed_experts: bool,
    further: Mapping[str, Any],
    transport: str,
    on_cpu: bool,
) -> dict[str, Any]:
    """Return fields of vLLM's EngineArgs. For the arguments see vllm_engine.VllmEngine.

    further: fields with their values, which replace ours (config.engine.options)
    """
    options: dict[str, Any] = dict(
        model=str(model_path),
        dtype=DTYPES[dtype],
        tensor_parallel_size=tensor_parallel,
        max_model_len=max_model_len,
        max_num_seqs=max_concurrent,
        gpu_memory_utilization=gpu_memory_utilization,
        load_format="auto" if load_weights else "dummy",
        seed=0,
        skip_tokenizer_init=True,
        generation_config="vllm",
        logprobs_mode=LOGPROBS_MODE,
        enable_prefix_caching=True,
        disable_log_stats=True,
        use_tqdm_on_load=False,
        weight_transfer_config={"backend": transport},
    )
    if routed_experts:
        options |= dict(enable_return_routed_experts=True)
    if quantization != "none":
        options |= dict(quantization=quantization, quantization_config={"ignore": [_ROUTERS]})
    if on_cpu:
        # Compiling takes a minute and gains little on a CPU. For a prompt that is prefilled in parts vLLM rewinds the
        # request's generator, which a CPU's generator doesn't support: the step would fail.
        options |= dict(
            enforce_eager=True,
            kv_cache_memory_bytes=int(kv_cache_gib * 2**30),
            enable_chunked_prefill=False,
            max_num_batched_tokens=max(_CPU_BATCH_TOKENS, max_model_len),
            # The smallest size: with the usual 128 a shorter common prefix of prompts is never shared.
            block_size=32,
        )
    return options | dict(further)


def sampling_options(request: "SamplingRequest") -> dict[str, Any]:
    """Return fields of vLLM's SamplingParams. The samples of a greedy request are copies of one."""
    return dict(
        n=request.num_samples if request.temperature > 0 else 1,
        seed=request.seed,
        temperature=request.temperature,
        max_tokens=request.max_tokens,
        stop_token_ids=list(request.stop_token_ids),
        ignore_eos=True,
        logprobs=0,
        detokenize=False,
    )


def as_flags(options: Mapping[str, Any]) -> list[str]:
    """Write options as flags of vLLM's server."""
    flags = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", json.dumps(value) if isinstance(value, dict | list) else str(value)]
    return flags
