"""Turn a scored batch into the loss L_policy + beta KL + lambda_cross L_cross_domain + lambda_in L_in_domain.

The contrastive terms are taken over the rollouts of ALL ranks, outside the model, and come back into a micro-batch's
loss as <z, dL/dz>. Shape legend: see megatron_mcpo.types.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_mcpo.algo import centering
from megatron_mcpo.algo.advantage import group_advantages
from megatron_mcpo.algo.contrastive import Contrast, reward_penalty
from megatron_mcpo.algo.policy_loss import policy_loss, token_weights
from megatron_mcpo.algo.surrogate import surrogate
from megatron_mcpo.config.config import Config
from megatron_mcpo.data.batch import rewards_of
from megatron_mcpo.distributed.gather import gather_rows
from megatron_mcpo.distributed.parallel import Groups
from megatron_mcpo.mcore.policy import LossFunction, LossInput, Policy
from megatron_mcpo.types import RolloutGroup, Routes, Scores, TrainBatch


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A batch with the scores of policy and reference, before anything is learned from it.

    old: None where config.scores_policy is False: the update's own forward pass gives the same scores
    """

    groups: Sequence[RolloutGroup]
    batch: TrainBatch
    old: Scores | None
    reference_logp_R: Tensor | None

    @property
    def routes(self) -> Routes | None:
        """Return the experts that the policy's scoring pass used, where they are replayed."""
        return self.old.routes if self.old else None


@dataclass(frozen=True, kw_only=True)
class Contrasted:
    """Representations of all rollouts, made by the policy's weights of `version`, and their contrastive terms.

    head_MD: the head's output; z_MD: what pairs are made of, the same unless contrastive.center is on
    """

    head_MD: Tensor
    z_MD: Tensor
    contrast: Contrast
    version: int


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A scored batch with everything that its loss needs.

    advantages_M: of all rollouts; contrasted: None where the contrastive terms are switched off
    """

    scored: Scored
    advantages_M: Tensor
    contrasted: Contrasted | None

    @property
    def representation_version(self) -> int | None:
        """Return the version of the weights that the gradient on the representations was taken at; None without one."""
        return self.contrasted.version if self.contrasted else None


class Objective:
    """MCPO (arXiv 2605.25443). All ranks call its methods together."""

    def __init__(self, config: Config, policy: Policy, groups: Groups):
        self.config = config
        self.policy = policy
        self.groups = groups

    def prepare(self, scored: Scored, *, step: int) -> Prepared:
        """Return the batch with its advantages and contrastive terms. Raises FloatingPointError as `contrast`."""
        contrasted = self.contrast(scored, step=step)
        return Prepared(scored=scored, advantages_M=self._advantages(scored, contrasted), contrasted=contrasted)

    def contrast(self, scored: Scored, *, step: int) -> Contrasted | None:
        """Return the contrastive terms at the policy's present weights; None where they are switched off.

        Costs a forward pass where the weights have moved since the batch was scored. Raises FloatingPointError, the
        same on every rank, for representations that are not finite.
        """
        settings = self.config.contrastive
        if not settings.enabled:
            return None
        scores = scored.old
        if scores is None or scores.version != self.policy.version:
            scores = self.policy.score(scored.batch, routes=scored.routes)
        assert scores.z_ND is not None
        head_MD = gather_rows(scores.z_ND, scored.batch, self.groups)
        self._check_finite(head_MD, scored.batch, step)
        z_MD, contrast = centering.contrast(head_MD, scored.batch.labels.to(head_MD.device), settings)
        return Contrasted(head_MD=head_MD, z_MD=z_MD, contrast=contrast, version=scores.version)

    def _advantages(self, scored: Scored, contrasted: Contrasted | None) -> Tensor:
        """Return advantages [M] of the rewards, from which mode "reward" subtracts the contrastive terms."""
        settings, labels = self.config.contrastive, scored.batch.labels
        rewards_M = rewards_of(scored.groups)
        if contrasted is not None and settings.mode == "reward":
            rewards_M += reward_penalty(contrasted.contrast, settings).cpu()
        return group_advantages(rewards_M, labels.prompt_M, labels.domain_M, kind=self.config.algorithm.advantage)

    def loss(self, prepared: Prepared, *, domain: int | None = None) -> LossFunction:
        """Return the function that computes a micro-batch's share of the objective.

        domain: number of the only domain whose tokens count in the policy and KL terms; None: all count
        """
        scored, settings = prepared.scored, self.config.algorithm
        batch, old, device = scored.batch, scored.old, self.policy.device
        rollout_R = batch.rollout_R
        advantages_R = prepared.advantages_M[batch.rows_N][rollout_R].to(device)
        engine_logp_R = batch.engine_logp_R.to(device)
        weights_R = token_weights(
            batch.response_lens_N,
            aggregation=settings.aggregation,
            num_tokens=batch.num_response_tokens,
            num_rollouts=len(batch.labels),
            max_response_tokens=self.config.rollout.max_response_tokens,
        )
        if domain is not None:
            weights_R = weights_R * (batch.labels.domain_M[batch.rows_N] == domain)[rollout_R]
        rollout_R, weights_R = rollout_R.to(device), weights_R.to(device)
        contrasted = prepared.contrasted
        contrastive_share = self.contrastive_loss(scored, contrasted.contrast) if contrasted else None

        def share(x: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
            r = x.response_r
            term = policy_loss(
                logp_R=x.logp_r,
                old_logp_R=x.logp_r.detach() if old is None else old.logp_R[r],
                engine_logp_R=engine_logp_R[r],
                ref_logp_R=None if scored.reference_logp_R is None else scored.reference_logp_R[r],
                advantages_R=advantages_R[r],
                weights_R=weights_R[r],
                rollout_R=rollout_R[r],
                num_tokens=batch.num_response_tokens,
                settings=settings,
            )
            return term.loss + (contrastive_share(x)[0] if contrastive_share else 0.0), term.metrics

        return share

    def contrastive_loss(self, scored: Scored, contrast: Contrast) -> LossFunction:
        """Return the function that computes a micro-batch's share of the weighted contrastive terms alone."""
        grad_z_ND = contrast.grad_z_MD[scored.batch.rows_N.to(contrast.grad_z_MD.device)]

        def share(x: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
            assert x.z_nD is not None
            return surrogate(x.z_nD, grad_z_ND[list(x.rollouts)]), {}

        return share

    def _check_finite(self, head_MD: Tensor, batch: TrainBatch, step: int) -> None:
        """Raise where a representation is not finite: the same error on every rank, since each sees all of them."""
        bad = (~head_MD.isfinite().all(dim=1)).nonzero()[:, 0].tolist()
        if not bad:
            return
        ranks = [rank for rank, rows in enumerate(batch.rank_rows) if not set(rows).isdisjoint(bad)]
        domains = [self.config.domain_names[number] for number in batch.labels.domain_M[bad].unique().tolist()]
        raise FloatingPointError(
            f"step {step}: representations of {len(bad)} of {len(head_MD)} rollouts are not finite (data-parallel "
            f"ranks {ranks}, domains {', '.join(domains)}); start again from the last checkpoint with a lower "
            "optimizer.lr, or with model.dtype fp32"
        )
