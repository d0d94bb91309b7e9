"""Check rules of the engine's keys, also with other sections; return one line per problem. Imports no torch.

`config` is a megatron_mcpo.config.config.Config, which imports this module: hence the protocol.
"""

from typing import Protocol

from megatron_mcpo.config.engine_schema import EngineConfig
from megatron_mcpo.config.schema import AlgorithmConfig, ModelSection

_LAST_PORT = 2**16 - 1


class _Sections(Protocol):
    @property
    def engine(self) -> EngineConfig: ...
    @property
    def model(self) -> ModelSection: ...
    @property
    def algorithm(self) -> AlgorithmConfig: ...


def servers(config: _Sections) -> list[str]:
    """Return what is wrong with the addresses of servers."""
    urls = config.engine.servers
    twice = sorted({url for url in urls if urls.count(url) > 1})
    problems = [f"engine.servers: {url}: must be listed once (it is there twice). Remove one." for url in twice]
    return problems + [
        f"engine.servers: {url}: the port must be at most {_LAST_PORT}. Correct it."
        for url in urls
        if int(url.rpartition(":")[2]) > _LAST_PORT
    ]


def staleness(config: _Sections) -> list[str]:
    """Return why rollouts can't be sampled ahead like this."""
    engine = config.engine
    problems = []
    if engine.staleness > 0 and not engine.servers:
        problems.append(
            f"engine.staleness = {engine.staleness}: requires engine.servers (engines inside the trainer's ranks can't "
            "sample while the trainer learns). Start servers with mcpo serve and list them, or set it to 0."
        )
    if engine.oversample is not None and engine.oversample > engine.staleness:
        problems.append(
            f"engine.oversample = {engine.oversample:g}: must be at most engine.staleness = {engine.staleness} "
            "(prompts under way for later steps get older by a version a step). Lower it, or raise engine.staleness."
        )
    return problems


def quantized_dtype(config: _Sections) -> list[str]:
    """Return why the engine can't be quantised in this data type."""
    if config.engine.quantization == "none" or config.model.dtype == "bf16":
        return []
    return [
        f"model.dtype = {config.model.dtype!r}: must be 'bf16' (vLLM computes in it with engine.quantization = "
        f"{config.engine.quantization!r}). Set it, or the quantization to 'none'."
    ]


def quantized_importance(config: _Sections) -> list[str]:
    """Return why a quantised engine needs importance weights."""
    if config.engine.quantization == "none" or config.algorithm.importance != "off":
        return []
    return [
        "algorithm.importance = 'off': must be 'truncate', 'mask' or 'reject' (a quantized engine samples from another "
        "distribution than the trained one, which the importance weight corrects). Set it to one of them, or "
        "engine.quantization to 'none'."
    ]
