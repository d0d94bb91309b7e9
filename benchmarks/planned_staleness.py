"""Predict what rollouts ahead of the trainer gain on GPUs: the best layout of each kind that the planner finds.

`.venv/bin/python -m benchmarks.planned_staleness [--json] [--out benchmarks/results/NAME.json]`
Qwen3-32B with the recipe's batch. Each kind is searched on its own, also how the GPUs are divided. Takes minutes.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.measure import ROOT, options, write_rows
from megatron_mcpo.config.config import load
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.planner import hardware, search

FOLDER, GPU, NODES = ROOT / "examples/qwen3_32b", "h100", 8
KINDS: dict[str, tuple[str, ...]] = {
    "synchronous": ("h100_64.toml",),
    "staleness 1": ("h100_64_async.toml",),
    "staleness 3, oversample 2": ("h100_64_async.toml", "--engine.staleness", "3", "--engine.oversample", "2"),
}
LENGTHS: tuple[tuple[int, int | None], ...] = ((3072, None), (3072, 1024), (15360, 4096))
"""The most tokens of a response and their mean; None: all are equally long."""


def main(arguments: Sequence[str]) -> int:
    return write_rows("planned_staleness", rows(), options(__doc__).parse_args(arguments))


def rows() -> Iterator[dict[str, Any]]:
    """Yield a row per kind and lengths. ratio: of tokens per second and GPU to the synchronous kind's"""
    for limit, mean in LENGTHS:
        base = 0.0
        for kind, (recipe, *overrides) in KINDS.items():
            lengths = ("--rollout.max_response_tokens", str(limit), "--batch.micro_batch_tokens", str(1024 + limit))
            config = load(FOLDER / recipe, [*overrides, *lengths, "--engine.max_concurrent", "1024"])
            model = from_folder(ROOT / config.model.path, with_weights=False)
            _, best = search.fastest(config, model, hardware.load(GPU), NODES, mean)[0]
            speed = best.tokens_per_second_per_gpu
            base = base or speed
            yield {
                "limit": limit,
                "mean": mean or limit,
                "kind": kind,
                "server_gpus": best.config.server_gpus,
                "seconds": {phase: round(value, 1) for phase, value in best.seconds.items()},
                "busy": {who: round(share, 2) for who, share in best.busy.items()},
                "tokens_per_second_per_gpu": round(speed, 1),
                "ratio": round(speed / base, 3),
            }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
