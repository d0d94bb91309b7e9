"""Compute log-probs and entropies over a vocabulary that is split over the tensor group, without all logits at once.

The output layer is part of the computation, so that logits exist for some columns of the vocabulary at a time, once in
the forward pass and once more in the backward pass: the online softmax of Milakov & Gimelshein
(https://arxiv.org/abs/1805.02867, algorithm 3). Megatron's own vocab_parallel_cross_entropy keeps an fp32 copy of all
logits, takes padded rows into its softmax and has no entropy.

Shape legend: see megatron_mcpo.types; V here is the rank's share, and c a chunk of it.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

MOST_LOGITS = 2**23
"""The most logits that exist at one time; a few fp32 tensors of this size are held."""


def linear_logprobs(
    hidden_RH: Tensor, weight_VH: Tensor, target_R: Tensor, *, first_token: int, temperature: float, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Return log-probs [R] of the targets (differentiable) and entropies [R] in nats (not differentiable), both fp32.

    Two all-reduces over `group`: the row maxima, and three numbers per row. Products are in the dtype of `weight_VH`,
    sums in fp32. Beside inputs and their gradients it holds O(R H) and a few times `MOST_LOGITS` numbers.

    Args:
        hidden_RH: The output layer's input, the same on all ranks of `group`; its gradient still has to be summed over
            them.
        weight_VH: This rank's rows of the output layer, for the tokens first_token, first_token + 1, ...
        target_R: Token ids in the whole vocabulary.
        first_token: The token of the first row of `weight_VH`.
        temperature: Logits are divided by it.
        group: The ranks over which the vocabulary is split.
    """
    return _LinearLogProbs.apply(hidden_RH, weight_VH, target_R, first_token, temperature, group)


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_RH: Tensor,
        weight_VH: Tensor,
        target_R: Tensor,
        first_token: int,
        temperature: float,
        group: ProcessGroup,
    ) -> tuple[Tensor, Tensor]:
        peak_R = hidden_RH.new_full((len(hidden_RH),), torch.finfo(torch.float32).min, dtype=torch.float32)
        normalizer_R, weighted_R, target_logit_R = torch.zeros_like(peak_R).repeat(3, 1)
        for first, weight_cH in _chunks(weight_VH, len(hidden_RH)):
            logits_Rc = _logits(hidden_RH, weight_cH, temperature)
            column_R, mine_R = _columns(target_R, first_token + first, len(weight_cH))
            target_logit_R += _at(logits_Rc, column_R) * mine_R
            last_R, peak_R = peak_R, torch.maximum(peak_R, logits_Rc.amax(-1))
            normalizer_R, weighted_R = _seen_from(last_R, peak_R, normalizer_R, weighted_R)
            exp_Rc = logits_Rc.sub_(peak_R.unsqueeze(1)).exp()
            normalizer_R += exp_Rc.sum(-1)
            weighted_R += exp_Rc.mul_(logits_Rc).sum(-1)

        whole_R = peak_R.clone()
        dist.all_reduce(whole_R, op=dist.ReduceOp.MAX, group=group)
        sums = torch.stack([*_seen_from(peak_R, whole_R, normalizer_R, weighted_R), target_logit_R])
        dist.all_reduce(sums, group=group)
        normalizer_R, weighted_R, target_logit_R = sums
        log_sum_R = whole_R + normalizer_R.log()
        entropy_R = normalizer_R.log() - weighted_R / normalizer_R
        ctx.save_for_backward(hidden_RH, weight_VH, target_R, log_sum_R)
        ctx.first_token, ctx.temperature = first_token, temperature
        ctx.mark_non_differentiable(entropy_R)
        return target_logit_R - log_sum_R, entropy_R

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        hidden_RH, weight_VH, target_R, log_sum_R = ctx.saved_tensors
        grad_R = grads[0] / ctx.temperature
        grad_hidden_RH = torch.zeros_like(hidden_RH, dtype=torch.float32)
        grad_weight_VH = torch.empty_like(weight_VH)
        for first, weight_cH in _chunks(weight_VH, len(hidden_RH)):
            logits_Rc = _logits(hidden_RH, weight_cH, ctx.temperature)
            grad_Rc = logits_Rc.sub_(log_sum_R.unsqueeze(1)).exp_().mul_(-grad_R.unsqueeze(1))
            column_R, mine_R = _columns(target_R, ctx.first_token + first, len(weight_cH))
            grad_Rc.scatter_add_(1, column_R.unsqueeze(1), (grad_R * mine_R).unsqueeze(1))
            grad_Rc = grad_Rc.to(weight_VH.dtype)
            grad_hidden_RH += grad_Rc @ weight_cH
            torch.mm(grad_Rc.T, hidden_RH, out=grad_weight_VH[first : first + len(weight_cH)])
        return grad_hidden_RH.to(hidden_RH.dtype), grad_weight_VH, None, None, None, None


def _chunks(weight_VH: Tensor, num_rows: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (number of the first row, rows); cut by vocabulary: a row of the gradient is one product over all R."""
    size = max(1, MOST_LOGITS // max(1, num_rows))
    for first in range(0, len(weight_VH), size):
        yield first, weight_VH[first : first + size]


def _logits(hidden_RH: Tensor, weight_cH: Tensor, temperature: float) -> Tensor:
    """Return the logits [R, c] in fp32, in memory of their own."""
    return F.linear(hidden_RH, weight_cH).float().div_(temperature)


def _columns(target_R: Tensor, first_token: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Return the columns of the targets in a chunk, and whether they are in it; if not, the column is any one."""
    column_R = target_R - first_token
    return column_R.clamp(0, num_tokens - 1), (column_R >= 0) & (column_R < num_tokens)


def _at(logits_Rc: Tensor, column_R: Tensor) -> Tensor:
    return logits_Rc.gather(1, column_R.unsqueeze(1)).squeeze(1)


def _seen_from(old_R: Tensor, new_R: Tensor, normalizer_R: Tensor, weighted_R: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of exp(x - peak) and of exp(x - peak) (x - peak) for the new peak instead of the old one."""
    shift_R = old_R - new_R
    scale_R = shift_R.exp()
    return normalizer_R * scale_R, (weighted_R + shift_R * normalizer_R) * scale_R
