"""Measure what the contrastive terms cost in a training step of the quick start. Needs the model of `make model`.

`.venv/bin/python -m benchmarks.step [--json] [--out benchmarks/results/NAME.json]`
"""

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import ROOT, options, write_rows
from megatron_mcpo.config.config import Config, load
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.data.batch import make_batch
from megatron_mcpo.distributed import parallel
from megatron_mcpo.distributed.parallel import Groups
from megatron_mcpo.mcore.policy import Policy, Reference
from megatron_mcpo.reporting.step_metrics import BatchReport, rollout_stats, step_metrics
from megatron_mcpo.trainer.objective import Objective, Scored
from megatron_mcpo.types import Completion, Prompt, RolloutGroup, StopReason

STEPS = 10
DOMAINS = 5


def main(arguments: Sequence[str]) -> int:
    return write_rows("step", iter([step_row()]), options(__doc__).parse_args(arguments))


def step_row() -> dict[str, Any]:
    """Return the cost of the quick start's step without its sampling, with and without both terms, in turns.

    The share is the median over pairs of neighbouring steps, of the processor's seconds: other work on the machine
    disturbs these less. One thread only: two of them spin while they wait for each other.
    """
    path = ROOT / "examples" / "quickstart" / "config.toml"
    off = ["--contrastive.cross_domain_weight", "0.0", "--contrastive.in_domain_weight", "0.0"]
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
    prepare = {name: statistics.median(learner.seconds_prepare[1:]) for name, learner in learners.items()}
    pairs = zip(learners["on"].cpu_seconds[1:], learners["off"].cpu_seconds[1:], strict=True)
    shares = [on / off - 1 for on, off in pairs]
    return {
        "share_contrast": round(statistics.median(shares), 4),
        "share_standard_error": round(statistics.stdev(shares) / len(shares) ** 0.5, 4),
        "seconds_on": round(seconds["on"], 3),
        "seconds_off": round(seconds["off"], 3),
        "seconds_terms": round(prepare["on"] - prepare["off"], 4),
        "forwards_on": learners["on"].forwards // (1 + STEPS),
        "forwards_off": learners["off"].forwards // (1 + STEPS),
        "threads": torch.get_num_threads(),
        "every_share": [round(share, 4) for share in shares],
    }


class Learner:
    """A policy that takes the trainer's steps, from scoring to the metrics, and measures what they cost."""

    def __init__(self, config: Config, frozen: Reference, groups: Groups):
        self.config = config
        self.frozen = frozen
        self.policy = Policy(config, frozen.model_config, groups)
        self.objective = Objective(config, self.policy, groups)
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.seconds_prepare: list[float] = []
        self.forwards = 0
        for chunk in self.policy.chunks:
            chunk.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.forwards += 1

    def step(self, sampled: Sequence[RolloutGroup]) -> None:
        """Score a batch, prepare its loss, update the policy and compute the metrics."""
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
        prepared = self.objective.prepare(scored, step=1)
        self.seconds_prepare.append(time.perf_counter() - before)
        contrasted, loss = prepared.contrasted, self.objective.loss(prepared)
        update = self.policy.update(batch, loss, representation_version=prepared.representation_version)
        report = BatchReport(
            groups=sampled,
            advantages_M=prepared.advantages_M,
            stats_MK=rollout_stats(batch, old, frozen.logp_R),
            z_MD=contrasted.z_MD if contrasted else None,
            contrast=contrasted.contrast if contrasted else None,
            labels=batch.labels,
            num_tokens=batch.num_tokens,
            metrics=update.metrics,
        )
        step_metrics([report], sampled, self.config.domain_names)
        self.seconds.append(time.perf_counter() - start)
        self.cpu_seconds.append(time.process_time() - cpu_start)


def made_up(config: Config) -> list[RolloutGroup]:
    """Return rollouts of the quick start's sizes, 162 tokens on average, with its share of correct answers."""
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
                    Completion(
                        token_ids=ids,
                        logprobs=(-10.0,) * len(ids),
                        stop_reason=StopReason.STOP,
                        versions=(0,) * len(ids),
                    )
                    for ids in answers
                ),
                rewards=tuple(map(float, correct)),
                correct=correct,
            )
        )
    return groups


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
