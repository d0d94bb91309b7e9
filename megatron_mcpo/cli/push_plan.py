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
from megatron_mcpo.weights.reshard_plan import Plan, Step

BYTES = {"bf16": 2, "fp32": 4}


def main(arguments: Sequence[str]) -> int:
    parser = options.parser("push-plan", __doc__, example="examples/qwen3_32b/h100_32.toml --ranks 32")
    parser.add_argument("config", type=Path)
    parser.add_argument("--ranks", type=int, help="of the run; else as many as the configuration needs at least")
    parser.add_argument("--expert-parallel", action="store_true", help="as to engines whose ranks hold whole experts")
    parser.add_argument("--moves", action="store_true", help="every slice of every parameter")
    known, overrides = parser.parse_known_args(arguments)
    try:
        config = load(known.config, overrides)
        layout, model = config.layout(known.ranks), from_folder(Path(config.model.path), with_weights=False)
        problems = layout_problems(model, layout, config.engine.tensor_parallel)
        if problems:
            raise ConfigError(problems)
    except ConfigError as error:
        return options.refuse(error)
    plan = Plan(
        model=model,
        layout=layout,
        engine_ranks=config.engine.tensor_parallel,
        whole_experts=known.expert_parallel,
    )
    for line in moves(plan) if known.moves else summary(plan, BYTES[config.model.dtype]):
        print(line)
    return 0


def summary(plan: Plan, itemsize: int) -> Iterator[str]:
    """By kind of parameter and by rank."""
    num_engines = plan.layout.world_size // plan.engine_ranks
    yield f"from     {plan.layout}"
    yield f"to       {num_engines} engine(s) on {plan.engine_ranks} rank(s) each, {itemsize} bytes an element"
    kinds: dict[str, list[int]] = {}
    for step in plan.steps():
        travels = [move for move in step.moves if move.source != move.target]
        local = sum(step.elements(move) for move in step.moves) - sum(map(step.elements, travels))
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


def moves(plan: Plan) -> Iterator[str]:
    for step in plan.steps():
        name, expert = plan.engine_name(step.parameter)
        for move in step.moves:
            for piece in move.pieces:
                yield (
                    f"{step.parameter.hugging_face[piece.tensor]} [{piece.start}:{piece.stop}] "
                    f"rank {move.source} at {piece.source_start} -> rank {move.target} "
                    f"{name}{'' if expert is None else f'[{expert}]'} at {piece.target_start}"
                )


def kind(step: Step) -> str:
    """An engine parameter's name without the layer's number."""
    return ".".join("N" if part.isdigit() else part for part in engine_name(step.parameter)[0].split("."))


def mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
