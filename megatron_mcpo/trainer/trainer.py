"""Run the training loop, the only place that knows the order of the stages. Shape legend: see megatron_mcpo.types."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megatron_mcpo import progress
from megatron_mcpo.algo.contrastive import Contrast
from megatron_mcpo.config.config import Config
from megatron_mcpo.data.batch import minibatches
from megatron_mcpo.data.domains import Domain
from megatron_mcpo.distributed.gather import gather_rows
from megatron_mcpo.distributed.memory import look, peak_memory_gib, trim
from megatron_mcpo.distributed.parallel import Groups
from megatron_mcpo.distributed.peers import anywhere
from megatron_mcpo.distributed.preemption import asked_to_stop
from megatron_mcpo.mcore.checkpoint import Checkpoints
from megatron_mcpo.mcore.policy import Policy, Reference
from megatron_mcpo.reporting.expert_load import expert_load
from megatron_mcpo.reporting.run_logger import RunLogger
from megatron_mcpo.reporting.step_metrics import BatchReport, rollout_stats, step_metrics
from megatron_mcpo.rewards.scorer import check_error_rate
from megatron_mcpo.rollout.engine import Engine
from megatron_mcpo.trainer.collector import Collector
from megatron_mcpo.trainer.dynamic_sampling import Collected
from megatron_mcpo.trainer.engine_check import EngineCheck
from megatron_mcpo.trainer.evaluation import evaluate, left_out
from megatron_mcpo.trainer.exchange import rank_batch, texts_on_first
from megatron_mcpo.trainer.gradient_diagnostics import domain_gradients, term_gradients
from megatron_mcpo.trainer.objective import Objective, Prepared, Scored
from megatron_mcpo.trainer.rollout_stream import RolloutStream
from megatron_mcpo.trainer.unfinished import FILE, encode
from megatron_mcpo.types import RolloutGroup, Update
from megatron_mcpo.weights.reshard_sync import WeightSync

_MOST_SKIPPED = 5
"""Updates without a finite gradient, one after the other, before a run stops."""


class Trainer:
    """MCPO (arXiv 2605.25443): sample, score, contrast, update, sync. All ranks run it together."""

    def __init__(
        self,
        config: Config,
        *,
        groups: Groups,
        policy: Policy,
        reference: Reference | None,
        engine: Engine,
        weight_sync: WeightSync,
        collector: Collector,
        engine_check: EngineCheck,
        rollouts: RolloutStream,
        domains: Sequence[Domain],
        run_logger: RunLogger,
        checkpoints: Checkpoints,
        first_step: int,
    ):
        self.config = config
        self.groups = groups
        self.policy = policy
        self.objective = Objective(config, policy, groups)
        self.reference = reference
        self.engine = engine
        self.weight_sync = weight_sync
        self.collector = collector
        self.engine_check = engine_check
        self.rollouts = rollouts
        self.domains = domains
        self.run_logger = run_logger
        self.checkpoints = checkpoints
        self.step = self.saved = first_step
        self.stopped = False
        self.seconds: dict[str, float] = {}
        self.bytes_received = 0
        self.updates_skipped = 0

    def run(self) -> None:
        """Train to the last step, or until the job is preempted; then wait until the checkpoint is on disk."""
        config = self.config
        self.sync_weights(verify=True)
        self.rollouts.start_ahead()
        self.check_engine()
        if self.is_due(config.evaluation.every) or self.is_last:
            self.evaluate()
        while self.step < config.run.steps and not self.must_stop():
            self.step += 1
            progress.at_step(self.step)
            self.seconds = {}
            with self.timed("step"):
                collected = self.collect()
                scored = [self.score(part) for part in minibatches(collected.groups, config.batch.minibatches)]
                learned = [self.learn(part) for part in scored]
                trim()
                self.sync_weights(verify=config.engine.verify_sync)
                self.rollouts.start_ahead()
            self.log(collected, learned)
            if self.step % config.engine.engine_check_every == 0:
                self.check_engine()
            self.checkpoints.advance()
            if self.is_due(config.run.checkpoint_every) or self.is_last:
                self.checkpoint()
            if self.is_due(config.evaluation.every) or self.is_last:
                self.evaluate()
        self.checkpoint()
        with progress.phase("save"):
            self.checkpoints.finish()

    def is_due(self, every: int) -> bool:
        """Return whether this step is a multiple of `every`; never with 0."""
        return every > 0 and self.step % every == 0

    @property
    def is_last(self) -> bool:
        """Return whether this step is the last one."""
        return self.step == self.config.run.steps

    def must_stop(self) -> bool:
        """Return whether any rank was asked to stop: the same on every rank, and it stays True. Collective."""
        self.stopped = self.stopped or anywhere(asked_to_stop(), self.groups)
        return self.stopped

    def collect(self) -> Collected:
        """Get the step's rollouts, verified; an engine in the ranks then frees its memory for the trainer."""
        config = self.config
        with self.timed("wait_for_rollouts" if self.rollouts.is_ahead else "rollout"):
            collected = self.rollouts.next(self.step)
        with self.timed("sleep"):
            self.engine.sleep()
        check_error_rate(
            collected.sampled, domain_names=config.domain_names, max_error_rate=config.rewards.max_error_rate
        )
        return collected

    def score(self, groups: Sequence[RolloutGroup]) -> Scored:
        """Return the batch with the log-probs of policy and reference, before anything is learned from it."""
        with self.timed("exchange"):
            batch = rank_batch(
                groups, self.groups, share_prompts=self.policy.shares_prompts, routing=self.policy.routing
            )
        with self.timed("score"):
            old = self.policy.score(batch) if self.config.scores_policy else None
            reference_logp_R = self.reference.score(batch).logp_R if self.reference else None
        return Scored(groups=groups, batch=batch, old=old, reference_logp_R=reference_logp_R)

    def learn(self, scored: Scored) -> BatchReport:
        """Take one optimizer step on the policy term, the KL term and both contrastive terms."""
        batch = scored.batch
        with self.timed("update"):
            prepared = self.objective.prepare(scored, step=self.step)
        diagnosis = self.diagnose(prepared)
        with self.timed("update"):
            loss = self.objective.loss(prepared)
            version = prepared.representation_version
            update = self.policy.update(batch, loss, representation_version=version, routes=scored.routes)
        contrasted, old = prepared.contrasted, scored.old or update.scores
        stats_MK = gather_rows(rollout_stats(batch, old, scored.reference_logp_R), batch, self.groups)
        return BatchReport(
            groups=scored.groups,
            advantages_M=prepared.advantages_M,
            stats_MK=stats_MK,
            z_MD=contrasted.z_MD if contrasted else None,
            contrast=contrasted.contrast if contrasted else None,
            labels=batch.labels,
            num_tokens=batch.num_tokens,
            metrics=_update_metrics(update, contrasted.contrast if contrasted else None),
            diagnosis=diagnosis,
            texts=texts_on_first(scored.groups, self.groups),
        )

    def diagnose(self, prepared: Prepared) -> dict[str, float]:
        """Measure every few steps how strong each term's gradient is, and whether terms and domains agree."""
        reaches_model = prepared.contrasted is not None and self.config.contrastive.mode == "loss"
        measures = []
        if reaches_model and self.is_due(self.config.contrastive.diagnose_every):
            measures.append(term_gradients)
        if self.is_due(self.config.algorithm.diagnose_every):
            measures.append(domain_gradients)
        found: dict[str, float] = {}
        for measure in measures:
            with self.timed("diagnose"):
                found |= measure(self.objective, self.policy, prepared)
        return found

    def sync_weights(self, *, verify: bool) -> None:
        """Bring the policy's weights into the engine. verify: stop the run where it then holds other values."""
        with self.timed("wake"):
            self.engine.wake()
        with self.timed("sync"):
            self.bytes_received = self.weight_sync.sync(self.step).received
        if verify:
            with self.timed("verify"):
                compared = self.engine_check.compare_weights()
            self.run_logger.note(f"weight sync verified: {compared} ({self.seconds['verify']:.1f} s)")

    def check_engine(self) -> None:
        """Stop the run where the engine doesn't sample from the weights that are trained."""
        with progress.phase("engine check"):
            mismatch = self.engine_check.check()
        self.run_logger.note(f"engine/trainer log-prob mismatch: {mismatch}")

    def evaluate(self) -> None:
        """Evaluate, unless this step was evaluated before the resume or the job is stopping."""
        if not self.run_logger.has_evaluation(self.step) and not self.must_stop():
            with progress.phase("evaluation"):
                metrics = evaluate(self.collector, self.domains, self.config)
            self.run_logger.evaluation(self.step, metrics)
            for warning in left_out(metrics, self.domains):
                self.run_logger.note(warning)

    def checkpoint(self) -> None:
        """Save a checkpoint, unless this step has one."""
        if self.saved < self.step:
            with progress.phase("save"):
                state = {"stream": self.rollouts.prompts.state_dict(), "rollouts": self.rollouts.state_dict()}
                unfinished = self.rollouts.unfinished()
                self.checkpoints.save(self.step, state, {FILE: encode(unfinished)} if unfinished else {})
            trim()
            self.saved = self.step

    def log(self, collected: Collected, learned: Sequence[BatchReport]) -> None:
        """Log the metrics of a step, then stop the run where its updates are not finite."""
        metrics = step_metrics(learned, collected.sampled, self.config.domain_names) | collected.metrics
        metrics |= self.rollouts.metrics
        metrics |= {f"time/{phase}": seconds for phase, seconds in self.seconds.items() if phase != "sync"}
        metrics |= {
            "sync/seconds": self.seconds["sync"],
            "sync/bytes": float(self.bytes_received),
            "tokens/trained": float(sum(part.num_tokens for part in learned)),
            "memory/peak_gib": peak_memory_gib(self.groups),
        }
        self.run_logger.step(self.step, metrics, learned)
        self.stop_on_skipped_updates(learned)

    def stop_on_skipped_updates(self, learned: Sequence[BatchReport]) -> None:
        """Stop a run that skips one update after the other: those without a finite gradient are skipped."""
        for part in learned:
            self.updates_skipped = 0 if part.metrics["update/applied"] else self.updates_skipped + 1
        if self.updates_skipped >= _MOST_SKIPPED:
            raise FloatingPointError(
                f"step {self.step}: the last {self.updates_skipped} updates were skipped because gradients are not "
                "finite; start again from the last checkpoint with a lower optimizer.lr, or with model.dtype fp32"
            )

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds of a block to its phase of this step."""
        start = time.monotonic()
        with progress.phase(phase):
            yield
            look()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - start


def _update_metrics(update: Update, contrast: Contrast | None) -> dict[str, float]:
    metrics = {key: value for key, value in update.metrics.items() if key != "importance/square"}
    square = update.metrics["importance/square"]
    return {
        **metrics,
        "importance/effective": metrics["importance/weight"] ** 2 / square if square else 0.0,
        "grad_norm": update.grad_norm,
        "lr": update.lr,
        "head_lr": update.head_lr,
        "update/applied": float(update.applied),
        **(expert_load(update.load_XE) if update.load_XE is not None else {}),
        "contrast/anchors_cross_domain": float(contrast.anchors_cross_domain if contrast else 0),
        "contrast/anchors_in_domain": float(contrast.anchors_in_domain if contrast else 0),
    }
