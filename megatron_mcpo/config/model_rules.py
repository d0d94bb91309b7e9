"""Check a configuration against the model that it names: whether the engine can serve it, and the head fits it."""

from megatron_mcpo.config.config import Config
from megatron_mcpo.config.model import ModelConfig, engine_problems, quantization_problems


def problems(config: Config, model: ModelConfig, *, on_cpu: bool) -> list[str]:
    """Return why this configuration can't run with this model, a line (key, value, rule, fix) per problem.

    How the model is divided over ranks is not checked here: see `config.model.layout_problems`.

    Args:
        config: A valid configuration.
        model: The model in `config.model.path`.
        on_cpu: Whether the engine computes on a CPU, where vLLM has fewer kernels.
    """
    in_servers = bool(config.engine.servers)
    found = _head_problems(config, model) + _replay_problems(config, model)
    return found + serving_problems(config, model, in_servers=in_servers, on_cpu=on_cpu)


def serving_problems(config: Config, model: ModelConfig, *, in_servers: bool, on_cpu: bool) -> list[str]:
    """Return why vLLM can't serve this model as the configuration says, a line per problem.

    Args:
        config: A valid configuration.
        model: The model in `config.model.path`.
        in_servers: Whether the engine is a process of its own, not part of the trainer's ranks.
        on_cpu: Whether the engine computes on a CPU, where vLLM has fewer kernels.
    """
    engine = config.engine
    found = engine_problems(
        model,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        max_response_tokens=config.rollout.max_response_tokens,
        on_cpu=on_cpu,
    )
    if engine.quantization != "none":
        found += quantization_problems(model, engine.tensor_parallel, in_servers=in_servers, on_cpu=on_cpu)
    return found


def _head_problems(config: Config, model: ModelConfig) -> list[str]:
    dim = config.contrastive.dim
    if dim is None or dim <= model.hidden_size:
        return []
    return [
        f"contrastive.dim = {dim}: must be at most the model's hidden size, {model.hidden_size}. Lower it, or leave it "
        "out."
    ]


def _replay_problems(config: Config, model: ModelConfig) -> list[str]:
    replay = config.model.router_replay
    if replay == "off" or model.experts is not None:
        return []
    return [f"model.router_replay = {replay!r}: must be 'off' (the model has no experts). Set it to that."]
