"""A plan as text for people."""

from collections.abc import Iterator, Sequence

from megatron_mcpo.config.summary import arithmetic
from megatron_mcpo.planner.hardware import GIB
from megatron_mcpo.planner.planning import Plan
from megatron_mcpo.planner.ranks import total_params
from megatron_mcpo.planner.search import Change

_SHOWN = 10


def report(plan: Plan) -> Iterator[str]:
    """Lines: what runs, bytes by rank and phase, bytes on the wire, seconds, whether it fits."""
    gpu, load = plan.gpu, plan.load
    yield arithmetic(plan.config, plan.layout, plan.model)
    yield f"gpu      {plan.nodes} node(s) of {gpu.per_node} x {gpu.name}, {gpu.memory_gib:g} GiB each"
    yield (
        f"params   {total_params(plan.model):,} in the model; micro-batches of {load.sequences} rollout(s), "
        f"{load.micros} of them an optimizer step and replica"
    )
    yield (
        f"assumed  every rollout has {load.prompt} + {load.response} tokens; Transformer Engine's layers; experts are "
        "used equally"
        if plan.model.experts
        else f"assumed  every rollout has {load.prompt} + {load.response} tokens; Transformer Engine's layers"
    )
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
    yield f"tokens   {plan.tokens_per_second_per_gpu:,.0f} a second and GPU, prompts and responses"
    yield f"fits     {'yes' if plan.fits else 'NO'}"
    for shortage in plan.shortages:
        yield f"  {shortage}"


def _memory(plan: Plan) -> Iterator[str]:
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
    """A change as it is written on the command line."""
    said = {key: str(value).lower() if isinstance(value, bool) else value for key, value in change.items()}
    return " ".join(f"--{key} {value}" for key, value in said.items() if value is not None)


def remedy_lines(plan: Plan, remedies: Sequence[tuple[Change, Plan]]) -> Iterator[str]:
    """The cheapest of the changes that make a plan fit."""
    if not remedies:
        yield (
            "no change of layout, recompute, micro-batch, offload or engine makes it fit, nor do 16 times the nodes in "
            "other layouts"
        )
        return
    change, found = remedies[0]
    nodes = "" if found.nodes == plan.nodes else f"--nodes {found.nodes} "
    yield f"the cheapest change that makes it fit: {nodes}{describe(change)}  ({found.seconds['step']:,.0f} s a step)"


def search_lines(found: Sequence[tuple[Change, Plan]]) -> Iterator[str]:
    """The fastest layouts, one line each."""
    yield f"{len(found)} layouts fit; the fastest:"
    yield f"{'s a step':>9}{'tok/s/GPU':>11}{'peak GiB':>10}  tensor pipeline virtual context expert data  recompute"
    for _, each in found[:_SHOWN]:
        layout, config = each.layout, each.config
        peak = max(rank.peak for rank in each.ranks) / GIB
        yield (
            f"{each.seconds['step']:>9,.1f}{each.tokens_per_second_per_gpu:>11,.0f}{peak:>10.1f}  {layout.tensor:>6}"
            f"{layout.pipeline:>9}{layout.virtual_pipeline:>8}{layout.context:>8}{layout.expert:>7}{layout.data:>5}  "
            f"{config.model.recompute:>9}  micro-batch {config.batch.micro_batch_tokens}, engine tensor "
            f"{config.engine.tensor_parallel}, share {config.engine.gpu_memory_utilization:g}"
        )
    if found:
        yield f"the first as overrides: {describe(found[0][0])}"
