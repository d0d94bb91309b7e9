"""Search other configurations of the same run: changes that make it fit, and the fastest layouts that fit.

The order of both: predicted seconds per step, where a layout that leaves less than `HEADROOM` of a GPU's memory free
counts as `TIGHT_COST` slower. The plan's allowances are estimates, so that a layout which fills the GPU may not fit in
truth; a few per cent of time are a low price for room. Layouts without headroom stay in the list.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any

from megatron_mcpo.config.config import Config, ConfigError
from megatron_mcpo.config.layout import nearly_even
from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.config.schema import Recompute
from megatron_mcpo.planner.hardware import Gpu
from megatron_mcpo.planner.planning import MemoryPlan, plan, trainer_gpus

Change = dict[str, Any]
"""Dotted keys with their new values, as on the command line."""

HEADROOM = 0.05
"""The share of a GPU's memory that a layout should leave free at its peak."""
TIGHT_COST = 0.03
"""How much slower a layout without that headroom is taken to be when layouts are ordered."""
MOST_REMEDIES = 3
_OFFLOADED: Change = {"optimizer.offload": True, "model.offload_reference": True}
_SERVER_SHARE = 0.9
"""engine.gpu_memory_utilization of a server, which has its GPUs to itself."""


def changed(config: Config, change: Change) -> Config:
    """Return the configuration with some keys replaced."""
    for key, value in change.items():
        section, name = key.split(".")
        part = getattr(config, section).model_copy(update={name: value})
        config = config.model_copy(update={section: part})
    return config


def remedies(
    config: Config, model: ModelConfig, gpu: Gpu, nodes: int, mean_response: int | None = None
) -> list[tuple[Change, MemoryPlan]]:
    """Return up to `MOST_REMEDIES` changes that make a plan fit which does not, each of other keys.

    Single changes come first, then pairs, then more nodes; within each of these the order of this module. A change is
    left out if a part of it suffices. What is changed: recompute, micro-batches, what is offloaded to host memory, the
    engine's share of a GPU and its ranks, tensor, pipeline and expert parallelism of the trainer.
    """
    singles = _single_changes(config, model, gpu, nodes)
    # Memory is short in the rollout or in training, seldom in both: a change of the engine's share goes with each.
    shares = [change for change in singles if "engine.gpu_memory_utilization" in change]
    pairs = [one | two for one in singles if one not in shares for two in shares]
    found: list[tuple[Change, MemoryPlan]] = []
    for candidates in (singles, pairs):
        for change, fitting in _fitting(config, model, gpu, nodes, candidates, mean_response):
            if not any(other.keys() <= change.keys() for other, _ in found):
                found.append((change, fitting))
        if len(found) >= MOST_REMEDIES:
            return found[:MOST_REMEDIES]
    return found + more_nodes(config, model, gpu, nodes, mean_response)


