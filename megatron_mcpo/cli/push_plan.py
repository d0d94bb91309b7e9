"""Show how weights go from the ranks of the trainer to those of the engines, and how many bytes travel.

Reads the configuration and the model's config.json; starts nothing and imports no torch.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_mcpo.cli import options
from megatron_mcpo.config.config import ConfigError, load
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.model import layout_problems
from megatron_mcpo.weights.engine_layout import engine_name
from megatron_mcpo.weights.reshard_plan import Step, SyncPlan

BYTES = {"bf16": 2, "fp32": 4}


def main(arguments: Sequence[str]) -> int:
    parser = options.parser("push-plan", __doc__, example="examples/qwen3_32b/h100_32.toml --ranks 32")
    options.add_config(parser)
    parser.add_argument(
        "--ranks", type=int, help="number of ranks of the run (default: the fewest that the configuration needs)"
    )
    parser.add_argument(
        "--expert-parallel", action="store_true", help="plan for engines whose ranks hold whole experts"
    )
    parser.add_argument("--messages", action="store_true", help="print every slice of every message")
    known, overrides = parser.parse_known_args(arguments)
    try:
        config = load(known.config, overrides)
        layout, model = config.layout(known.ranks), from_folder(Path(config.model.path), with_weights=False)
        problems = layout_problems(model, layout, config.engine.tensor_parallel)
        if problems:
            raise ConfigError(problems)
    except ConfigError as error:
        return options.refuse(error)
    plan = SyncPlan(
        model=model,
        layout=layout,
        engine_ranks=config.engine.tensor_parallel,
        whole_experts=known.expert_parallel,
    )
    for line in messages(plan) if known.messages else summary(plan, BYTES[config.model.dtype]):
        print(line)
    return 0


def summary(plan: SyncPlan, itemsize: int) -> Iterator[str]:
    """Write messages and bytes by kind of parameter, and bytes by rank."""
    num_engines = plan.layout.world_size // plan.engine_ranks
    yield f"from     {plan.layout}"
    yield f"to       {num_engines} engine(s) on {plan.engine_ranks} rank(s) each, {itemsize} bytes an element"
    kinds: dict[str, list[int]] = {}
    for step in plan.steps():
        travels = [message for message in step.messages if message.source != message.target]
        local = sum(step.elements(message) for message in step.messages) - sum(map(step.elements, travels))
        counts = (1, len(travels), itemsize * sum(map(step.elements, travels)), itemsize * local)
        kinds[kind(step)] = [a + b for a, b in zip(kinds.get(kind(step), [0] * 4), counts, strict=True)]
    yield f"{'engine parameter':<52}{'count':>8}{'messages':>12}{'travels':>16}{'stays':>16}"
    for name, (count, messages, travels_bytes, local) in kinds.items():
        yield f"{name:<52}{count:>8}{messages:>12}{mib(travels_bytes):>16}{mib(local):>16}"
    totals = plan.totals()
    yield f"{'rank':<52}{'':>4}{'sends':>16}{'receives':>16}{'keeps':>16}"
    for rank, (sent, received, local) in enumerate(zip(totals.sent, totals.received, totals.local, strict=True)):
        yield f"{rank:<56}{mib(itemsize * sent):>16}{mib(itemsize * received):>16}{mib(itemsize * local):>16}"
    yield f"lower bound of what travels in a push: {itemsize * sum(totals.received)} bytes"


def messages(plan: SyncPlan) -> Iterator[str]:
    """Write a line for every slice of every parameter: where it comes from and where it goes."""
    for step in plan.steps():
        name, expert = plan.engine_name(step.parameter)
        for message in step.messages:
            for each in message.slices:
                yield (
                    f"{step.parameter.hugging_face[each.tensor]} [{each.start}:{each.stop}] "
                    f"rank {message.source} at {each.source_start} -> rank {message.target} "
                    f"{name}{'' if expert is None else f'[{expert}]'} at {each.target_start}"
                )


def kind(step: Step) -> str:
    """Return an engine parameter's name without the layer's number."""
    return ".".join("N" if part.isdigit() else part for part in engine_name(step.parameter)[0].split("."))


def mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
