"""Compare gradients of the whole objective in bf16 with autograd in float64, in one process and in parallel layouts.

NCCL refuses two ranks of one host on one GPU. Here every rank claims to be a host of its own (NCCL_HOSTID), so that
they share the GPU and communicate through sockets. This shows what they compute, but nothing about their speed.
"""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist

from benchmarks import gradient_table
from benchmarks.gpu.models import cosine, norm
from benchmarks.gpu.outcome import Band, Outcome
from benchmarks.gradient_table import LAYOUTS, Case
from benchmarks.measure import ROOT
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.distributed import parallel, peers
from megatron_mcpo.distributed.device import backend
from megatron_mcpo.distributed.parallel import Groups
from megatron_mcpo.trainer.objective import Objective

LAYOUTS_TRIED = ("tp2_sp", "pp2", "vpp2", "cp2", "dp2")
_BANDS = {"least cosine": (0.97, 1.0), "least ratio of norms": (0.9, 1.1), "largest ratio of norms": (0.9, 1.1)}
_RANKS = 2
_TIMEOUT_SECONDS = 240

Nearness = dict[str, float]
"""The least cosine and the least and largest ratio of norms, over the gradients of all parameters in several cases."""


def gradients() -> Outcome:
    """Check all terms of the objective on one rank."""
    groups = parallel.init(Layout(), seed=0, timeout_seconds=600)
    with TemporaryDirectory() as name:
        return _outcome({"": _nearness(_cases(Path(name), "halves"), groups)})


def layouts() -> Outcome:
    """Check two ranks: tensor with sequence, pipeline, interleaved pipeline, context and data parallelism."""
    return _on_two_ranks("halves", LAYOUTS_TRIED)


def experts() -> Outcome:
    """Check a mixture of experts: every expert on both ranks, and half of them on either."""
    return _on_two_ranks("experts", ("dp2", "ep2"))


def _cases(folder: Path, model: str) -> list[Case]:
    """Return the cases of untied models, since the tied model's heads of 18 are not a multiple of 8.

    No choice in them depends on rounding: a token that float64 sends to another expert than bf16 does, or that only one
    of them clips, changes gradients by more than any bound for rounding could allow.
    """
    cases = gradient_table.make_cases(folder, model, sure=True)
    return [case.in_bf16() for case in cases if not case.name.startswith("tied")]


def _on_two_ranks(model: str, layouts: Sequence[str]) -> Outcome:
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "cases").write_bytes(pickle.dumps(_cases(folder / "models", model)))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={_RANKS}"]
        subprocess.run([*command, "-m", "benchmarks.gpu.layouts", name, *layouts], cwd=ROOT, check=True)
        return _outcome(json.loads((folder / "found").read_text()))


def _outcome(found: dict[str, Nearness]) -> Outcome:
    bands = [
        Band(name=f"{layout} {name}".strip(), value=nearness[name], low=low, high=high)
        for layout, nearness in found.items()
        for name, (low, high) in _BANDS.items()
    ]
    return Outcome(bands=tuple(bands))


def _nearness(cases: Sequence[Case], groups: Groups) -> Nearness:
    """Compare all parameters on this rank; only the last stage has the contrastive head."""
    cosines, ratios = [], []
    for case in gradient_table.cases_for(groups.layout, cases):
        found = gradient_table.found_gradients(case, groups, Objective)
        known = [name for name in case.expected if groups.is_last_stage or not name.startswith(gradient_table.HEAD)]
        for name in known:
            mine, exact = found[name].double().cpu().flatten(), case.expected[name].flatten()
            cosines.append(cosine(mine, exact))
            ratios.append(norm(mine) / norm(exact))
    return _ends(cosines, ratios, ratios)


def _worst(of_ranks: Sequence[Nearness]) -> Nearness:
    return _ends(*([each[name] for each in of_ranks] for name in _BANDS))


def _ends(cosines: Sequence[float], least: Sequence[float], largest: Sequence[float]) -> Nearness:
    """Return the extremes, computed by torch, whose minimum of a NaN and anything is NaN."""
    found = (torch.tensor(cosines).min(), torch.tensor(least).min(), torch.tensor(largest).max())
    return {name: value.item() for name, value in zip(_BANDS, found, strict=True)}


def main(arguments: Sequence[str]) -> None:
    """Run a rank that torchrun started in every layout; rank 0 writes the worst result of all ranks."""
    folder, layouts = Path(arguments[0]), arguments[1:]
    rank = int(os.environ["RANK"])
    os.environ["NCCL_HOSTID"] = f"rank-{rank}"
    cases = pickle.loads((folder / "cases").read_bytes())  # noqa: S301 - written by our own parent
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    found = {}
    for name in layouts:
        print(f"rank {rank}: {name}", file=sys.stderr, flush=True)
        dist.init_process_group(backend(), store=dist.PrefixStore(name, store), rank=rank, world_size=_RANKS)
        groups = parallel.init(LAYOUTS[name], seed=0, timeout_seconds=_TIMEOUT_SECONDS)
        found[name] = _worst(peers.gather_objects(_nearness(cases, groups), groups))
        parallel.destroy()
    if rank == 0:
        (folder / "found").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
