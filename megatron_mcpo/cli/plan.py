"""Predict what a run needs on GPUs before any is booked: memory per rank, bytes on the wire, seconds per step.

Needs no GPU and no weights: of the model's folder config.json is enough. Builds the model of one rank per pipeline
stage without memory. Exit code 1: it does not fit; up to three changes that make it fit follow, each with its cost.
With --search the nodes may be too few for the configuration's own layout; the exit code is then 1 if no layout fits.
"""

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mcpo.cli import options
from megatron_mcpo.config import model_rules
from megatron_mcpo.config.config import Config, ConfigError, load
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.model import ModelConfig

if TYPE_CHECKING:
    from megatron_mcpo.planner.hardware import Gpu
    from megatron_mcpo.planner.planning import MemoryPlan
    from megatron_mcpo.planner.search import Change

_LISTED = 10
"""Layouts of a search in the JSON object."""


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """The planner's findings.

    plan: of the configuration's own layout; None if that is impossible on these nodes, `impossible` says why
    remedies: changes that make the run fit, where it does not; found: None without --search
    """

    gpu: "Gpu"
    nodes: int
    plan: "MemoryPlan | None"
    impossible: list[str]
    remedies: "list[tuple[Change, MemoryPlan]]"
    found: "list[tuple[Change, MemoryPlan]] | None"

    @property
    def exit_code(self) -> int:
        """Return 0 if the configuration fits or, where its own layout is impossible, another one does."""
        fits = bool(self.found) if self.plan is None else self.plan.fits
        return 0 if fits else options.FAILED


def main(arguments: Sequence[str]) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    known, overrides = _parser().parse_known_args(arguments)
    try:
        config = load(known.config, overrides)
        model = from_folder(Path(config.model.path), with_weights=False)
        answer = _answer(config, model, known)
    except ConfigError as error:
        return options.refuse(error)
    print(json.dumps(_values(answer)) if known.json else "\n".join(_lines(answer)))
    return answer.exit_code


def _parser() -> options.Parser:
    parser = options.parser("plan", __doc__, example="examples/qwen3_32b/h100_32.toml --gpu h100 --nodes 4 --search")
    options.add_config(parser)
    parser.add_argument("--gpu", default="h100", help=f"{options.GPUS} (default: h100)")
    parser.add_argument("--nodes", type=int, required=True, metavar="N")
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="else 8, or what the JSON file says")
    parser.add_argument(
        "--mean-response",
        type=int,
        metavar="TOKENS",
        help="of a response on average (response_tokens of a run's metrics), whose lengths are then taken as "
        "geometrically distributed (default: all are as long as allowed)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument(
        "--search",
        action="store_true",
        help="order the layouts that fit on these nodes by seconds per step, with headroom first",
    )
    return parser


def _answer(config: Config, model: ModelConfig, known: argparse.Namespace) -> _Answer:
    """Plan the configuration and search as the options say. Raises ConfigError for what no layout can cure."""
    # Late: a bad configuration is refused before torch is imported.
    from megatron_mcpo.planner import hardware, planning, search

    for option, number in (("--nodes", known.nodes), ("--gpus-per-node", known.gpus_per_node)):
        if number is not None and number < 1:
            raise ConfigError([f"{option} {number}: must be at least 1"])
    gpu = hardware.load(known.gpu)
    gpu = replace(gpu, per_node=known.gpus_per_node or gpu.per_node)
    plan, impossible = None, []
    try:
        plan = planning.plan(config, model, gpu, known.nodes, mean_response=known.mean_response)
        plan.check_built()
    except ConfigError as error:
        if not known.search:
            raise
        impossible = error.problems
        if in_any_layout := model_rules.problems(config, model, on_cpu=False):
            raise ConfigError(list(dict.fromkeys([*impossible, *in_any_layout]))) from None
    given = (config, model, gpu, known.nodes, known.mean_response)
    found = search.fastest(*given) if known.search else None
    remedies = []
    if plan is not None and not plan.fits:
        remedies = search.remedies(*given)
    elif plan is None and not found:
        remedies = search.more_nodes(*given)
    return _Answer(gpu=gpu, nodes=known.nodes, plan=plan, impossible=impossible, remedies=remedies, found=found)


def _values(answer: _Answer) -> dict[str, Any]:
    """Return the answer as values for a JSON object."""
    if answer.plan is not None:
        values = answer.plan.as_json()
    else:
        world_size = answer.nodes * answer.gpu.per_node
        values = {"fits": False, "impossible": answer.impossible}
        values |= {"gpu": answer.gpu.name, "nodes": answer.nodes, "world_size": world_size}
    if not values["fits"]:
        values["remedies"] = [{"change": change, **each.as_json()} for change, each in answer.remedies]
        values["remedy"] = next(iter(values["remedies"]), None)
    if answer.found is not None:
        values["search"] = [{"change": change, **each.as_json()} for change, each in answer.found[:_LISTED]]
    return values


def _lines(answer: _Answer) -> Iterator[str]:
    """Write the answer as text."""
    from megatron_mcpo.planner import plan_text

    if answer.plan is not None:
        yield from plan_text.plan_lines(answer.plan)
    else:
        gpus = f"{answer.nodes} node(s) of {answer.gpu.per_node} x {answer.gpu.name}"
        yield f"The configuration's own layout is impossible on {gpus}:"
        yield from (f"  {problem}" for problem in answer.impossible)
    remedies = [] if answer.exit_code == 0 else plan_text.remedy_lines(answer.nodes, answer.remedies)
    searched = [] if answer.found is None else ["", *plan_text.search_lines(answer.found)]
    yield from [*remedies, *searched] if answer.plan is not None else [*searched, *remedies]
