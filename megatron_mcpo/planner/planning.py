"""Plan a configuration on a number of nodes of a kind of GPU: what it needs, whether it fits, how long a step takes."""

from dataclasses import dataclass
from math import ceil
from typing import Any

from megatron_mcpo.config import model_rules
from megatron_mcpo.config.config import Config, ConfigError
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import ModelConfig, layout_problems
from megatron_mcpo.mcore.head import HeadSpec
from megatron_mcpo.planner.activations import TRANSFORMER_ENGINE
from megatron_mcpo.planner.hardware import GIB, Gpu
from megatron_mcpo.planner.lengths import Lengths
from megatron_mcpo.planner.memory import EngineMemory, RankMemory, engine_memory, rank_memory
from megatron_mcpo.planner.ranks import RankSize, built_size, rank_size
from megatron_mcpo.planner.step_shape import StepShape, step_shape
from megatron_mcpo.planner.timing import step_seconds
from megatron_mcpo.planner.wire import wire_bytes
from megatron_mcpo.weights.mapping import total_params


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """The predicted needs of a run: memory per rank, bytes on the wire, seconds per phase of a step.

    nodes: of the trainer and of the engine servers, if there are any
    lengths: of responses; shape: of a step in which all have the greatest length, expected: their mean length
    ranks: one of every pipeline stage, the others of a stage hold as much; wire: bytes by group; seconds: by phase
    """

    config: Config
    model: ModelConfig
    gpu: Gpu
    nodes: int
    layout: Layout
    lengths: Lengths
    shape: StepShape
    expected: StepShape
    sizes: list[RankSize]
    engine: EngineMemory
    ranks: list[RankMemory]
    wire: dict[str, float]
    seconds: dict[str, float]

    @property
    def shortages(self) -> list[str]:
        """Return what does not fit, one sentence each; empty if everything fits."""
        found = [
            f"rank {rank.rank} (stage {rank.stage}): {rank.peak / GIB:.1f} GiB in the {rank.worst_phase} phase, "
            f"{rank.peak / GIB - self.gpu.memory_gib:.1f} GiB more than a GPU has"
            for rank in self.ranks
            if rank.peak > self.gpu.memory_bytes
        ]
        if self.engine.cache_tokens < self.shape.length:
            found.append(
                f"engine: {self.engine.cache / GIB:.1f} GiB of key-value cache hold {self.engine.cache_tokens} tokens, "
                f"fewer than one rollout of {self.shape.length}"
            )
        return found

    @property
    def fits(self) -> bool:
        return not self.shortages

    @property
    def peak(self) -> float:
        """Return the number of bytes that the fullest rank holds in its worst phase."""
        return max(rank.peak for rank in self.ranks)

    @property
    def free_share(self) -> float:
        """Return the share of a GPU's memory that the fullest rank leaves free in its worst phase."""
        return 1 - self.peak / self.gpu.memory_bytes

    @property
    def num_gpus(self) -> int:
        """Return the number of GPUs of trainer and engine servers together."""
        return self.layout.world_size + self.config.server_gpus

    @property
    def gpu_hours(self) -> float:
        """Return the GPU-hours of one step."""
        return self.seconds["step"] * self.num_gpus / 3600

    @property
    def busy(self) -> dict[str, float]:
        """Return the shares of a step in which trainer and engines work; a weight sync occupies both."""
        seconds = self.seconds
        learning = seconds["score"] + seconds["update"] + seconds["sync"]
        work = {"trainer": learning, "engines": seconds["rollout"] + seconds["sync"]}
        return {name: part / seconds["step"] if seconds["step"] < float("inf") else 0.0 for name, part in work.items()}

    @property
    def not_modelled(self) -> list[str]:
        """Return the settings of this configuration that the figures leave out."""
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
        """Return the prompt and response tokens that a GPU handles per second; 0 if the step would never end."""
        return self.shape.rollouts * self.expected.length / self.seconds["step"] / self.num_gpus

    @property
    def head(self) -> HeadSpec | None:
        return head_of(self.config, self.model)

    def check_built(self) -> None:
        """Build the model of every stage's rank without memory, and assert that it holds the planned parameters."""
        for size in self.sizes:
            built = built_size(self.model, self.layout, self.head, size)
            assert built == size.params, f"rank {size.rank}: {built} parameters built, {size.params} planned"

    def as_json(self) -> dict[str, Any]:
        """Return the plan as values for a JSON object. Other programs read it: these names stay."""
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
            "busy": {name: round(share, 3) for name, share in self.busy.items()},
            "tokens_per_second_per_gpu": round(self.tokens_per_second_per_gpu, 1),
            "shortages": self.shortages,
            "not_modelled": self.not_modelled,
            "mean_response": self.expected.response,
            "gpu": self.gpu.name,
            "nodes": self.nodes,
            "world_size": self.layout.world_size,
            "server_gpus": self.config.server_gpus,
        }


