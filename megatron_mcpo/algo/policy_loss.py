"""The policy term: clipped ratio, truncated importance weight, KL to the reference. Shape legend: types.py.

Everything is a sum over response tokens divided by a count that the caller knows for the WHOLE step. Adding the
results of all micro-batches and all data-parallel ranks therefore gives the step's value, however it was divided.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to this before exp, from above only: exp overflows in fp32 at 88, and inf times a zero
gradient is NaN. Reaching it takes a token that was drawn with a probability below e^-20 = 2e-9, a fault rather than
a sample; such a token has a finite loss and no gradient. There is no lower clamp, because exp underflows harmlessly:
the common case of a policy far more certain than its reference keeps its exact gradient.
"""


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """Part of the step's policy loss.

    loss: scalar with graph
    metrics: 0-d tensors without graph, already divided by the step's number of tokens, so they add up like the loss
        loss/policy, loss/kl   the two parts of the loss (the KL with its weight)
        clip_fraction          share of tokens whose gradient the clip has switched off
        ratio                  mean of policy / old policy
        importance/weight      mean truncated weight of the tokens (1 without a cap)
        importance/capped      share of tokens whose weight is the cap
    """

    loss: Tensor
    metrics: dict[str, Tensor]


def policy_loss(
    *,
    logp_R: Tensor,
    old_logp_R: Tensor,
    engine_logp_R: Tensor,
    ref_logp_R: Tensor | None,
    advantages_R: Tensor,
    clip_low: float,
    clip_high: float,
    kl_weight: float,
    importance_cap: float | None,
    num_tokens: int,
) -> PolicyLoss:
    """Sum over R tokens of [w * PPO-clip + kl_weight * k3], divided by `num_tokens`.

    logp_R: log-probs of the policy, with graph; old_, engine_, ref_: without, of the weights that scored the batch, of
    the engine's sampling distribution and of the reference; all fp32 and in nats
    advantages_R: each rollout's advantage, repeated over its tokens
    num_tokens: response tokens of the step over all micro-batches and ranks, not R

    PPO-clip: -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), rho = policy / old policy (arXiv 1707.06347).
    k3: e^d - d - 1, d = reference - policy log-prob (Schulman, "Approximating KL divergence").
    w: min(old policy / engine, importance_cap), a constant of the batch; 1 where `importance_cap` is None.

    R = 0 gives a zero that is connected to `logp_R`, so that gradient reductions see every rank.
    """
    assert logp_R.shape == old_logp_R.shape == engine_logp_R.shape == advantages_R.shape and logp_R.ndim == 1
    assert num_tokens > 0
    assert ref_logp_R is not None or kl_weight == 0, "a KL term needs the reference's log-probs"

    ratio_R = _safe_exp(logp_R - old_logp_R.detach())
    clipped_R = ratio_R.clamp(1 - clip_low, 1 + clip_high)
    objective_R = torch.minimum(ratio_R * advantages_R, clipped_R * advantages_R)
    clipping_R = (ratio_R * advantages_R).detach() > (clipped_R * advantages_R).detach()

    weight_R, capped_R = _importance(old_logp_R - engine_logp_R, importance_cap)
    policy = -(weight_R * objective_R).sum() / num_tokens
    kl = policy.new_zeros(()) if ref_logp_R is None else kl_weight * k3(logp_R, ref_logp_R).sum() / num_tokens
    return PolicyLoss(
        loss=policy + kl,
        metrics={
            "loss/policy": policy.detach(),
            "loss/kl": kl.detach(),
            "clip_fraction": clipping_R.sum() / num_tokens,
            "ratio": ratio_R.detach().sum() / num_tokens,
            "importance/weight": weight_R.sum() / num_tokens,
            "importance/capped": capped_R.sum() / num_tokens,
        },
    )


def k3(logp_R: Tensor, ref_logp_R: Tensor) -> Tensor:
    """Each token's estimate of KL(policy || reference) in nats: e^d - 1 - d, d = reference - policy; not negative."""
    difference_R = (ref_logp_R.detach() - logp_R).clamp(max=_MAX_LOG_RATIO)
    # Near d = 0 (the first steps) e^d - 1 would lose the digits that make up the value.
    return torch.expm1(difference_R) - difference_R


def _importance(log_weight_R: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
    """Truncated importance weights, and which of them are the cap; clamping the logarithm can't overflow."""
    log_weight_R = log_weight_R.detach()
    if cap is None:
        return torch.ones_like(log_weight_R), torch.zeros_like(log_weight_R, dtype=torch.bool)
    log_cap = math.log(cap)
    return log_weight_R.clamp(max=log_cap).exp(), log_weight_R > log_cap


def _safe_exp(log_ratio_R: Tensor) -> Tensor:
    return log_ratio_R.clamp(max=_MAX_LOG_RATIO).exp()
