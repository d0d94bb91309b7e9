"""Write a plan, its remedies and the result of a search as text for people."""

import json
from collections.abc import Iterator, Sequence

from megatron_mcpo.config.summary import arithmetic
from megatron_mcpo.planner.hardware import GIB
from megatron_mcpo.planner.planning import MemoryPlan
from megatron_mcpo.planner.search import HEADROOM, TIGHT_COST, Change
from megatron_mcpo.weights.mapping import total_params

_SHOWN = 10


def plan_lines(plan: MemoryPlan) -> Iterator[str]:
    """Write what runs, bytes by rank and phase, bytes on the wire, seconds, and whether it fits."""
    gpu, shape = plan.gpu, plan.shape
    yield arithmetic(plan.config, plan.layout, plan.model)
    divided = f": {plan.layout.world_size} for the trainer, {plan.config.server_gpus} for the engine servers"
    yield (
        f"gpu      {plan.nodes} node(s) of {gpu.per_node} x {gpu.name}, {gpu.memory_gib:g} GiB each"
        + (divided if plan.config.server_gpus else "")
    )
    yield (
        f"params   {total_params(plan.model):,} in the model; micro-batches of {plan.expected.sequences} rollout(s), "
        f"{plan.expected.micros} of them an optimizer step and replica"
    )
    experts = "; experts are used equally" if plan.model.experts else ""
    lengths = f"every rollout has {shape.prompt} + {shape.response} tokens"
    if plan.lengths.mean < plan.lengths.limit:
        lengths = (
            f"prompts of {shape.prompt} tokens; responses of {plan.lengths.mean:g} on average, geometrically "
            f"distributed up to {shape.response}, which memory is planned for"
        )
    yield f"assumed  {lengths}; Transformer Engine's layers{experts}"
    if plan.not_modelled:
        yield f"not modelled: {'; '.join(plan.not_modelled)}"
    yield ""
    yield from _memory(plan)
    yield ""
    yield "received by all ranks together in a step, GB"
    yield "  " + "  ".join(f"{name} {value / 1e9:,.1f}" for name, value in plan.wire.items())
    yield ""
    engine = plan.engine
    yield (
        f"engine   {engine.weights / GIB:.1f} GiB of weights and {engine.cache / GIB:.1f} GiB of cache a "
        f"{'rank' if engine.in_ranks else 'GPU of a server'}: "
        f"{engine.cache_tokens:,} tokens, {engine.sequences} rollouts together"
    )
    yield "seconds  " + "  ".join(f"{name} {value:,.1f}" for name, value in plan.seconds.items())
    if plan.config.engine.prompts_ahead:
        yield "busy     " + ", ".join(f"{name} {share:.0%} of the step" for name, share in plan.busy.items())
    yield f"tokens   {plan.tokens_per_second_per_gpu:,.0f} a second and GPU, prompts and responses"
    yield f"fits     {'yes' if plan.fits else 'NO'}"
    for shortage in plan.shortages:
        yield f"  {shortage}"


def _memory(plan: MemoryPlan) -> Iterator[str]:
    parts = list(plan.ranks[0].parts)
    yield f"GiB of a rank of stage   {''.join(f'{rank.stage:>8}' for rank in plan.ranks)}"
    yield f"  {'parameters, millions':<23}{''.join(f'{rank.params / 1e6:>8,.0f}' for rank in plan.ranks)}"
    for name in parts:
        yield f"  {name:<23}{''.join(f'{rank.parts[name] / GIB:>8.2f}' for rank in plan.ranks)}"
    yield "peak of"
    for phase in plan.ranks[0].phases:
        yield f"  {phase:<23}{''.join(f'{rank.phases[phase] / GIB:>8.2f}' for rank in plan.ranks)}"
    if any(rank.host for rank in plan.ranks):
        yield f"{'of host memory':<25}{''.join(f'{rank.host / GIB:>8.2f}' for rank in plan.ranks)}"


def describe(change: Change) -> str:
    """Write a change as options of the command line."""
    values = {**change}
    servers = values.pop("engine.servers", None)
    for key, value in values.items():
        if isinstance(value, bool | list):
            values[key] = json.dumps(value, separators=(",", ":"))
    options = " ".join(f"--{key} {value}" for key, value in values.items() if value is not None)
    return options if servers is None else f"{options} and {len(servers)} engine.servers"


def remedy_lines(nodes: int, remedies: Sequence[tuple[Change, MemoryPlan]]) -> Iterator[str]:
    """Write the changes that make a plan on `nodes` nodes fit, each with its cost."""
    if not remedies:
        yield (
            "no change of layout, recompute, micro-batch, offload or engine makes it fit, and neither do 16 times the "
            "nodes with other layouts"
        )
        return
    yield "changes that make it fit, the simplest and fastest first (per step; peak of the fullest rank):"
    for change, found in remedies:
        more_nodes = [] if found.nodes == nodes else [f"--nodes {found.nodes}"]
        yield (
            f"  {' '.join([*more_nodes, describe(change)]).strip()}  ({found.seconds['step']:,.0f} s, "
            f"{found.gpu_hours:,.2f} GPU-hours, {_peak(found)})"
        )


def _peak(plan: MemoryPlan) -> str:
    return f"{plan.peak / GIB:.1f} of {plan.gpu.memory_gib:g} GiB"


def search_lines(found: Sequence[tuple[Change, MemoryPlan]]) -> Iterator[str]:
    """Write the rule that the layouts are ordered by, and the first of them, one line each."""
    if not found:
        yield "no layout fits on these nodes"
        return
    yield f"{len(found)} layouts fit. Ordered by seconds per step; one that leaves less than {HEADROOM:.0%} of a GPU's"
    yield f"memory free counts as {TIGHT_COST:.0%} slower:"
    yield (
        f"{'s/step':>9}{'tok/s/GPU':>11}{'peak GiB':>10}{'free':>6}"
        "  tensor pipeline virtual context expert data  recompute"
    )
    for _, each in found[:_SHOWN]:
        layout, config = each.layout, each.config
        yield (
            f"{each.seconds['step']:>9,.1f}{each.tokens_per_second_per_gpu:>11,.0f}{each.peak / GIB:>10.1f}"
            f"{each.free_share:>6.1%}  {layout.tensor:>6}"
            f"{layout.pipeline:>9}{layout.virtual_pipeline:>8}{layout.context:>8}{layout.expert:>7}{layout.data:>5}  "
            f"{config.model.recompute:>9}  micro-batch {config.batch.micro_batch_tokens}, engine tensor "
            f"{config.engine.tensor_parallel}, share {config.engine.gpu_memory_utilization:g}"
            + (f", servers {len(config.engine.servers)}" if config.engine.servers else "")
        )
    yield f"the first as overrides: {describe(found[0][0])}"
