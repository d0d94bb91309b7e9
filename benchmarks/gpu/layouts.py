"""Gradients of the whole objective in bf16, in one process and in parallel layouts, against autograd in float64.

NCCL refuses two ranks of one host on one GPU. Here every rank says that it is a host of its own (NCCL_HOSTID): they
share the GPU and talk through sockets. That shows what they compute, and nothing about their speed.
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
from megatron_mcpo.distributed import parallel
from megatron_mcpo.distributed.device import backend
from megatron_mcpo.distributed.parallel import Groups
from megatron_mcpo.trainer.objective import Objective

LAYOUTS_TRIED = ("tp2_sp", "pp2", "vpp2", "cp2", "dp2")
_BANDS = {"least cosine": (0.97, 1.0), "least ratio of norms": (0.9, 1.1), "largest ratio of norms": (0.9, 1.1)}
_RANKS = 2
_TIMEOUT_SECONDS = 240

Nearness = dict[str, float]
"""Of the gradients of all parameters in several cases: the least cosine, the least and the largest ratio of norms."""


def gradients() -> Outcome:
    """All terms of the objective on one rank."""
    groups = parallel.init(Layout(), seed=0, timeout_seconds=600)
    with TemporaryDirectory() as name:
        return _outcome({"": _nearness(_cases(Path(name), "halves"), groups)})


def layouts() -> Outcome:
    """The same on two ranks: tensor with sequence, pipeline, interleaved pipeline, context and data parallelism."""
    return _on_two_ranks("halves", LAYOUTS_TRIED)


def experts() -> Outcome:
    """A mixture of experts: every expert on both ranks, and half of them on either."""
    return _on_two_ranks("experts", ("dp2", "ep2"))


def _cases(folder: Path, model: str) -> list[Case]:
    """Untied ones: the tied model's heads of 18 are no multiple of 8. Nothing in them is chosen by a hair's breadth.

    A token that float64 sends to another expert than bf16 does, or that one of them clips, changes gradients by more
    than any bound for rounding could allow.
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
    """On this rank: of all parameters, but for the contrastive head, which the last stage alone knows."""
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
    """By torch, whose minimum of a NaN and anything is NaN."""
    found = (torch.tensor(cosines).min(), torch.tensor(least).min(), torch.tensor(largest).max())
    return {name: value.item() for name, value in zip(_BANDS, found, strict=True)}


def main(arguments: Sequence[str]) -> None:
    """A rank, started by torchrun: the nearness in every layout; rank 0 writes down the worst of all ranks."""
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
        found[name] = _worst(parallel.gather_objects(_nearness(cases, groups), groups))
        parallel.destroy()
    if rank == 0:
        (folder / "found").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
