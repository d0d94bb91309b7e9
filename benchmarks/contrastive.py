"""What the contrastive terms cost (by themselves, against the plain N x N form, and in a training step), what pushing
weights to the engines and converting them cost, and what travels as a run grows.

`.venv/bin/python benchmarks/contrastive.py contrastive [--large] [--json] [--out benchmarks/NAME.json]`
`.venv/bin/python benchmarks/contrastive.py step [--json] [--out benchmarks/NAME.json]` (needs the model of `make model`)
`.venv/bin/python benchmarks/contrastive.py sync [--cases PART] [--json] [--out benchmarks/NAME.json]`
`.venv/bin/python benchmarks/contrastive.py scaling [--json] [--out benchmarks/NAME.json]`
`.venv/bin/python benchmarks/contrastive.py convert [--small] [--json] [--out benchmarks/NAME.json]` (28 GB of disk)
--json prints one object a row; --out also puts the rows into a file, beside those of the other commands.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.measure import ROOT, forget_peak, memory, timed
from benchmarks.seeds import machine
from megatron_mcpo.algo.contrastive import TILE_ELEMENTS, contrastive
from megatron_mcpo.config.config import Config, load
from megatron_mcpo.config.schema import ContrastiveConfig
from megatron_mcpo.data.batch import make_batch
from megatron_mcpo.reporting.step_metrics import BatchReport, rollout_stats, step_figures
from megatron_mcpo.types import Completion, Keys, Prompt, RolloutGroup, StopReason
from tests.support import reference

if TYPE_CHECKING:  # Megatron-Core takes seconds to import, and every row of `contrastive` is a process
    from megatron_mcpo.distributed.parallel import Groups
    from megatron_mcpo.mcore.policy import Reference

DIM = 512
SIZES, LARGE = (512, 2048, 8192), (32768, 65536)
TRANSFERS = ("top_k", "all")
"""The default, and one that sorts nothing: the plain form's sorting must not flatter the comparison."""
DOMAINS, SAMPLES = 5, 8
LONG_ENOUGH = 20.0
"""Seconds after which a measurement is not repeated."""
STEPS = 10


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("contrastive", "step", "sync", "scaling", "convert"):
        command = commands.add_parser(name)
        command.add_argument("--json", action="store_true")
        command.add_argument("--out", type=Path)
    commands.choices["contrastive"].add_argument("--large", action="store_true", help="the tiles alone, to N = 65536")
    commands.choices["sync"].add_argument("--cases", default="", help="those alone with this in their names")
    commands.choices["convert"].add_argument("--small", action="store_true", help="the 135M model alone")
    measure = commands.add_parser("measure", help="one row, in this process")
    measure.add_argument("impl", choices=["naive", "tiled"])
    measure.add_argument("n", type=int)
    measure.add_argument("transfer", choices=TRANSFERS)
    known = parser.parse_args(arguments)
    if known.command == "measure":
        print(json.dumps(cost(known.impl, known.n, known.transfer)))
        return 0
    if known.out and not known.out.parent.is_dir():
        parser.error(f"--out {known.out}: there is no folder {known.out.parent}")
    rows = []
    for row in measured_rows(known):
        rows.append(row)
        print(json.dumps(row) if known.json else "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if known.out:
        report = json.loads(known.out.read_text()) if known.out.exists() else {}
        report |= {"machine": machine(), known.command: rows}
        known.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def measured_rows(known: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if known.command == "contrastive":
        yield from contrastive_rows(large=known.large)
    elif known.command == "step":
        yield step_row()
    elif known.command == "sync":
        from benchmarks.push import sync_rows

        yield from sync_rows(known.cases)
    elif known.command == "scaling":
        from benchmarks.scaling import scaling_rows

        yield from scaling_rows()
    else:
        from benchmarks import convert

        yield from convert.rows(small_only=known.small)


def contrastive_rows(*, large: bool) -> Iterator[dict[str, Any]]:
    """A row an implementation and size, each measured in a process of its own: so memory is that of one call."""
    for transfer in TRANSFERS:
        for n in (*SIZES, *(LARGE if large and transfer == "top_k" else ())):
            naive = None
            for impl in ("naive", "tiled") if n in SIZES else ("tiled",):
                command = [sys.executable, __file__, "measure", impl, str(n), transfer]
                row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
                naive = row["seconds"] if impl == "naive" else naive
                yield row | {"ratio_to_naive": round(row["seconds"] / naive, 3) if naive else None}


def cost(impl: str, n: int, transfer: Any) -> dict[str, Any]:
    """Seconds of both terms with their gradient, and the memory they take beside z at the highest."""
    settings = ContrastiveConfig(transfer=transfer)
    z_MD, keys = rollouts(n)
    run: dict[str, Callable[[Tensor, Keys], object]] = {
        "naive": lambda z, k: reference.contrastive_loss(z.requires_grad_(), k, settings).backward(),
        "tiled": lambda z, k: contrastive(z, k, settings),
    }
    run[impl](*rollouts(256))
    before = memory("VmRSS")
    forget_peak()
    seconds = [timed(lambda: run[impl](z_MD, keys))]
    peak = memory("VmHWM")
    while len(seconds) < 5 and sum(seconds) < LONG_ENOUGH:
        seconds.append(timed(lambda: run[impl](z_MD, keys)))
    median = statistics.median(seconds)
    return {
        "n": n,
        "d": DIM,
        "transfer": transfer,
        "impl": impl,
        "seconds": round(median, 5),
        "peak_extra_bytes": peak - before,
        "ratio_to_floor": round(median / floor(z_MD.detach(), int(keys.correct_M.sum())), 3),
        "threads": torch.get_num_threads(),
    }


def floor(z_MD: Tensor, num_anchors: int) -> float:
    """Seconds of what can't be saved: the similarities of all anchors, and both products that make their gradient."""
    rows = min(num_anchors, TILE_ELEMENTS // len(z_MD))
    z_AD, tile_AM = z_MD[:rows], torch.rand(rows, len(z_MD))
    products = [lambda: z_AD @ z_MD.T, lambda: tile_AM @ z_MD, lambda: tile_AM.T @ z_AD]
    return sum(min(timed(product) for _ in range(4)) for product in products) * num_anchors / rows


def rollouts(n: int) -> tuple[Tensor, Keys]:
    random = torch.Generator().manual_seed(0)
    z_MD = normalize(torch.randn(n, DIM, generator=random), dim=1)
    prompt_M = torch.arange(n) // SAMPLES
    return z_MD, Keys(domain_M=prompt_M % DOMAINS, prompt_M=prompt_M, correct_M=torch.rand(n, generator=random) < 0.5)


def step_row() -> dict[str, Any]:
    """The quick start's step without its sampling, with and without both terms, in turns of alternating order.

    The share is the median over pairs of neighbouring steps, of the processor's seconds: other work on the machine
    disturbs these less. One thread only: two of them wait for each other by counting.
    """
    from megatron_mcpo.config.hf_config import from_folder
    from megatron_mcpo.config.layout import Layout
    from megatron_mcpo.distributed import parallel
    from megatron_mcpo.mcore.policy import Reference

    path = ROOT / "examples" / "quickstart" / "config.toml"
    off = ["--contrastive.share_weight", "0.0", "--contrastive.consolidate_weight", "0.0"]
    configs = {"on": load(path), "off": load(path, off)}
    torch.set_num_threads(1)
    groups = parallel.init(Layout(), seed=0, timeout_seconds=600)
    frozen = Reference(configs["on"], from_folder(Path(configs["on"].model.path)), groups)
    learners = {name: Learner(config, frozen, groups) for name, config in configs.items()}
    sampled = made_up(configs["on"])
    for number in range(1 + STEPS):
        for learner in list(learners.values())[:: 1 if number % 2 else -1]:
            learner.step(sampled)
    parallel.destroy()
    seconds = {name: statistics.median(learner.seconds[1:]) for name, learner in learners.items()}
    pairs = zip(learners["on"].cpu_seconds[1:], learners["off"].cpu_seconds[1:], strict=True)
    shares = [on / off - 1 for on, off in pairs]
    return {
        "share_contrast": round(statistics.median(shares), 4),
        "share_standard_error": round(statistics.stdev(shares) / len(shares) ** 0.5, 4),
        "seconds_on": round(seconds["on"], 3),
        "seconds_off": round(seconds["off"], 3),
        "seconds_terms": round(statistics.median(learners["on"].seconds_terms[1:]), 4),
        "forwards_on": learners["on"].forwards // (1 + STEPS),
        "forwards_off": learners["off"].forwards // (1 + STEPS),
        "threads": torch.get_num_threads(),
        "every_share": [round(share, 4) for share in shares],
    }


class Learner:
    """A policy that takes the trainer's steps, from scoring to the figures, and notes what they cost."""

    def __init__(self, config: Config, frozen: "Reference", groups: "Groups"):
        from megatron_mcpo.mcore.policy import Policy
        from megatron_mcpo.trainer.objective import Objective

        self.config = config
        self.frozen = frozen
        self.policy = Policy(config, frozen.model_config, groups)
        self.objective = Objective(config, self.policy, groups)
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.seconds_terms: list[float] = []
        self.forwards = 0
        for chunk in self.policy.chunks:
            chunk.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.forwards += 1

    def step(self, sampled: Sequence[RolloutGroup]) -> None:
        from megatron_mcpo.trainer.objective import Scored

        start, cpu_start = time.perf_counter(), time.process_time()
        batch = make_batch(
            sampled,
            num_data_ranks=1,
            data_rank=0,
            share_prompts=self.policy.shares_prompts,
        )
        old, frozen = self.policy.score(batch), self.frozen.score(batch)
        scored = Scored(groups=sampled, batch=batch, old=old, reference_logp_R=frozen.logp_R)
        before = time.perf_counter()
        contrasted = self.objective.contrast(scored, step=1)
        self.seconds_terms.append(time.perf_counter() - before)
        advantages_M = self.objective.advantages(scored, contrasted)
        loss = self.objective.loss(scored, advantages_M, contrasted)
        update = self.policy.update(batch, loss, z_version=contrasted.version if contrasted else None)
        report = BatchReport(
            groups=sampled,
            advantages_M=advantages_M,
            stats_MK=rollout_stats(batch, old, frozen.logp_R),
            z_MD=contrasted.z_MD if contrasted else None,
            contrast=contrasted.contrast if contrasted else None,
            keys=batch.keys,
            num_tokens=batch.num_tokens,
            metrics=update.metrics,
        )
        step_figures([report], sampled, self.config.domain_names)
        self.seconds.append(time.perf_counter() - start)
        self.cpu_seconds.append(time.process_time() - cpu_start)


def made_up(config: Config) -> list[RolloutGroup]:
    """Rollouts of the quick start's sizes, 162 tokens on average, and its share of right answers."""
    random = torch.Generator().manual_seed(0)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high + 1, (1,), generator=random))
        return tuple(torch.randint(100, 40_000, (length,), generator=random).tolist())

    groups = []
    for number in range(config.batch.prompts):
        prompt = Prompt(domain=number % DOMAINS, source="made up", index=number, token_ids=tokens(125, 185), entry={})
        answers = [tokens(2, 12) for _ in range(config.batch.samples)]
        correct = tuple((torch.rand(len(answers), generator=random) < 0.3).tolist())
        groups.append(
            RolloutGroup(
                prompt=prompt,
                completions=tuple(
                    Completion(token_ids=ids, logprobs=(-10.0,) * len(ids), stop_reason=StopReason.STOP, version=0)
                    for ids in answers
                ),
                rewards=tuple(map(float, correct)),
                correct=correct,
            )
        )
    return groups


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
