"""Compute the policy term: clipped ratio, importance weight, KL to the reference. Shape legend: types.py.

Everything is a sum over response tokens with weights that are known for the WHOLE step. Adding the results of all
micro-batches and all data-parallel ranks therefore gives the step's value, however it was divided.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_mcpo.algo.groups import group_sums
from megatron_mcpo.config.schema import AlgorithmConfig

_MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to this before exp, from above only: exp overflows in fp32 at 88, and inf times a zero
gradient is NaN. Only a token drawn with a probability below e^-20 = 2e-9 reaches it, which is a fault rather than a
sample; such a token has a finite loss and no gradient. There is no lower clamp, because exp underflows harmlessly:
the common case of a policy far more certain than its reference keeps its exact gradient.
"""


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """Part of the step's policy loss.

    loss: scalar with graph
    metrics: 0-d tensors without graph; they add up over micro-batches and ranks like the loss
        loss/policy, loss/kl   the two parts of the loss (the KL with its weight)
        and token means:
        clip_fraction          share of tokens whose ratio the clip has replaced
        ratio                  policy / old policy (of the whole rollout for gspo)
        importance/weight      importance weight (1 where it is off)
        importance/capped      share of tokens whose weight is the cap or, with mask and reject, 0
        importance/square      square of the importance weight
    """

    loss: Tensor
    metrics: dict[str, Tensor]


def token_weights(
    response_lens_N: Tensor,
    *,
    aggregation: Literal["token_mean", "seq_mean_token_mean", "dr_grpo"],
    num_tokens: int,
    num_rollouts: int,
    max_response_tokens: int,
) -> Tensor:
    """Return the weight of each response token of these rollouts in the step's loss: fp32 [R].

    token_mean: 1 / num_tokens (DAPO, arXiv 2503.14476); seq_mean_token_mean: 1 / (num_rollouts * length) (GRPO);
    dr_grpo: 1 / (num_rollouts * max_response_tokens) (arXiv 2503.20783). The counts are the whole step's.
    """
    weight_N = torch.ones(len(response_lens_N), dtype=torch.float64)
    match aggregation:
        case "token_mean":
            weight_N /= max(1, num_tokens)
        case "seq_mean_token_mean":
            weight_N /= response_lens_N.clamp(min=1) * num_rollouts
        case "dr_grpo":
            weight_N /= num_rollouts * max_response_tokens
    return weight_N.float().repeat_interleave(response_lens_N)


