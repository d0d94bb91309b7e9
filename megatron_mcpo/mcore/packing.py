"""From ragged rollouts to packed micro-batches, and from micro-batch results back.

Sequences are laid end to end (Megatron's "thd" format): no token is computed that nobody asked for, except the few
that align a sequence to the layout and, under pipeline parallelism, those that make micro-batches equally long. Where
the attention allows it, the rollouts of a prompt follow one copy of it, and the prompt is computed once, not G times.
Shape legend: see megatron_mcpo.types; L: tokens of this context rank in one micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_mcpo.batch import partition
from megatron_mcpo.layout import Layout
from megatron_mcpo.mcore.attention import SharedPrompts
from megatron_mcpo.types import TrainBatch


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one forward pass of one rank needs. Index tensors are int64.

    tokens_1L: this context rank's share of the packed tokens
    rollouts: positions in the TrainBatch of the rollouts in here
    target_r: the response tokens whose log-prob is computed here; predict_r: positions in L of the tokens before them
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
        costs = [_cost(batch, unit, layout) for unit in _units(batch, rows, max_tokens=max_tokens, layout=layout)]
        count = max(count, -(-sum(costs) // max_tokens))
        while max(sum(costs[i] for i in part) for part in partition(costs, num_parts=count)) > max_tokens:
            count += 1
    return _round_up(count, layout.pipeline) if layout.virtual_pipeline > 1 else count


def pack(
    batch: TrainBatch, *, max_tokens: int, layout: Layout, context_rank: int, device: torch.device
) -> list[MicroBatch]:
    """Divide the rollouts of a batch into packed micro-batches, as many as `num_micro_batches` says."""
    count = num_micro_batches(batch, max_tokens=max_tokens, layout=layout)
    units = _units(batch, batch.rows_N.tolist(), max_tokens=max_tokens, layout=layout)
    costs = [_cost(batch, unit, layout) for unit in units]
    parts = partition(costs, num_parts=count)
    totals = [sum(costs[i] for i in part) for part in parts]
    # A pipeline moves at the pace of its longest micro-batch, and its stages must know the size of what they receive.
    fill = [max(totals) if layout.pipeline > 1 else max(total, layout.sequence_alignment) for total in totals]
    sequences = _Sequences(batch)
    return [
        _pack_one(sequences, [units[i] for i in part], total=total, layout=layout, rank=context_rank, device=device)
        for part, total in zip(parts, fill, strict=True)
    ]


def _units(batch: TrainBatch, rows: Sequence[int], *, max_tokens: int, layout: Layout) -> list[list[int]]:
    """Rollouts (as rows of the batch) that are packed behind one copy of their prompt, in at most `max_tokens`."""
    units: list[list[int]] = []
    prompts = batch.keys.prompt_M.tolist()
    for row in rows:
        joins = batch.shared_prompts and units and prompts[units[-1][0]] == prompts[row]
        if joins and _cost(batch, [*units[-1], row], layout) <= max_tokens:
            units[-1].append(row)
        else:
            units.append([row])
    return units


def _cost(batch: TrainBatch, unit: Sequence[int], layout: Layout) -> int:
    """Tokens that a unit takes in a pack."""
    tokens = batch.prompt_lens_M[unit[0]] + sum(batch.response_lens_M[row] for row in unit)
    return _round_up(tokens, layout.sequence_alignment)


class _Sequences:
    """This rank's rollouts by row of the batch."""

    def __init__(self, batch: TrainBatch):
        self.shared_prompts = batch.shared_prompts
        self.local = {row: number for number, row in enumerate(batch.rows_N.tolist())}
        self.prompt_lens = batch.prompt_lens_N.tolist()
        self.response_lens = batch.response_lens_N.tolist()
        self.response_starts = _starts(self.response_lens)
        self.tokens = batch.tokens_T.split([p + r for p, r in zip(self.prompt_lens, self.response_lens, strict=True)])