def _finite(seconds: float) -> float | None:
    """Return None for a phase that would never end, because JSON has no infinity."""
    return None if seconds == float("inf") else round(seconds, 3)


def head_of(config: Config, model: ModelConfig) -> HeadSpec | None:
    """Return the contrastive head as mcore/policy.py makes it; None without a contrastive term."""
    return HeadSpec.of(config.contrastive, hidden_size=model.hidden_size, seed=config.run.seed)


def trainer_gpus(config: Config, gpu: Gpu, nodes: int) -> int:
    """Return how many GPUs the engine servers leave to the trainer. Raises ConfigError where there are none."""
    left = nodes * gpu.per_node - config.server_gpus
    if left < 1:
        raise ConfigError(
            [
                f"engine.servers: {len(config.engine.servers)} servers of {config.engine.tensor_parallel} GPU(s) must "
                f"leave some of {nodes} node(s) of {gpu.per_node} to the trainer. List fewer, or use more nodes."
            ]
        )
    return left


def plan(config: Config, model: ModelConfig, gpu: Gpu, nodes: int, *, mean_response: int | None = None) -> MemoryPlan:
    """Plan a configuration without building anything (see `MemoryPlan.check_built`).

    Args:
        config: What is run.
        model: The model.
        gpu: The kind of GPU.
        nodes: Of the trainer and of the engine servers, if there are any.
        mean_response: Tokens of a response on average (lengths.py); None: all have the greatest length.

    Raises:
        ConfigError: The model can't be divided or served like this, or responses can't have this mean.
    """
    limit = config.rollout.max_response_tokens
    lengths = Lengths(limit, limit if mean_response is None else mean_response)
    layout = config.layout(trainer_gpus(config, gpu, nodes))
    problems = model_rules.problems(config, model, on_cpu=False) + layout_problems(
        model, layout, config.engine.tensor_parallel, engine_in_ranks=not config.engine.servers
    )
    if problems:
        raise ConfigError(problems)
    head, shape = head_of(config, model), step_shape(config, layout, limit)
    expected = step_shape(config, layout, ceil(lengths.mean))
    sizes = [rank_size(model, layout, head, stage) for stage in range(layout.pipeline)]
    engine = engine_memory(config, model, layout, gpu, expected)
    ranks = [
        rank_memory(config, model, layout, size=size, head=head, shape=shape, engine=engine, kernels=TRANSFORMER_ENGINE)
        for size in sizes
    ]
    return MemoryPlan(
        config=config,
        model=model,
        gpu=gpu,
        nodes=nodes,
        layout=layout,
        lengths=lengths,
        shape=shape,
        expected=expected,
        sizes=sizes,
        engine=engine,
        ranks=ranks,
        wire=wire_bytes(config, model, layout, sizes=sizes, head=head, shape=expected),
        seconds=step_seconds(
            config, model, layout, gpu, sizes=sizes, head=head, shape=expected, lengths=lengths, engine=engine
        ),
    )
