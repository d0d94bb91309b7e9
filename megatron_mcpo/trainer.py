"""The loop: the only module that knows the order of the stages. Shape legend: see megatron_mcpo.types."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from megatron_mcpo.algo.contrastive import Contrast
from megatron_mcpo.batch import make_batch
from megatron_mcpo.canary import Canary
from megatron_mcpo.collect import Collector, Sampling
from megatron_mcpo.config import Config
from megatron_mcpo.data.domains import Domain
from megatron_mcpo.data.stream import PromptStream
from megatron_mcpo.diagnose import term_gradients
from megatron_mcpo.evaluate import evaluate
from megatron_mcpo.gather import gather_rows
from megatron_mcpo.journal import Journal
from megatron_mcpo.mcore.policy import Policy, Reference
from megatron_mcpo.memory import peak_memory_gib, trim
from megatron_mcpo.objective import Contrasted, Objective, Scored
from megatron_mcpo.parallel import Groups
from megatron_mcpo.report import BatchReport, rollout_stats, step_figures
from megatron_mcpo.rewards.scorer import check_error_rate
from megatron_mcpo.rollout.engine import Engine
from megatron_mcpo.types import RolloutGroup, Update

_STEPS_PER_SEED = 1_000_003
"""Two runs with neighbouring seeds share no sampling seed before this many steps."""

_MOST_LEFT_OUT = 5


class Trainer:
    """MCPO (arXiv 2605.25443): sample, score, contrast, update, push; all ranks run it together."""

    def __init__(
        self,
        config: Config,
        *,
        groups: Groups,
        policy: Policy,
        reference: Reference | None,
        engine: Engine,
        collector: Collector,
        canary: Canary,
        stream: PromptStream,
        domains: Sequence[Domain],
        journal: Journal,
        save: Callable[[int], None],
        first_step: int,
    ):
        self.config = config
        self.groups = groups
        self.policy = policy
        self.objective = Objective(config, policy, groups)
        self.reference = reference
        self.engine = engine
        self.collector = collector
        self.canary = canary
        self.stream = stream
        self.domains = domains
        self.journal = journal
        self.save = save
        self.step = first_step
        self.seconds: dict[str, float] = {}
        self.bytes_sent = 0
        self.updates_left_out = 0

    def run(self) -> None:
        """Train to the last step."""
        config = self.config
        self.push_weights()
        self.check_engine()
        if self.step % config.evaluation.every == 0:
            self.evaluate()
        while self.step < config.run.steps:
            self.step += 1
            self.seconds = {}
            with self.timed("step"):
                collected = self.collect()
                scored = [self.score(part) for part in self.split(collected)]
                learned = [self.learn(part) for part in scored]
                trim()
                self.push_weights()
            self.log(collected, learned)
            last = self.step == config.run.steps
            if self.step % config.engine.canary_every == 0:
                self.check_engine()
            if last or self.step % config.run.checkpoint_every == 0:
                self.save(self.step)
            if last or self.step % config.evaluation.every == 0:
                self.evaluate()

    def collect(self) -> list[RolloutGroup]:
        """Sample a step's prompts and score the completions; the engine then gives its memory to the trainer."""
        config = self.config
        prompts = self.stream.next(config.batch.prompts)
        sampling = Sampling(
            num_samples=config.batch.samples,
            max_tokens=config.rollout.max_response_tokens,
            temperature=config.rollout.temperature,
            seed=(config.run.seed * _STEPS_PER_SEED + self.step) * config.batch.prompts * config.batch.samples,
        )
        with self.timed("rollout"):
            collected = self.collector.collect(prompts, sampling)
            self.engine.sleep()
        check_error_rate(collected, domain_names=config.domain_names, max_error_rate=config.rewards.max_error_rate)
        return collected

    def split(self, collected: Sequence[RolloutGroup]) -> list[list[RolloutGroup]]:
        """The groups of each optimizer step; groups whose verifier failed teach nothing and are left out."""
        usable = [group for group in collected if group.error is None]
        count = self.config.batch.minibatches
        return [part for number in range(count) if (part := usable[number::count])]

    def score(self, groups: Sequence[RolloutGroup]) -> Scored:
        """What policy and reference say of the rollouts before anything is learned."""
        batch = make_batch(
            groups,
            pass_threshold=self.config.algorithm.pass_threshold,
            num_data_ranks=self.groups.layout.data,
            data_rank=self.groups.data_rank,
            share_prompts=self.policy.shares_prompts,
        )
        with self.timed("score"):
            old = self.policy.score(batch)
            reference_logp_R = self.reference.score(batch).logp_R if self.reference else None
        return Scored(groups=groups, batch=batch, old=old, reference_logp_R=reference_logp_R)

    def learn(self, scored: Scored) -> BatchReport:
        """One optimizer step on the policy term, the KL term and both contrastive terms."""
        batch = scored.batch
        stats_MK = gather_rows(rollout_stats(batch, scored.old, scored.reference_logp_R), batch, self.groups)
        with self.timed("update"):
            contrasted = self.objective.contrast(scored, step=self.step)
            advantages_PG = self.objective.advantages(scored.groups, contrasted)
        z_MD, contrast = (contrasted.z_MD, contrasted.contrast) if contrasted else (None, None)
        diagnosis = self.diagnose(scored, advantages_PG, contrasted)
        with self.timed("update"):
            loss = self.objective.loss(scored, advantages_PG, contrasted)
            update = self.policy.update(batch, loss, z_version=contrasted.version if contrasted else None)
        return BatchReport(
            groups=scored.groups,
            advantages_PG=advantages_PG,
            stats_MK=stats_MK,
            z_MD=z_MD,
            contrast=contrast,
            keys=batch.keys,
            num_tokens=batch.num_tokens,
            metrics=_update_figures(update, contrast),
            diagnosis=diagnosis,
        )

    def diagnose(self, scored: Scored, advantages_PG: Tensor, contrasted: Contrasted | None) -> dict[str, float]:
        """Every few steps: how much each term pulls, and whether it pulls with the policy term."""
        every = self.config.contrastive.diagnose_every
        if contrasted is None or every == 0 or self.step % every:
            return {}
        with self.timed("diagnose"):
            return term_gradients(self.objective, self.policy, scored, advantages_PG, contrasted)

    def push_weights(self) -> None:
        """Give the engine the policy's weights."""
        self.engine.wake()
        with self.timed("sync"):
            self.bytes_sent = self.engine.update(self.policy.weights(), self.policy.version)

    def check_engine(self) -> None:
        """Stop the run where the engine doesn't sample from the weights that are trained."""
        difference = self.canary.check()
        self.journal.note(f"engine and trainer agree: log-probs of the same tokens {difference:.2g} apart on average")

    def evaluate(self) -> None:
        """Held-out accuracy by domain, unless a run that we go on with has it already."""
        if not self.journal.has_evaluation(self.step):
            self.journal.evaluation(self.step, evaluate(self.collector, self.domains, self.config))

    def log(self, collected: Sequence[RolloutGroup], learned: Sequence[BatchReport]) -> None:
        figures = step_figures(learned, collected, self.config.domain_names)
        figures |= {f"time/{phase}": seconds for phase, seconds in self.seconds.items() if phase != "sync"}
        figures |= {
            "sync/seconds": self.seconds["sync"],
            "sync/bytes": float(self.bytes_sent),
            "tokens/trained": float(sum(part.num_tokens for part in learned)),
            "memory/peak_gib": peak_memory_gib(self.groups),
        }
        self.journal.step(self.step, figures, learned)
        self.stop_when_lost(learned)

    def stop_when_lost(self, learned: Sequence[BatchReport]) -> None:
        """An update without a finite gradient is left out; a run that leaves out one after the other is lost."""
        for part in learned:
            self.updates_left_out = 0 if part.metrics["update/applied"] else self.updates_left_out + 1
        if self.updates_left_out >= _MOST_LEFT_OUT:
            raise FloatingPointError(
                f"step {self.step}: the last {self.updates_left_out} updates were left out, for gradients that are not "
                "finite; start again from the last checkpoint with a lower optimizer.lr, or with model.dtype fp32"
            )

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds of a block to its phase of this step."""
        start = time.monotonic()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - start


def _update_figures(update: Update, contrast: Contrast | None) -> dict[str, float]:
    return {
        **update.metrics,
        "grad_norm": update.grad_norm,
        "lr": update.lr,
        "update/applied": float(update.applied),
        "loss/share": contrast.loss_share if contrast else 0.0,
        "loss/consolidate": contrast.loss_consolidate if contrast else 0.0,
        "contrast/anchors_share": float(contrast.anchors_share if contrast else 0),
        "contrast/anchors_consolidate": float(contrast.anchors_consolidate if contrast else 0),
    }