def policy_loss(
    *,
    logp_R: Tensor,
    old_logp_R: Tensor,
    engine_logp_R: Tensor,
    ref_logp_R: Tensor | None,
    advantages_R: Tensor,
    weights_R: Tensor,
    rollout_R: Tensor,
    num_tokens: int,
    settings: AlgorithmConfig,
) -> PolicyLoss:
    """Return the weighted sum over R tokens of importance * clipped objective + kl_weight * KL estimate.

    logp_R: log-probs of the policy, with graph; old_, engine_, ref_: without, of the weights that scored the batch, of
    the engine's sampling distribution and of the reference; all fp32 and in nats
    advantages_R: each rollout's advantage, repeated over its tokens; weights_R: see `token_weights`
    rollout_R: int64, which rollout each token belongs to; gspo needs a rollout's tokens together in one call
    num_tokens: response tokens of the step over all micro-batches and ranks, not R, for the metrics

    ppo: -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), rho = policy / old policy (arXiv 1707.06347).
    gspo: the same with the geometric mean of a rollout's rho in every token's place (arXiv 2507.18071).
    cispo: -clip(rho) A log policy, the clipped ratio without gradient (arXiv 2506.13585).

    R = 0 gives a zero that is connected to `logp_R`, so that gradient reductions see every rank.
    """
    assert logp_R.shape == old_logp_R.shape == engine_logp_R.shape == advantages_R.shape == weights_R.shape
    assert logp_R.ndim == 1
    assert ref_logp_R is not None or settings.kl_weight == 0, "a KL term needs the reference's log-probs"

    num_tokens = max(1, num_tokens)  # every response of the step may be empty
    log_ratio_R = logp_R - old_logp_R.detach()
    if settings.clip == "gspo":
        log_ratio_R = group_sums(log_ratio_R, rollout_R) / group_sums(torch.ones_like(log_ratio_R), rollout_R)
    ratio_R = log_ratio_R.clamp(max=_MAX_LOG_RATIO).exp()
    clipped_R = ratio_R.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    if settings.clip == "cispo":
        objective_R = clipped_R.detach() * advantages_R * logp_R
        clipping_R = clipped_R.detach() != ratio_R.detach()
    else:
        objective_R = torch.minimum(ratio_R * advantages_R, clipped_R * advantages_R)
        clipping_R = (ratio_R * advantages_R).detach() > (clipped_R * advantages_R).detach()

    importance_R, capped_R = _importance((old_logp_R - engine_logp_R).detach(), rollout_R, settings)
    policy = -(weights_R * importance_R * objective_R).sum()
    kl = policy.new_zeros(())
    if ref_logp_R is not None:
        kl = settings.kl_weight * (weights_R * kl_estimate(logp_R, ref_logp_R, settings.kl_estimator)).sum()
    return PolicyLoss(
        loss=policy + kl,
        metrics={
            "loss/policy": policy.detach(),
            "loss/kl": kl.detach(),
            "clip_fraction": clipping_R.sum() / num_tokens,
            "ratio": ratio_R.detach().sum() / num_tokens,
            "importance/weight": importance_R.sum() / num_tokens,
            "importance/capped": capped_R.sum() / num_tokens,
            "importance/square": importance_R.square().sum() / num_tokens,
        },
    )


def kl_estimate(logp_R: Tensor, ref_logp_R: Tensor, kind: Literal["k2", "k3"] = "k3") -> Tensor:
    """Return each token's estimate of KL(policy || reference) in nats (Schulman, "Approximating KL divergence").

    With d = reference - policy log-prob: k2 = d^2 / 2, k3 = e^d - 1 - d. In expectation over the policy's tokens the
    gradient of k2 is that of KL(policy || reference), and the gradient of k3 that of KL(reference || policy). The
    estimator k1 = -d is not offered: the expectation of its gradient is zero, so it would only add noise to a loss.
    """
    difference_R = (ref_logp_R.detach() - logp_R).clamp(max=_MAX_LOG_RATIO)
    match kind:
        case "k2":
            return difference_R.square() / 2
        case "k3":
            # Near d = 0 (the first steps) e^d - 1 would lose the digits that make up the value.
            return torch.expm1(difference_R) - difference_R


def _importance(log_weight_R: Tensor, rollout_R: Tensor, settings: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """Return the importance weights of the tokens, and which of them are capped or dropped.

    reject drops a rollout by the geometric mean of its weights (the sequence ratio of arXiv 2507.18071).
    """
    log_cap, log_floor = math.log(settings.importance_cap), math.log(settings.importance_floor)
    match settings.importance:
        case "off":
            return torch.ones_like(log_weight_R), torch.zeros_like(log_weight_R, dtype=torch.bool)
        case "truncate":
            # Clamping the logarithm can't overflow.
            return log_weight_R.clamp(max=log_cap).exp(), log_weight_R > log_cap
        case "mask":
            outside_R = (log_weight_R > log_cap) | (log_weight_R < log_floor)
            return log_weight_R.clamp(max=log_cap).exp().masked_fill(outside_R, 0.0), outside_R
        case "reject":
            count_R = group_sums(torch.ones_like(log_weight_R), rollout_R)
            mean_R = group_sums(log_weight_R, rollout_R) / count_R
            rejected_R = mean_R.abs() > settings.rejection_limit
            weight_R = log_weight_R.clamp(max=log_cap).exp().masked_fill(rejected_R, 0.0)
            return weight_R, rejected_R | (log_weight_R > log_cap)
