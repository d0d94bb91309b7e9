"""Predict what a run needs on GPUs before any is booked: memory per rank, bytes on the wire, seconds per step.

Needs no GPU and no weights: of the model's folder config.json is enough. Builds the model of one rank per pipeline
stage without memory. Exit code 1: it does not fit; up to three changes that make it fit follow, each with its cost.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_mcpo.cli import options
from megatron_mcpo.config.config import ConfigError, load
from megatron_mcpo.config.hf_config import from_folder

DOES_NOT_FIT = 1


def main(arguments: Sequence[str]) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser = options.parser("plan", __doc__, example="examples/qwen3_32b/h100_32.toml --gpu h100 --nodes 4 --search")
    parser.add_argument("config", type=Path)
    parser.add_argument("--gpu", default="h100", help="h100, h200, a100, b200, or a JSON file of measured rates")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus-per-node", type=int, help="else 8, or what the JSON file says")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument(
        "--search", action="store_true", help="order the layouts that fit by seconds per step, with headroom first"
    )
    known, overrides = parser.parse_known_args(arguments)
    try:
        config = load(known.config, overrides)
        model = from_folder(Path(config.model.path), with_weights=False)
        # Late: a bad configuration is refused before torch is imported.
        from megatron_mcpo.planner import hardware, plan_text, planning, search

        for option, number in (("--nodes", known.nodes), ("--gpus-per-node", known.gpus_per_node)):
            if number is not None and number < 1:
                raise ConfigError([f"{option} {number}: must be at least 1"])
        gpu = hardware.load(known.gpu)
        gpu = replace(gpu, per_node=known.gpus_per_node or gpu.per_node)
        plan = planning.plan(config, model, gpu, known.nodes)
    except ConfigError as error:
        return options.refuse(error)
    plan.check_built()
    found = search.fastest(config, model, gpu, known.nodes) if known.search else []
    remedies = [] if plan.fits else search.remedies(config, model, gpu, known.nodes)
    if known.json:
        values = plan.as_json()
        if not plan.fits:
            values["remedies"] = [{"change": change, **each.as_json()} for change, each in remedies]
            values["remedy"] = next(iter(values["remedies"]), None)
        if known.search:
            values["search"] = [{"change": change, **each.as_json()} for change, each in found[:10]]
        print(json.dumps(values))
    else:
        lines = list(plan_text.plan_lines(plan))
        if not plan.fits:
            lines += plan_text.remedy_lines(plan, remedies)
        print("\n".join(lines + (["", *plan_text.search_lines(found)] if known.search else [])))
    return 0 if plan.fits else DOES_NOT_FIT
