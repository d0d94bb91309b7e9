"""Predict what MCPO adds to a step on GPUs, against GRPO with every pass left out that it does not need.

`.venv/bin/python -m benchmarks.cost [--json] [--out benchmarks/results/NAME.json]`
The planner's predictions for a recipe, with the method's own keys changed and nothing else.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, options, write_rows
from megatron_mcpo.config.config import load
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.planner import hardware, planning

RECIPE, GPU, NODES = "examples/qwen3_32b/h100_32.toml", "h100", 4
_NO_TERMS = ("--contrastive.cross_domain_weight", "0", "--contrastive.in_domain_weight", "0")
_NO_KL = ("--algorithm.kl_weight", "0")
METHODS: dict[str, tuple[str, ...]] = {
    "GRPO without KL": (*_NO_TERMS, *_NO_KL),
    "MCPO without KL": _NO_KL,
    "GRPO": _NO_TERMS,
    "MCPO": (),
}


def main(arguments: Sequence[str]) -> int:
    return write_rows("cost", cost_rows(), options(__doc__).parse_args(arguments))


def cost_rows() -> Iterator[dict[str, Any]]:
    """Yield a row per method: the predicted seconds of a step and its phases."""
    for method, overrides in METHODS.items():
        config = load(ROOT / RECIPE, overrides)
        model = from_folder(ROOT / Path(config.model.path), with_weights=False)
        seconds = planning.plan(config, model, hardware.load(GPU), NODES).seconds
        yield {"method": method, **{phase: round(value, 1) for phase, value in seconds.items()}}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
