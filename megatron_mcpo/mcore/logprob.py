"""Log-probs and entropies of a vocabulary that is split over the tensor group, without gathering it.

Megatron's own vocab_parallel_cross_entropy takes every rank's share to be equally large, so padded rows would take
part in its softmax, and it has no entropy. Shape legend: see megatron_mcpo.types; V here is the rank's share.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def token_logprobs(
    logits_RV: Tensor, target_R: Tensor, *, first_token: int, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """(log-probs [R] of the targets, differentiable; entropies [R] in nats, not differentiable), both fp32.

    logits_RV: this rank's columns, any float dtype; they stand for the tokens first_token, first_token + 1, ...
    target_R: token ids in the whole vocabulary
    Two all-reduces over `group`: the row maxima, and three numbers a row.
    """
    return _TokenLogProbs.apply(logits_RV, target_R, first_token, group)


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_RV: Tensor, target_R: Tensor, first_token: int, group: ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        peak_R = logits_RV.amax(-1).float()
        dist.all_reduce(peak_R, op=dist.ReduceOp.MAX, group=group)
        shifted_RV = logits_RV.float() - peak_R.unsqueeze(1)
        exp_RV = shifted_RV.exp()

        column_R = target_R - first_token
        mine_R = (column_R >= 0) & (column_R < logits_RV.shape[1])
        column_R = column_R.clamp(0, logits_RV.shape[1] - 1)
        target_logit_R = shifted_RV.gather(1, column_R.unsqueeze(1)).squeeze(1) * mine_R
        sums = torch.stack([exp_RV.sum(-1), (exp_RV * shifted_RV).sum(-1), target_logit_R])
        dist.all_reduce(sums, group=group)
        normalizer_R, weighted_R, target_logit_R = sums

        ctx.save_for_backward(exp_RV.div_(normalizer_R.unsqueeze(1)), column_R, mine_R)
        ctx.dtype = logits_RV.dtype
        log_normalizer_R = normalizer_R.log()
        entropy_R = log_normalizer_R - weighted_R / normalizer_R
        ctx.mark_non_differentiable(entropy_R)
        return target_logit_R - log_normalizer_R, entropy_R

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        probs_RV, column_R, mine_R = ctx.saved_tensors
        grad_R = grads[0]
        grad_RV = probs_RV * -grad_R.unsqueeze(1)
        grad_RV.scatter_add_(1, column_R.unsqueeze(1), (grad_R * mine_R).unsqueeze(1))
        return grad_RV.to(ctx.dtype), None, None, None
