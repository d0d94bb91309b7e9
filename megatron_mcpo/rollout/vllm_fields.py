"""Check `engine.options` against the options of the installed vLLM. Imports no torch and no vllm, which takes seconds.

Names and types are read from the source of vLLM's EngineArgs, a data class. Where its annotation is more than plain
types vLLM itself checks the value, when the engine is built.
"""

import ast
import difflib
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_mcpo.config.environment import installed_vllm
from megatron_mcpo.config.explain import shown

_PLAIN: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "list": (list,),
    "dict": (dict,),
    "None": (),
}
_MODEL = "the engine must sample from the trainer's model"
_PLAIN_SAMPLES = "tokens are sampled from the plain model, with the log-probs of that"
_PROCESSES = "the trainer, or mcpo serve, arranges the engine's processes"
_TOKENS = "engines get and give tokens, not texts"
_WEIGHTS = "the engine's weights come from the trainer"

REFUSED: Mapping[str, str] = {
    "model": "set model.path",
    "dtype": "set model.dtype",
    "max_model_len": "set rollout.max_prompt_tokens and rollout.max_response_tokens",
    "max_num_seqs": "set engine.max_concurrent",
    "tensor_parallel_size": "set engine.tensor_parallel",
    "gpu_memory_utilization": "set engine.gpu_memory_utilization",
    "kv_cache_memory_bytes": "set engine.kv_cache_gib",
    "quantization": "set engine.quantization",
    "quantization_config": "set engine.quantization",
    "enable_return_routed_experts": "set model.router_replay",
    **dict.fromkeys(("hf_overrides", "trust_remote_code", "revision", "code_revision", "hf_config_path"), _MODEL),
    **dict.fromkeys(("model_impl", "model_class_overrides", "model_weights", "enable_lora", "convert"), _MODEL),
    **dict.fromkeys(("generation_config", "override_generation_config", "logits_processors"), _PLAIN_SAMPLES),
    **dict.fromkeys(("logprobs_mode", "seed", "runner", "watermark_config", "diffusion_config"), _PLAIN_SAMPLES),
    **dict.fromkeys(("load_format", "weight_transfer_config", "cpu_offload_gb", "offload_backend"), _WEIGHTS),
    **dict.fromkeys(("skip_tokenizer_init", "tokenizer", "tokenizer_mode", "tokenizer_revision"), _TOKENS),
    **dict.fromkeys(("distributed_executor_backend", "pipeline_parallel_size", "data_parallel_size"), _PROCESSES),
    **dict.fromkeys(("worker_cls", "worker_extension_cls", "enable_sleep_mode", "additional_config"), _PROCESSES),
    **dict.fromkeys(("nnodes", "node_rank", "master_addr", "master_port", "device_ids"), _PROCESSES),
    **dict.fromkeys(("prefill_context_parallel_size", "decode_context_parallel_size"), _PROCESSES),
}
"""Options that are not passed on, and why, or which key to set instead."""
NOT_ON_CPU: Mapping[str, str] = {
    "enable_expert_parallel": "vLLM 0.30's kernel for experts ends the process there",
    "speculative_config": "vLLM 0.30's kernel for it does not start there",
}
"""Options that were tried on a CPU and failed, and how."""


def option_problems(options: Mapping[str, Any], *, on_cpu: bool) -> list[str]:
    """Return why these options can't be passed on to the installed vLLM, a line per option.

    on_cpu: whether the engine computes on a CPU
    Without vLLM, as where only servers on other hosts have it, nothing is known of its names; they check them.
    """
    problems = [
        f"engine.options.{name}: must be left out ({REFUSED[name]}). Remove it." for name in options if name in REFUSED
    ]
    if on_cpu:
        problems += [
            f"engine.options.{name}: must be left out on a CPU ({NOT_ON_CPU[name]}). Remove it."
            for name in options
            if name in NOT_ON_CPU
        ]
    fields = installed_fields() if options else {}
    if not fields:
        return problems
    said = f"EngineArgs of {installed_vllm()}"
    for name, value in options.items():
        if name in REFUSED:
            continue
        if name not in fields:
            meant = difflib.get_close_matches(name, [known for known in fields if known not in REFUSED], n=1)
            hint = f"Did you mean {meant[0]}?" if meant else "Correct or remove it."
            problems.append(f"engine.options.{name}: must be a field of {said}. {hint}")
        elif not _fits(value, fields[name]):
            annotation = ast.unparse(fields[name])
            problems.append(f"engine.options.{name} = {shown(value)}: must be {annotation} ({said}). Correct it.")
    return problems


def installed_fields() -> dict[str, ast.expr]:
    """Return the annotation of every field of the installed vLLM's EngineArgs; empty without vLLM."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return {}
    source = (Path(spec.origin).parent / "engine" / "arg_utils.py").read_text(encoding="utf-8")
    owner = next(
        node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "EngineArgs"
    )
    return {
        node.target.id: node.annotation
        for node in owner.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not node.target.id.startswith("_")
    }


def _fits(value: Any, annotation: ast.expr) -> bool:
    """Return whether a value has one of the types of an annotation; True where that has others than plain ones."""
    names = list(_union(annotation))
    if any(name not in _PLAIN for name in names):
        return True
    allowed = {each for name in names for each in _PLAIN[name]}
    return type(value) in allowed


def _union(annotation: ast.expr) -> Iterator[str]:
    """Yield the parts of a union, without what is in brackets: `str` and `list` of `str | list[str]`."""
    if isinstance(annotation, ast.BinOp):
        yield from _union(annotation.left)
        yield from _union(annotation.right)
    elif isinstance(annotation, ast.Subscript):
        yield from _union(annotation.value)
    else:
        yield ast.unparse(annotation)