def _pack_one(
    sequences: _Sequences,
    units: Sequence[Sequence[int]],
    *,
    total: int,
    layout: Layout,
    rank: int,
    device: torch.device,
) -> MicroBatch:
    """Lay the units end to end, then keep what this context rank holds of them."""
    tokens_T = torch.zeros(total, dtype=torch.int64)
    response_T = torch.full((total,), -1, dtype=torch.int64)
    rollout_T = torch.full((total,), -1, dtype=torch.int64)
    position_T = torch.zeros(total, dtype=torch.int64)
    predictor_T = torch.zeros(total, dtype=torch.int64)
    rollouts: list[int] = []
    shapes: list[tuple[int, tuple[int, ...]]] = []
    start = 0
    for unit in units:
        local = [sequences.local[row] for row in unit]
        prompt_len = sequences.prompt_lens[local[0]]
        first = start + prompt_len
        tokens_T[start:first] = sequences.tokens[local[0]][:prompt_len]
        position_T[start:first] = torch.arange(prompt_len)
        at = first
        for i in local:
            length = sequences.response_lens[i]
            span = slice(at, at + length)
            tokens_T[span] = sequences.tokens[i][prompt_len:]
            response_T[span] = torch.arange(length) + sequences.response_starts[i]
            rollout_T[span] = len(rollouts)
            position_T[span] = torch.arange(prompt_len, prompt_len + length)
            predictor_T[span] = torch.arange(at - 1, at + length - 1)
            predictor_T[at : at + min(length, 1)] = first - 1
            rollouts.append(i)
            at += length
        end = start + _round_up(at - start, layout.sequence_alignment)
        shapes.append((prompt_len, (*(sequences.response_lens[i] for i in local), end - at)))
        start = end
    if start < total:
        shapes.append((total - start, ()))

    lengths = [prompt + sum(responses) for prompt, responses in shapes]
    keep_L = _context_share(lengths, layout.context, rank)
    local_T = torch.full((total,), -1, dtype=torch.int64)
    local_T[keep_L] = torch.arange(len(keep_L))
    target_t = (response_T >= 0).nonzero().squeeze(1)
    target_t = target_t[local_T[predictor_T[target_t]] >= 0]
    pooled_L = rollout_T[keep_L] >= 0
    packed = _packed_params(shapes, position_T, shared=sequences.shared_prompts, device=device)
    return MicroBatch(
        tokens_1L=tokens_T[keep_L].unsqueeze(0).to(device),
        packed=packed,
        rollouts=tuple(rollouts),
        predict_r=local_T[predictor_T[target_t]].to(device),
        target_r=tokens_T[target_t].to(device),
        response_r=response_T[target_t].to(device),
        pool_l=pooled_L.nonzero().squeeze(1).to(device),
        pool_rollout_l=rollout_T[keep_L][pooled_L].to(device),
        response_lens_n=torch.tensor([sequences.response_lens[i] for i in rollouts], device=device),
    )


def _packed_params(
    shapes: Sequence[tuple[int, tuple[int, ...]]], position_T: Tensor, *, shared: bool, device: torch.device
) -> PackedSeqParams:
    lengths = [prompt + sum(responses) for prompt, responses in shapes]
    cu_seqlens = torch.tensor(_starts(lengths), dtype=torch.int32, device=device)
    longest = max(lengths)
    common = dict(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=cu_seqlens,
        cu_seqlens_kv_padded=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    if not shared:
        return PackedSeqParams(**common)
    return SharedPrompts(**common, units=tuple(shapes), positions_T=position_T.to(device))


def _context_share(lengths: Sequence[int], context: int, rank: int) -> Tensor:
    """Positions of the packed tokens that context rank `rank` holds.

    Each sequence is cut into 2 * context chunks, of which a rank takes one from the front and its mirror from the
    back: under a causal mask every rank then has the same amount of work.
    """
    if context == 1:
        return torch.arange(sum(lengths))
    positions = []
    for sequence in torch.arange(sum(lengths)).split(list(lengths)):
        chunks = sequence.chunk(2 * context)
        positions += [chunks[rank], chunks[2 * context - 1 - rank]]
    return torch.cat(positions)


def _starts(lengths: Sequence[int]) -> list[int]:
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return starts


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
