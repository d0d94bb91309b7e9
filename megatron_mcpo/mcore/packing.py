"""From ragged rollouts to packed micro-batches, and from micro-batch results back.

Sequences are laid end to end (Megatron's "thd" format): no token is computed that nobody asked for, except the few
that align a sequence to the layout and, under pipeline parallelism, those that make micro-batches equally long.
Shape legend: see megatron_mcpo.types; L: tokens of this context rank in one micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_mcpo.batch import partition
from megatron_mcpo.layout import Layout
from megatron_mcpo.types import TrainBatch


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one forward pass of one rank needs. Index tensors are int64.

    tokens_1L: this context rank's share of the packed tokens
    rollouts: positions in the TrainBatch of the rollouts in here
    predict_r: positions in L whose NEXT token is a response token; target_r: that token
    response_r: where these response tokens stand in the TrainBatch's R
    pool_l: positions in L that hold response tokens; pool_rollout_l: the rollout (0..len(rollouts)-1) each belongs to
    response_lens_n: response length of every rollout in here
    """

    tokens_1L: Tensor
    packed: PackedSeqParams
    rollouts: tuple[int, ...]
    predict_r: Tensor
    target_r: Tensor
    response_r: Tensor
    pool_l: Tensor
    pool_rollout_l: Tensor
    response_lens_n: Tensor


def num_micro_batches(batch: TrainBatch, *, max_tokens: int, layout: Layout) -> int:
    """The number of micro-batches that EVERY data-parallel rank makes of its share of the batch.

    The smallest that keeps each within `max_tokens` on each rank; the interleaved schedule needs a multiple of the
    number of stages.
    """
    count = 1
    for rows in batch.rank_rows:
        padded = [_round_up(batch.lengths_M[row], layout.sequence_alignment) for row in rows]
        count = max(count, -(-sum(padded) // max_tokens))
        while max(sum(padded[i] for i in part) for part in partition(padded, num_parts=count)) > max_tokens:
            count += 1
    return _round_up(count, layout.pipeline) if layout.virtual_pipeline > 1 else count


def pack(
    batch: TrainBatch, *, num_micro: int, layout: Layout, context_rank: int, device: torch.device
) -> list[MicroBatch]:
    """Divide the rollouts of a batch into `num_micro` packed micro-batches."""
    lengths = (batch.prompt_lens_N + batch.response_lens_N).tolist()
    align = layout.sequence_alignment
    parts = partition([_round_up(n, align) for n in lengths], num_parts=num_micro)
    totals = [sum(_round_up(lengths[i], align) for i in part) for part in parts]
    # A pipeline moves at the pace of its longest micro-batch, and its stages must know the size of what they receive.
    longest = max(totals)
    fill = [longest if layout.pipeline > 1 else max(total, align) for total in totals]
    return [
        _pack_one(batch, part, total=total, layout=layout, context_rank=context_rank, device=device)
        for part, total in zip(parts, fill, strict=True)
    ]


def _pack_one(
    batch: TrainBatch, rollouts: Sequence[int], *, total: int, layout: Layout, context_rank: int, device: torch.device
) -> MicroBatch:
    align = layout.sequence_alignment
    prompt_lens, response_lens = batch.prompt_lens_N.tolist(), batch.response_lens_N.tolist()
    token_starts = _starts([p + r for p, r in zip(prompt_lens, response_lens, strict=True)])
    response_starts = _starts(response_lens)

    tokens_T = torch.zeros(total, dtype=torch.int64)
    response_T = torch.full((total,), -1, dtype=torch.int64)
    rollout_T = torch.full((total,), -1, dtype=torch.int64)
    lengths, boundaries = [], [0]
    for number, i in enumerate(rollouts):
        start, length = boundaries[-1], prompt_lens[i] + response_lens[i]
        tokens_T[start : start + length] = batch.tokens_T[token_starts[i] : token_starts[i] + length]
        first = start + prompt_lens[i]
        response_T[first : start + length] = torch.arange(response_starts[i], response_starts[i] + response_lens[i])
        rollout_T[first : start + length] = number
        lengths.append(length)
        boundaries.append(start + _round_up(length, align))
    if boundaries[-1] < total:
        boundaries.append(total)

    keep_L = _context_share(boundaries, layout.context, context_rank)
    next_response_T = torch.cat([response_T[1:], response_T.new_full((1,), -1)])
    next_token_T = torch.cat([tokens_T[1:], tokens_T.new_zeros(1)])
    predicts_L = next_response_T[keep_L] >= 0
    pooled_L = rollout_T[keep_L] >= 0
    return MicroBatch(
        tokens_1L=tokens_T[keep_L].unsqueeze(0).to(device),
        packed=_packed_params(boundaries, device),
        rollouts=tuple(rollouts),
        predict_r=predicts_L.nonzero().squeeze(1).to(device),
        target_r=next_token_T[keep_L][predicts_L].to(device),
        response_r=next_response_T[keep_L][predicts_L].to(device),
        pool_l=pooled_L.nonzero().squeeze(1).to(device),
        pool_rollout_l=rollout_T[keep_L][pooled_L].to(device),
        response_lens_n=batch.response_lens_N[list(rollouts)].to(device),
    )


def _packed_params(boundaries: list[int], device: torch.device) -> PackedSeqParams:
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32, device=device)
    longest = max(end - start for start, end in zip(boundaries[:-1], boundaries[1:], strict=True))
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=cu_seqlens,
        cu_seqlens_kv_padded=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _context_share(boundaries: list[int], context: int, rank: int) -> Tensor:
    """Positions of the packed tokens that context rank `rank` holds.

    Each sequence is cut into 2 * context chunks, of which a rank takes one from the front and its mirror from the
    back: under a causal mask every rank then has the same amount of work.
    """
    if context == 1:
        return torch.arange(boundaries[-1])
    positions = []
    for start, end in zip(boundaries[:-1], boundaries[1:], strict=True):
        chunks = torch.arange(start, end).chunk(2 * context)
        positions += [chunks[rank], chunks[2 * context - 1 - rank]]
    return torch.cat(positions)


def _starts(lengths: Sequence[int]) -> list[int]:
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return starts


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
