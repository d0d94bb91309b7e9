"""The loop: the only module that knows the order of the stages. Shape legend: see megatron_mcpo.types."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from megatron_mcpo.algo.advantage import group_advantages
from megatron_mcpo.algo.contrastive import Contrast, contrastive
from megatron_mcpo.algo.policy_loss import policy_loss
from megatron_mcpo.algo.surrogate import surrogate
from megatron_mcpo.batch import make_batch, rewards_of
from megatron_mcpo.canary import Canary
from megatron_mcpo.collect import Collector, Sampling
from megatron_mcpo.config import Config
from megatron_mcpo.data.domains import Domain
from megatron_mcpo.data.stream import PromptStream
from megatron_mcpo.evaluate import evaluate
from megatron_mcpo.gather import gather_rows
from megatron_mcpo.journal import Journal
from megatron_mcpo.mcore.policy import LossFunction, LossInput, Policy, Reference
from megatron_mcpo.memory import peak_memory_gib, trim
from megatron_mcpo.parallel import Groups
from megatron_mcpo.report import BatchReport, rollout_stats, step_figures
from megatron_mcpo.rewards.scorer import check_error_rate
from megatron_mcpo.rollout.engine import Engine
from megatron_mcpo.types import RolloutGroup, Scores, TrainBatch, Update

_STEPS_PER_SEED = 1_000_003
"""Two runs with neighbouring seeds share no sampling seed before this many steps."""

_MOST_LEFT_OUT = 5


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A batch with what policy and reference say of it."""

    groups: Sequence[RolloutGroup]
    advantages_PG: Tensor
    batch: TrainBatch
    old: Scores
    reference_logp_R: Tensor | None


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
        """Advantages, and the log-probs of policy and reference before anything is learned."""
        advantages_PG = group_advantages(rewards_of(groups))
        batch = make_batch(
            groups,
            advantages_PG,
            pass_threshold=self.config.algorithm.pass_threshold,
            num_data_ranks=self.groups.layout.data,
            data_rank=self.groups.data_rank,
            share_prompts=self.policy.shares_prompts,
        )
        with self.timed("score"):
            old = self.policy.score(batch)
            reference_logp_R = self.reference.score(batch).logp_R if self.reference else None
        return Scored(
            groups=groups, advantages_PG=advantages_PG, batch=batch, old=old, reference_logp_R=reference_logp_R
        )

    def learn(self, scored: Scored) -> BatchReport:
        """One optimizer step on the policy term, the KL term and both contrastive terms."""
        batch = scored.batch
        stats_MK = gather_rows(rollout_stats(batch, scored.old, scored.reference_logp_R), batch, self.groups)
        with self.timed("update"):
            z_MD, contrast = self.contrast(scored)
            update = self.policy.update(batch, self.loss(scored, contrast))
        return BatchReport(
            groups=scored.groups,
            advantages_PG=scored.advantages_PG,
            stats_MK=stats_MK,
            z_MD=z_MD,
            contrast=contrast,
            num_tokens=batch.num_tokens,
            metrics=_update_figures(update, contrast),
        )

    def contrast(self, scored: Scored) -> tuple[Tensor | None, Contrast | None]:
        """Representations of all rollouts and the contrastive terms' gradient on them, at the present weights."""
        settings = self.config.contrastive
        if not settings.enabled:
            return None, None
        moved = scored.old.version != self.policy.version
        z_ND = (self.policy.score(scored.batch) if moved else scored.old).z_ND
        assert z_ND is not None
        z_MD = gather_rows(z_ND, scored.batch, self.groups)
        return z_MD, contrastive(
            z_MD,
            scored.batch.keys.to(z_MD.device),
            share_weight=settings.share_weight,
            consolidate_weight=settings.consolidate_weight,
            temperature=settings.temperature,
            top_k=settings.top_k,
        )

    def loss(self, scored: Scored, contrast: Contrast | None) -> LossFunction:
        """A micro-batch's share of L = L_policy + beta KL + <z, dL_contrast/dz>."""
        batch, settings = scored.batch, self.config.algorithm
        device = scored.old.logp_R.device
        advantages_R = batch.advantages_N[batch.rollout_R].to(device)
        engine_logp_R = batch.engine_logp_R.to(device)
        grad_z_ND = contrast.grad_z_MD[batch.rows_N.to(device)] if contrast else None

        def share(x: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
            r = x.response_r
            term = policy_loss(
                logp_R=x.logp_r,
                old_logp_R=scored.old.logp_R[r],
                engine_logp_R=engine_logp_R[r],
                ref_logp_R=None if scored.reference_logp_R is None else scored.reference_logp_R[r],
                advantages_R=advantages_R[r],
                clip_low=settings.clip_low,
                clip_high=settings.clip_high,
                kl_weight=settings.kl_weight,
                importance_cap=settings.importance_cap,
                num_tokens=batch.num_response_tokens,
            )
            if grad_z_ND is None or x.z_nD is None:
                return term.loss, term.metrics
            return term.loss + surrogate(x.z_nD, grad_z_ND[list(x.rollouts)]), term.metrics

        return share

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
