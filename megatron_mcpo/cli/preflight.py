"""Collect everything that can be known to be wrong with a run before torch is imported."""

from pathlib import Path

from megatron_mcpo.config.config import Config, ConfigError
from megatron_mcpo.config.domain_rules import missing_files
from megatron_mcpo.config.environment import vllm_on_cpu
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.hf_files import tokenizer_problems
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import ModelConfig, engine_problems, layout_problems, quantization_problems
from megatron_mcpo.reporting.loggers import check_trackers
from megatron_mcpo.rewards import allowlist, rules
from megatron_mcpo.rollout.server_client import server_problems
from megatron_mcpo.weights.mapping import tensor_problems


def check(config: Config, world_size: int | None) -> tuple[Layout, ModelConfig]:
    """Everything that can be known to be wrong before torch is imported. Raises ConfigError with all problems."""
    problems = allowlist.problems(config) + rules.problems(config) + missing_files(config) + check_trackers(config)
    layout, model = None, None
    try:
        layout = config.layout(world_size)
    except ConfigError as error:
        problems += error.problems
    path = Path(config.model.path)
    try:
        model = from_folder(path)
        problems += tensor_problems(model, path) + tokenizer_problems(path)
    except ConfigError as error:
        problems += error.problems
    if model is not None:
        problems += _head_problems(config, model)
        problems += engine_problems(
            model,
            max_prompt_tokens=config.rollout.max_prompt_tokens,
            max_response_tokens=config.rollout.max_response_tokens,
            on_cpu=vllm_on_cpu(),
        )
        if config.engine.quantization != "none":
            problems += quantization_problems(
                model,
                config.engine.tensor_parallel,
                in_servers=bool(config.engine.servers),
                on_cpu=vllm_on_cpu(),
            )
    if layout is not None and model is not None:
        in_ranks = not config.engine.servers
        problems += layout_problems(model, layout, config.engine.tensor_parallel, engine_in_ranks=in_ranks)
    if model is not None and not problems:
        problems += server_problems(config, model)
    if problems or layout is None or model is None:
        raise ConfigError(problems)
    return layout, model


def _head_problems(config: Config, model: ModelConfig) -> list[str]:
    dim = config.contrastive.dim
    if dim is None or dim <= model.hidden_size:
        return []
    return [
        f"contrastive.dim = {dim}: must be at most the model's hidden size, {model.hidden_size}; lower it, or leave it "
        "out"
    ]
