"""Other configurations of the same run: the cheapest that makes it fit, and the fastest of all that fit."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from megatron_mcpo.config.config import Config, ConfigError
from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.config.schema import Recompute
from megatron_mcpo.planner.hardware import Gpu
from megatron_mcpo.planner.planning import Plan, plan

Change = dict[str, Any]
"""Dotted keys with their new values, as on the command line."""


def changed(config: Config, change: Change) -> Config:
    """The configuration with some keys replaced."""
    for key, value in change.items():
        section, name = key.split(".")
        part = getattr(config, section).model_copy(update={name: value})
        config = config.model_copy(update={section: part})
    return config


def remedies(config: Config, model: ModelConfig, gpu: Gpu, nodes: int) -> list[tuple[Change, Plan]]:
    """Single changes of a plan that does not fit which make it fit, fastest first; then, failing these, more nodes.

    What is changed: recompute, micro-batches, what is offloaded to host memory, the engine's share of a GPU and its
    ranks, tensor, pipeline and expert parallelism of the trainer.
    """
    p, e, load = config.parallel, config.engine, config.rollout
    length = load.max_prompt_tokens + load.max_response_tokens
    align = config.layout(nodes * gpu.per_node).sequence_alignment
    smallest = -(-length // align) * align
    changes: list[Change] = [
        {"model.recompute": "selective"},
        {"model.recompute": "full"},
        {"batch.micro_batch_tokens": smallest},
        {"optimizer.offload": True},
        {"model.offload_reference": True},
        {"optimizer.offload": True, "model.offload_reference": True},
        *({"engine.gpu_memory_utilization": share / 100} for share in range(90, 10, -5)),
        *({"parallel.tensor": p.tensor * factor} for factor in (2, 4, 8) if p.tensor * factor <= gpu.per_node),
        *({"parallel.pipeline": p.pipeline * factor} for factor in (2, 4, 8)),
        *(
            {"engine.tensor_parallel": e.tensor_parallel * n}
            for n in (2, 4, 8)
            if e.tensor_parallel * n <= gpu.per_node
        ),
    ]
    if model.experts:
        changes += [{"parallel.expert": p.expert * factor} for factor in (2, 4, 8, 16)]
    # Memory is short in a rollout or in training, seldom in both: a change of the engine's share goes with each.
    shares = [change for change in changes if "engine.gpu_memory_utilization" in change]
    pairs = [one | two for one in changes if one not in shares for two in shares]
    for candidates in (changes, pairs):
        found = sorted(_fitting(config, model, gpu, nodes, candidates), key=_speed)
        if found:
            return found
    return _more_nodes(config, model, gpu, nodes)


def _more_nodes(config: Config, model: ModelConfig, gpu: Gpu, nodes: int) -> list[tuple[Change, Plan]]:
    """The fewest nodes on which some layout fits, the layout as it is before all others."""
    for factor in (2, 4, 8, 16):
        num_ranks = nodes * factor * gpu.per_node
        p = config.parallel
        as_it_is = {"parallel.data": _data(config, num_ranks, p.tensor * p.pipeline * p.context)}
        for changes in ([as_it_is], _layouts(config, model, gpu, num_ranks, _ROOMY)):
            found = sorted(_fitting(config, model, gpu, nodes * factor, changes), key=_speed)
            if found:
                return [(_news(config, change), each) for change, each in found]
    return []


def fastest(config: Config, model: ModelConfig, gpu: Gpu, nodes: int) -> list[tuple[Change, Plan]]:
    """Layouts that fit, by predicted seconds a step; the batch, the lengths and the objective stay."""
    candidates = _layouts(config, model, gpu, nodes * gpu.per_node, _ALL)
    return sorted(_fitting(config, model, gpu, nodes, candidates), key=_speed)


@dataclass(frozen=True, kw_only=True)
class _Choices:
    """What is tried with every division of the ranks. micro_batches: rollouts in one; shares: the engine's, of a GPU"""

    virtual: tuple[int, ...]
    experts: tuple[int, ...]
    recompute: tuple[Recompute, ...]
    micro_batches: tuple[int, ...]
    shares: tuple[float, ...]


_ALL = _Choices(
    virtual=(1, 2),
    experts=(1, 2, 4, 8, 16),
    recompute=("none", "selective", "full"),
    micro_batches=(1, 2, 4),
    shares=(0.35, 0.5, 0.65),
)
_ROOMY = _Choices(
    virtual=(1,),
    experts=(1, 2, 4, 8, 16, 32, 64, 128),
    recompute=("none", "full"),
    micro_batches=(1,),
    shares=(0.35, 0.6, 0.85),
)
"""To find out whether anything fits, without most of what only makes it faster: seconds."""


def _layouts(config: Config, model: ModelConfig, gpu: Gpu, num_ranks: int, choices: _Choices) -> list[Change]:
    load = config.rollout
    length = load.max_prompt_tokens + load.max_response_tokens
    sizes = [n for n in (1, 2, 4, 8) if n <= gpu.per_node]
    experts = choices.experts if model.experts else (1,)
    stages = [n for n in range(1, num_ranks + 1) if model.num_layers % n == 0]
    return [
        {
            "parallel.tensor": tensor,
            "parallel.pipeline": pipeline,
            "parallel.virtual_pipeline": virtual,
            "parallel.context": context,
            "parallel.expert": expert,
            "parallel.sequence": True,
            "parallel.data": _data(config, num_ranks, tensor * pipeline * context),
            "model.recompute": recompute,
            "batch.micro_batch_tokens": times * -(-length // (2 * tensor * context)) * 2 * tensor * context,
            "engine.tensor_parallel": engine,
            "engine.gpu_memory_utilization": share,
        }
        for tensor, pipeline, virtual, context, expert, recompute, times, engine, share in product(
            sizes,
            stages,
            choices.virtual,
            (1, 2),
            experts,
            choices.recompute,
            choices.micro_batches,
            sizes,
            choices.shares,
        )
        if (virtual == 1 or pipeline > 1) and num_ranks % (tensor * pipeline * context) == 0
    ]


def _data(config: Config, num_ranks: int, replica: int) -> int | None:
    """As many replicas as there are; a number that is set gets another, since the command line can't take it back."""
    return None if config.parallel.data is None else num_ranks // replica


def _news(config: Config, change: Change) -> Change:
    """Of a change, what is not so already."""
    sections = {key: key.split(".") for key in change}
    return {
        key: change[key]
        for key, (part, name) in sections.items()
        if getattr(getattr(config, part), name) != change[key]
    }


def _speed(each: tuple[Change, Plan]) -> tuple[float, ...]:
    """Of layouts that are equally fast, the one that is divided least comes first."""
    layout = each[1].layout
    return round(each[1].seconds["step"], 1), layout.context, layout.virtual_pipeline, layout.pipeline, layout.tensor


def _fitting(
    config: Config, model: ModelConfig, gpu: Gpu, nodes: int, changes: list[Change]
) -> Iterator[tuple[Change, Plan]]:
    for change in changes:
        try:
            found = plan(changed(config, change), model, gpu, nodes)
        except ConfigError:
            continue
        if found.fits:
            yield change, found
