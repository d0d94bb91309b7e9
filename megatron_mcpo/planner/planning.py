"""A configuration on so many nodes of a kind of GPU: what it needs, whether it fits, how long a step takes."""

from dataclasses import dataclass
from typing import Any

from megatron_mcpo.config.config import Config, ConfigError
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import ModelConfig, engine_problems, layout_problems, quantization_problems
from megatron_mcpo.mcore.head import HeadSpec
from megatron_mcpo.planner.activations import TRANSFORMER_ENGINE
from megatron_mcpo.planner.hardware import GIB, Gpu
from megatron_mcpo.planner.memory import EngineMemory, RankMemory, engine_memory, rank_memory
from megatron_mcpo.planner.ranks import RankSize, built_size, rank_size, total_params
from megatron_mcpo.planner.step_shape import Workload, workload
from megatron_mcpo.planner.timing import step_seconds
from megatron_mcpo.planner.wire import wire_bytes


@dataclass(frozen=True, kw_only=True)
class Plan:
    """ranks: one of every pipeline stage, its neighbours hold as much; wire: bytes by group; seconds: by phase"""

    config: Config
    model: ModelConfig
    gpu: Gpu
    nodes: int
    layout: Layout
    load: Workload
    sizes: list[RankSize]
    engine: EngineMemory
    ranks: list[RankMemory]
    wire: dict[str, float]
    seconds: dict[str, float]

    @property
    def shortages(self) -> list[str]:
        """What does not fit; empty: everything does."""
        found = [
            f"rank {rank.rank} (stage {rank.stage}): {rank.peak / GIB:.1f} GiB in the {rank.worst_phase} phase, "
            f"{rank.peak / GIB - self.gpu.memory_gib:.1f} GiB more than a GPU has"
            for rank in self.ranks
            if rank.peak > self.gpu.memory_bytes
        ]
        if self.engine.sequences == 0:
            found.append(
                f"engine: {self.engine.cache / GIB:.1f} GiB of key-value cache hold {self.engine.cache_tokens} tokens, "
                f"fewer than one rollout of {self.load.length}"
            )
        return found

    @property
    def fits(self) -> bool:
        return not self.shortages

    @property
    def not_modelled(self) -> list[str]:
        """What this configuration asks for and no figure knows of."""
        engine = self.config.engine
        found = {
            f"model.fp8 = {self.config.model.fp8!r} (planned as bf16)": self.config.model.fp8 != "off",
            f"the speed of products with engine.quantization = {engine.quantization!r} (its bytes are in the plan)": (
                engine.quantization != "none"
            ),
            "the comparisons of engine.verify_sync = true": engine.verify_sync,
            f"the servers' GPUs and network (planned as {self.gpu.name}, with nothing else on them)": bool(
                engine.servers
            ),
        }
        return [text for text, asked in found.items() if asked]

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Prompt and response tokens of the step's rollouts; 0 where the step would never end."""
        return self.load.rollouts * self.load.length / self.seconds["step"] / self.layout.world_size

    @property
    def head(self) -> HeadSpec | None:
        return head_of(self.config, self.model)

    def check_built(self) -> None:
        """Build the model of every stage's rank without memory: it must hold the parameters that were planned with."""
        for size in self.sizes:
            built = built_size(self.model, self.layout, self.head, size)
            assert built == size.params, f"rank {size.rank}: {built} parameters built, {size.params} planned"

    def as_json(self) -> dict[str, Any]:
        """The form that other programs read; these names stay."""
        return {
            "fits": self.fits,
            "params_total": total_params(self.model),
            "ranks": [
                {
                    "rank": rank.rank,
                    "stage": rank.stage,
                    "params": rank.params,
                    "bytes": {name: round(value) for name, value in rank.parts.items()},
                    "phase_gib": {name: round(value / GIB, 2) for name, value in rank.phases.items()},
                    "peak_gib": round(rank.peak / GIB, 2),
                    "host_gib": round(rank.host / GIB, 2),
                }
                for rank in self.ranks
            ],
            "wire_bytes": {name: round(value) for name, value in self.wire.items()},
            "step_seconds": {name: _finite(value) for name, value in self.seconds.items()},
            "tokens_per_second_per_gpu": round(self.tokens_per_second_per_gpu, 1),
            "shortages": self.shortages,
            "not_modelled": self.not_modelled,
            "gpu": self.gpu.name,
            "world_size": self.layout.world_size,
        }


def _finite(seconds: float) -> float | None:
    """JSON has no infinity: None for a phase that would never end."""
    return None if seconds == float("inf") else round(seconds, 3)


def head_of(config: Config, model: ModelConfig) -> HeadSpec | None:
    """As mcore/policy.py makes it."""
    return HeadSpec.of(config.contrastive, hidden_size=model.hidden_size, seed=config.run.seed)


def plan(config: Config, model: ModelConfig, gpu: Gpu, nodes: int) -> Plan:
    """Builds nothing (see `Plan.check_built`). Raises ConfigError for what can't be divided or served like this."""
    layout = config.layout(nodes * gpu.per_node)
    engine_ranks, servers = config.engine.tensor_parallel, bool(config.engine.servers)
    problems = layout_problems(model, layout, engine_ranks, engine_in_ranks=not servers) + engine_problems(
        model,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        max_response_tokens=config.rollout.max_response_tokens,
        on_cpu=False,
    )
    if config.engine.quantization != "none":
        problems += quantization_problems(model, engine_ranks, in_servers=servers, on_cpu=False)
    if problems:
        raise ConfigError(problems)
    head, load = head_of(config, model), workload(config, layout)
    sizes = [rank_size(model, layout, head, stage) for stage in range(layout.pipeline)]
    engine = engine_memory(config, model, layout, gpu, load)
    ranks = [
        rank_memory(config, model, layout, size=size, head=head, load=load, engine=engine, kernels=TRANSFORMER_ENGINE)
        for size in sizes
    ]
    return Plan(
        config=config,
        model=model,
        gpu=gpu,
        nodes=nodes,
        layout=layout,
        load=load,
        sizes=sizes,
        engine=engine,
        ranks=ranks,
        wire=wire_bytes(config, model, layout, sizes=sizes, head=head, load=load),
        seconds=step_seconds(config, model, layout, gpu, sizes=sizes, head=head, load=load, engine=engine),
    )
