"""Run packed micro-batches through the pipeline, forward only or with the backward pass (1F1B).

Shape legend: see megatron_mcpo.types and megatron_mcpo.mcore.packing.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_mcpo import progress
from megatron_mcpo.distributed.parallel import Groups
from megatron_mcpo.mcore.logprob import linear_logprobs
from megatron_mcpo.mcore.model import unwrap
from megatron_mcpo.mcore.packing import MicroBatch
from megatron_mcpo.mcore.routers import Routers


@dataclass(frozen=True, kw_only=True)
class MicroOutput:
    """The results of the last stage for one micro-batch, in fp32; `z_nD` only if asked for."""

    logp_r: Tensor
    entropy_r: Tensor
    z_nD: Tensor | None


MicroLoss = Callable[[MicroBatch, MicroOutput], Tensor]


def run(
    chunks: Sequence[nn.Module],
    micros: Sequence[MicroBatch],
    groups: Groups,
    *,
    return_representations: bool,
    temperature: float,
    loss: MicroLoss | None,
    routers: Routers | None = None,
) -> list[MicroOutput]:
    """Run the micro-batches through this rank's chunks; return their detached outputs on the last stage, else [].

    Args:
        chunks: This rank's chunks of the model.
        micros: The micro-batches of this data-parallel rank.
        groups: The groups of this rank.
        return_representations: Whether the head computes representations.
        temperature: Logits are divided by it, as the engine does when it samples.
        loss: None for a forward-only pass; otherwise its values are back-propagated, times the factors of Megatron's
            schedule (see `Policy.backward`).
        routers: Those of a model with experts, in a pass that has begun; None: the model has none, or they are free.
    """
    numbers = {id(chunk): number for number, chunk in enumerate(chunks)}

    def forward(data: Iterator[MicroBatch], chunk: nn.Module) -> tuple[Any, Callable[[Any], tuple[Tensor, Any]]]:
        progress.tick()
        micro = next(data)

        def finish(raw: Any) -> tuple[Tensor, MicroOutput]:
            logp_r, entropy_r, z_nD = raw
            output = MicroOutput(logp_r=logp_r, entropy_r=entropy_r, z_nD=z_nD)
            value = loss(micro, output) if loss else logp_r.sum()
            return value, _detached(output)

        with routers.forward(numbers[id(chunk)], micro) if routers else nullcontext():
            output = chunk(
                micro.tokens_1L,
                None,
                None,
                packed_seq_params=micro.packed,
                output_processor=_process_output,
                output_processor_context=_Context(unwrap(chunk), micro, groups, return_representations, temperature),
            )
        return output, finish

    interleaved = len(chunks) > 1
    iterators = [iter(micros) for _ in chunks]
    with torch.set_grad_enabled(loss is not None):
        return get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iterators if interleaved else iterators[0],
            model=list(chunks) if interleaved else chunks[0],
            num_microbatches=len(micros),
            seq_length=micros[0].tokens_1L.shape[1] * groups.layout.context,
            micro_batch_size=1,
            forward_only=loss is None,
        )


@dataclass(frozen=True)
class _Context:
    model: Any
    micro: MicroBatch
    groups: Groups
    return_representations: bool
    temperature: float


def _process_output(*, hidden_states: Tensor, output_weight: Tensor | None, context: _Context, **_: Any) -> Any:
    """Compute log-probs and representations: Megatron's hook between the final norm and the output layer.

    Logits are computed only where the next token is a response token: prompts cost no vocabulary products.

    hidden_states: [L (/ tensor), 1, H]
    """
    hidden_LH = hidden_states.squeeze(1)
    weight_VH = context.model.output_layer.weight if output_weight is None else output_weight
    logp_r, entropy_r = linear_logprobs(
        _predicting(hidden_LH, context),
        _real_rows(weight_VH, context),
        context.micro.target_r,
        first_token=context.groups.tensor_rank * weight_VH.shape[0],
        temperature=context.temperature,
        group=context.groups.tensor,
    )
    z_nD = context.model.contrastive_head(_pool(hidden_LH, context)) if context.return_representations else None
    return logp_r, entropy_r, z_nD


def _predicting(hidden_LH: Tensor, context: _Context) -> Tensor:
    """Return the hidden states [r, H] that predict response tokens, the same on all tensor ranks."""
    layout, group = context.groups.layout, context.groups.tensor
    if layout.sequence:
        hidden_LH = tensor_parallel.gather_from_sequence_parallel_region(
            hidden_LH, tensor_parallel_output_grad=True, group=group
        )
    else:
        hidden_LH = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_LH, group=group)
    return hidden_LH[context.micro.predict_r]


def _real_rows(weight_VH: Tensor, context: _Context) -> Tensor:
    """Return the rows of the output matrix that belong to real tokens: the softmax must leave padding out."""
    first = context.groups.tensor_rank * weight_VH.shape[0]
    real = min(weight_VH.shape[0], context.model.real_vocab_size - first)
    return weight_VH if real == weight_VH.shape[0] else weight_VH[:real]


def _pool(hidden_LH: Tensor, context: _Context) -> Tensor:
    """Return the mean hidden state [n, H] in fp32 of each rollout's pooled tokens, on all tensor and context ranks.

    The head that follows is replicated over tensor ranks, so that the sum over them passes its gradient on unchanged;
    over context ranks, whose gradients are summed later, it is an ordinary differentiable sum.
    """
    micro, layout = context.micro, context.groups.layout
    pool_l, rollout_l = micro.pool_l, micro.pool_rollout_l
    if layout.sequence:
        shard = hidden_LH.shape[0]
        local_l = pool_l - context.groups.tensor_rank * shard
        mine_l = (local_l >= 0) & (local_l < shard)
        pool_l, rollout_l = local_l[mine_l], rollout_l[mine_l]
    sum_nH = hidden_LH.new_zeros(len(micro.rollouts), hidden_LH.shape[1], dtype=torch.float32)
    sum_nH = sum_nH.index_add(0, rollout_l, hidden_LH[pool_l].float())
    if layout.sequence:
        sum_nH = tensor_parallel.reduce_from_tensor_model_parallel_region(sum_nH, group=context.groups.tensor)
    if layout.context > 1:
        sum_nH = _SumOverRanks.apply(sum_nH, context.groups.context)
    return sum_nH / micro.pooled_n.clamp(min=1).unsqueeze(1)


class _SumOverRanks(torch.autograd.Function):
    """An all-reduce whose gradient is the all-reduce of the gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def _detached(output: MicroOutput) -> MicroOutput:
    # The schedule divides the loss in place, so that outputs must not share memory with it.
    return MicroOutput(
        logp_r=output.logp_r.detach().clone(),
        entropy_r=output.entropy_r.detach().clone(),
        z_nD=None if output.z_nD is None else output.z_nD.detach().clone(),
    )
