"""Measure seconds and memory of the contrastive terms against the plain N x N form.

`.venv/bin/python -m benchmarks.contrastive [--large] [--json] [--out benchmarks/results/NAME.json]`
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.measure import ROOT, forget_peak, memory, options, timed, write_rows
from megatron_mcpo.algo.contrastive import TILE_ELEMENTS, contrastive
from megatron_mcpo.config.schema import ContrastiveConfig
from megatron_mcpo.types import RolloutLabels
from tests.support import reference

DIM = 512
SIZES, LARGE = (512, 2048, 8192), (32768, 65536)
TRANSFERS = ("top_k", "all")
"""The default, and one that sorts nothing, so that the plain form's sorting does not distort the comparison."""
DOMAINS, SAMPLES = 5, 8
LONG_ENOUGH = 20.0
"""Seconds after which a measurement is not repeated."""


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["measure"]:
        _, impl, n, transfer = arguments
        print(json.dumps(cost(impl, int(n), transfer)))
        return 0
    parser = options(__doc__)
    parser.add_argument("--large", action="store_true", help="also N = 32768 and 65536, in tiles only")
    known = parser.parse_args(arguments)
    return write_rows("contrastive", contrastive_rows(large=known.large), known)


def contrastive_rows(*, large: bool) -> Iterator[dict[str, Any]]:
    """Yield a row per implementation and size, each measured in its own process, so that memory is that of one call."""
    for transfer in TRANSFERS:
        for n in (*SIZES, *(LARGE if large and transfer == "top_k" else ())):
            naive = None
            for impl in ("naive", "tiled") if n in SIZES else ("tiled",):
                command = [sys.executable, "-m", "benchmarks.contrastive", "measure", impl, str(n), transfer]
                row = json.loads(
                    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
                )
                naive = row["seconds"] if impl == "naive" else naive
                yield row | {"ratio_to_naive": round(row["seconds"] / naive, 3) if naive else None}


def cost(impl: str, n: int, transfer: Any) -> dict[str, Any]:
    """Measure seconds of both terms with their gradient, and their peak memory beside z."""
    settings = ContrastiveConfig(transfer=transfer)
    z_MD, labels = rollouts(n)
    run: dict[str, Callable[[Tensor, RolloutLabels], object]] = {
        "naive": lambda z, k: reference.contrastive_loss(z.requires_grad_(), k, settings).backward(),
        "tiled": lambda z, k: contrastive(z, k, settings),
    }
    run[impl](*rollouts(256))
    before = memory("VmRSS")
    forget_peak()
    seconds = [timed(lambda: run[impl](z_MD, labels))]
    peak = memory("VmHWM")
    while len(seconds) < 5 and sum(seconds) < LONG_ENOUGH:
        seconds.append(timed(lambda: run[impl](z_MD, labels)))
    median = statistics.median(seconds)
    return {
        "n": n,
        "d": DIM,
        "transfer": transfer,
        "impl": impl,
        "seconds": round(median, 5),
        "peak_extra_bytes": peak - before,
        "ratio_to_floor": round(median / floor(z_MD.detach(), int(labels.correct_M.sum())), 3),
        "threads": torch.get_num_threads(),
    }


def floor(z_MD: Tensor, num_anchors: int) -> float:
    """Measure the lower bound: the similarities of all anchors, and the two products of their gradient."""
    rows = min(num_anchors, TILE_ELEMENTS // len(z_MD))
    z_AD, tile_AM = z_MD[:rows], torch.rand(rows, len(z_MD))
    products = [lambda: z_AD @ z_MD.T, lambda: tile_AM @ z_MD, lambda: tile_AM.T @ z_AD]
    return sum(min(timed(product) for _ in range(4)) for product in products) * num_anchors / rows


def rollouts(n: int) -> tuple[Tensor, RolloutLabels]:
    random = torch.Generator().manual_seed(0)
    z_MD = normalize(torch.randn(n, DIM, generator=random), dim=1)
    prompt_M = torch.arange(n) // SAMPLES
    return z_MD, RolloutLabels(
        domain_M=prompt_M % DOMAINS, prompt_M=prompt_M, correct_M=torch.rand(n, generator=random) < 0.5
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