def _single_changes(config: Config, model: ModelConfig, gpu: Gpu, nodes: int) -> list[Change]:
    parallel, engine, rollout = config.parallel, config.engine, config.rollout
    length = rollout.max_prompt_tokens + rollout.max_response_tokens
    align = config.layout(trainer_gpus(config, gpu, nodes)).sequence_alignment
    smallest = -(-length // align) * align
    tensor, engine_ranks = parallel.tensor, engine.tensor_parallel
    experts = (2, 4, 8, 16) if model.experts else ()
    return [
        {"model.recompute": "selective"},
        {"model.recompute": "full"},
        {"batch.micro_batch_tokens": smallest},
        {"optimizer.offload": True},
        {"model.offload_reference": True},
        _OFFLOADED,
        *({"engine.gpu_memory_utilization": share / 100} for share in range(90, 10, -5)),
        *({"parallel.tensor": tensor * factor} for factor in (2, 4, 8) if tensor * factor <= gpu.per_node),
        *({"parallel.pipeline": parallel.pipeline * factor} for factor in (2, 4, 8)),
        *({"engine.tensor_parallel": engine_ranks * n} for n in (2, 4, 8) if engine_ranks * n <= gpu.per_node),
        *({"parallel.expert": parallel.expert * factor} for factor in experts),
    ]


def more_nodes(
    config: Config, model: ModelConfig, gpu: Gpu, nodes: int, mean_response: int | None = None
) -> list[tuple[Change, MemoryPlan]]:
    """Return the best layout on the fewest nodes on which one fits, the present layout before all others."""
    for factor in (2, 4, 8, 16):
        num_gpus = nodes * factor * gpu.per_node
        p = config.parallel
        as_it_is = {"parallel.data": _data(config, num_gpus - config.server_gpus, p.tensor * p.pipeline * p.context)}
        for changes in ([as_it_is], _layouts(config, model, gpu, num_gpus, _ROOMY)):
            found = _fitting(config, model, gpu, nodes * factor, changes, mean_response)
            if found:
                change, fitting = found[0]
                return [(_differences(config, change), fitting)]
    return []


def fastest(
    config: Config, model: ModelConfig, gpu: Gpu, nodes: int, mean_response: int | None = None
) -> list[tuple[Change, MemoryPlan]]:
    """Return the layouts that fit in the order of this module; the batch, the lengths and the objective stay."""
    layouts = _layouts(config, model, gpu, nodes * gpu.per_node, _ALL)
    return _fitting(config, model, gpu, nodes, layouts, mean_response)


@dataclass(frozen=True, kw_only=True)
class _Choices:
    """The settings that are tried with every division of the ranks.

    micro_batches: rollouts in one
    shares: the engine's share of a GPU, with everything on the device
    offloading: the same with the optimizer and the reference model in host memory, which costs little time and is of
        use where the engine gets the room
    """

    virtual: tuple[int, ...]
    experts: tuple[int, ...]
    recompute: tuple[Recompute, ...]
    micro_batches: tuple[int, ...]
    shares: tuple[float, ...]
    offloading: tuple[float, ...] = ()


_ALL = _Choices(
    virtual=(1, 2),
    experts=(1, 2, 4, 8, 16),
    recompute=("none", "selective", "full"),
    micro_batches=(1, 2, 4),
    shares=(0.35, 0.5, 0.65),
    offloading=(0.65, 0.8),
)
_ROOMY = _Choices(
    virtual=(1,),
    experts=(1, 2, 4, 8, 16, 32, 64, 128),
    recompute=("none", "full"),
    micro_batches=(1,),
    shares=(0.35, 0.6, 0.85),
)
"""Enough to find out whether anything fits, in seconds: without most of what only makes a layout faster."""


def _engines(config: Config, gpu: Gpu, num_gpus: int, choices: _Choices) -> list[tuple[Change, int]]:
    """Return the engines that are tried, each with the number of GPUs that it leaves to the trainer.

    Servers get whole nodes where there are several, and almost all of their GPUs' memory.
    """
    sizes = [n for n in (1, 2, 4, 8) if n <= gpu.per_node]
    if not config.engine.servers:
        on_device = _differences(config, dict.fromkeys(_OFFLOADED, False))
        shares: list[Change] = [on_device | {"engine.gpu_memory_utilization": share} for share in choices.shares]
        shares += [_OFFLOADED | {"engine.gpu_memory_utilization": share} for share in choices.offloading]
        return [({"engine.tensor_parallel": size} | share, num_gpus) for size, share in product(sizes, shares)]
    unit = gpu.per_node if num_gpus > gpu.per_node else 1
    return [
        (
            {
                "engine.servers": _addresses(config, gpus // size),
                "engine.tensor_parallel": size,
                "engine.gpu_memory_utilization": _SERVER_SHARE,
            },
            num_gpus - gpus,
        )
        for gpus, size in product(range(unit, num_gpus, unit), sizes)
        if gpus % size == 0
    ]


def _addresses(config: Config, count: int) -> list[str]:
    """Return that many addresses, the configuration's own first."""
    return [*config.engine.servers, *(f"http://server-{number}:8000" for number in range(count))][:count]


def _layouts(config: Config, model: ModelConfig, gpu: Gpu, num_gpus: int, choices: _Choices) -> list[Change]:
    return [
        layout | engine
        for engine, num_ranks in _engines(config, gpu, num_gpus, choices)
        for layout in _divisions(config, model, gpu, num_ranks, choices)
    ]


def _divisions(config: Config, model: ModelConfig, gpu: Gpu, num_ranks: int, choices: _Choices) -> list[Change]:
    length = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    sizes = [n for n in (1, 2, 4, 8) if n <= gpu.per_node]
    experts = choices.experts if model.experts else (1,)
    stages = [n for n in range(1, num_ranks + 1) if model.num_layers % n == 0]
    stages += [n for n in (2, 4, 8, 16, 32) if n <= min(num_ranks, model.num_layers) and model.num_layers % n]
    return [
        {
            "parallel.tensor": tensor,
            "parallel.pipeline": pipeline,
            "parallel.virtual_pipeline": virtual,
            **_layers(config, model, pipeline * virtual),
            "parallel.context": context,
            "parallel.expert": expert,
            "parallel.sequence": True,
            "parallel.data": _data(config, num_ranks, tensor * pipeline * context),
            "model.recompute": recompute,
            "batch.micro_batch_tokens": times * -(-length // (2 * tensor * context)) * 2 * tensor * context,
        }
        for tensor, pipeline, virtual, context, expert, recompute, times in product(
            sizes, stages, choices.virtual, (1, 2), experts, choices.recompute, choices.micro_batches
        )
        if (virtual == 1 or pipeline > 1) and pipeline * virtual <= model.num_layers
        if num_ranks % (tensor * pipeline * context) == 0
    ]


def _layers(config: Config, model: ModelConfig, chunks: int) -> Change:
    """Return the value that `parallel.layers_per_stage` needs; nothing where it stays empty."""
    uneven = model.num_layers % chunks > 0
    if not uneven and not config.parallel.layers_per_stage:
        return {}
    return {"parallel.layers_per_stage": list(nearly_even(model.num_layers, chunks)) if uneven else []}


def _data(config: Config, num_ranks: int, replica: int) -> int | None:
    """Return the value that `parallel.data` needs: None where it is left out, as the command line can't unset it."""
    return None if config.parallel.data is None else num_ranks // replica


def _differences(config: Config, change: Change) -> Change:
    """Return the part of a change that differs from the configuration."""
    sections = {key: key.split(".") for key in change}
    return {
        key: change[key]
        for key, (part, name) in sections.items()
        if getattr(getattr(config, part), name) != change[key]
    }


def has_headroom(plan: MemoryPlan) -> bool:
    """Return whether a plan leaves the share `HEADROOM` of every GPU's memory free."""
    return plan.free_share >= HEADROOM


def _order(each: tuple[Change, MemoryPlan]) -> tuple[float, ...]:
    """Return the sorting key of a layout; of layouts that are equally fast, the least divided one comes first."""
    found = each[1]
    seconds = found.seconds["step"] * (1 if has_headroom(found) else 1 + TIGHT_COST)
    layout = found.layout
    return round(seconds, 1), layout.context, layout.virtual_pipeline, layout.pipeline, layout.tensor


def _fitting(
    config: Config, model: ModelConfig, gpu: Gpu, nodes: int, changes: list[Change], mean_response: int | None
) -> list[tuple[Change, MemoryPlan]]:
    """Return the changes with which the configuration is valid and fits, and their plans, in order."""
    found = []
    for change in changes:
        try:
            each = plan(changed(config, change), model, gpu, nodes, mean_response=mean_response)
        except ConfigError:
            continue
        if each.fits:
            found.append((change, each))
    return sorted(found, key=_order)
