"""Pack ragged rollouts into micro-batches.

Sequences are laid end to end (Megatron's "thd" format). The only padding is what aligns a sequence to the layout and,
under pipeline parallelism, what makes micro-batches equally long. Where the attention allows it, the rollouts of a
prompt follow one copy of it, and the prompt is computed once, not G times.
Shape legend: see megatron_mcpo.types; L: tokens of this context rank in one micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm
from typing import Literal

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_mcpo.config.layout import Layout
from megatron_mcpo.data.batch import partition
from megatron_mcpo.mcore.attention import SharedPrompts
from megatron_mcpo.types import TrainBatch


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The input of one forward pass of one rank. Index tensors are int64.

    tokens_1L: this context rank's share of the packed tokens
    rollouts: positions in the TrainBatch of the rollouts in this micro-batch
    target_r: the response tokens whose log-prob is computed here; predict_r: positions in L of the tokens before them
    response_r: where these response tokens stand in the TrainBatch's R
    pool_l: positions in L of the response tokens that make up representations; pool_rollout_l: the rollout
    (0..len(rollouts)-1) each belongs to; pooled_n: how many of them every rollout has, over all context ranks
    is_token_L: bool, False for padding
    experts_LXK: those that the engine gave to these tokens, -1 where nothing is known; None: not asked for
    """

    tokens_1L: Tensor
    packed: PackedSeqParams
    rollouts: tuple[int, ...]
    predict_r: Tensor
    target_r: Tensor
    response_r: Tensor
    pool_l: Tensor
    pool_rollout_l: Tensor
    pooled_n: Tensor
    is_token_L: Tensor
    experts_LXK: Tensor | None


def num_micro_batches(batch: TrainBatch, *, max_tokens: int, layout: Layout) -> int:
    """Return the number of micro-batches into which every data-parallel rank divides its share of the batch.

    It is the smallest number that keeps each within `max_tokens` on each rank; the interleaved schedule needs a
    multiple of the number of stages.
    """
    count = 1
    for rows in batch.rank_rows:
        costs = [_cost(batch, unit, layout) for unit in _units(batch, rows, max_tokens=max_tokens, layout=layout)]
        assert max(costs, default=0) <= max_tokens, "a rollout is larger than a micro-batch"
        count = max(count, -(-sum(costs) // max_tokens))
        while max(sum(costs[i] for i in part) for part in partition(costs, num_parts=count)) > max_tokens:
            count += 1
    return _round_up(count, layout.pipeline) if layout.virtual_pipeline > 1 else count


def pack(
    batch: TrainBatch,
    *,
    max_tokens: int,
    token_multiple: int,
    layout: Layout,
    context_rank: int,
    pool: Literal["mean", "last"],
    device: torch.device,
) -> list[MicroBatch]:
    """Divide the rollouts of a batch into `num_micro_batches` packed micro-batches.

    Args:
        batch: The batch, with this rank's rollouts.
        max_tokens: Of a micro-batch.
        token_multiple: The number of tokens of a rank is a multiple of it, for which a micro-batch may exceed
            `max_tokens`.
        layout: How the ranks are divided.
        context_rank: Of this rank.
        pool: Whether a representation is the mean over all tokens of a response, or that of the last one.
        device: Where the micro-batches are put.
    """
    count = num_micro_batches(batch, max_tokens=max_tokens, layout=layout)
    units = _units(batch, batch.rows_N.tolist(), max_tokens=max_tokens, layout=layout)
    costs = [_cost(batch, unit, layout) for unit in units]
    parts = partition(costs, num_parts=count)
    totals = [sum(costs[i] for i in part) for part in parts]
    # A pipeline moves at the pace of its longest micro-batch, and its stages must know the size of what they receive.
    # A rank without a rollout runs an empty sequence, because it reduces gradients with the others.
    longest = max(totals)
    multiple = lcm(
        layout.sequence_alignment, token_multiple * layout.context * (layout.tensor if layout.sequence else 1)
    )
    fill = [max(_round_up(longest if layout.pipeline > 1 else total, multiple), multiple) for total in totals]
    sequences = _Sequences(batch, pool)
    return [
        _pack_one(sequences, [units[i] for i in part], total=total, layout=layout, rank=context_rank, device=device)
        for part, total in zip(parts, fill, strict=True)
    ]


def _units(batch: TrainBatch, rows: Sequence[int], *, max_tokens: int, layout: Layout) -> list[list[int]]:
    """Group rollouts (rows of the batch) that are packed behind one copy of their prompt, within `max_tokens`."""
    units: list[list[int]] = []
    prompts = batch.labels.prompt_M.tolist()
    for row in rows:
        joins = batch.shared_prompts and units and prompts[units[-1][0]] == prompts[row]
        if joins and _cost(batch, [*units[-1], row], layout) <= max_tokens:
            units[-1].append(row)
        else:
            units.append([row])
    return units


def _cost(batch: TrainBatch, unit: Sequence[int], layout: Layout) -> int:
    """Return the number of tokens that a unit takes in a pack."""
    tokens = batch.prompt_lens_M[unit[0]] + sum(batch.response_lens_M[row] for row in unit)
    return _round_up(tokens, layout.sequence_alignment)


class _Sequences:
    """The rollouts of this rank by row of the batch."""

    def __init__(self, batch: TrainBatch, pool: Literal["mean", "last"]):
        self.pool = pool
        self.shared_prompts = batch.shared_prompts
        self.local = {row: number for number, row in enumerate(batch.rows_N.tolist())}
        self.prompt_lens = batch.prompt_lens_N.tolist()
        self.response_lens = batch.response_lens_N.tolist()
        self.response_starts = _starts(self.response_lens)
        self.starts = _starts([p + r for p, r in zip(self.prompt_lens, self.response_lens, strict=True)])
        self.tokens_T, self.experts_TXK = batch.tokens_T, batch.experts_TXK

    def num_pooled(self, i: int) -> int:
        """Return the number of response tokens that the representation of rollout i is computed from."""
        return min(1, self.response_lens[i]) if self.pool == "last" else int(self.response_lens[i])


class _Pack:
    """Units laid end to end, before they are divided over context ranks. -1: padding, or no response token.

    source_T, position_T: where each token stands in the batch's T, and its position in its own sequence
    response_T, rollout_T: where a response token stands in the batch's R; the pack's rollout that it is pooled into
    predictor_T: the token whose hidden state predicts a response token (the prompt's last, for the first of them)
    """

    def __init__(self, sequences: _Sequences, total: int):
        self.sequences = sequences
        self.position_T, self.predictor_T = torch.zeros(2, total, dtype=torch.int64)
        self.source_T, self.response_T, self.rollout_T = torch.full((3, total), -1, dtype=torch.int64)
        self.rollouts: list[int] = []
        self.shapes: list[tuple[int, tuple[int, ...]]] = []
        self.end = 0

    def add(self, unit: Sequence[int], alignment: int) -> None:
        """Append a prompt and the responses of the unit's rollouts."""
        sequences, start = self.sequences, self.end
        local = [sequences.local[row] for row in unit]
        prompt_len = sequences.prompt_lens[local[0]]
        self.end = start + prompt_len
        self.source_T[start : self.end] = torch.arange(prompt_len) + sequences.starts[local[0]]
        self.position_T[start : self.end] = torch.arange(prompt_len)
        for i in local:
            self._add_response(i, last_of_prompt=start + prompt_len - 1)
        padding = _round_up(self.end - start, alignment) - (self.end - start)
        self.shapes.append((prompt_len, (*(sequences.response_lens[i] for i in local), padding)))
        self.end += padding

    def fill(self) -> None:
        """Make the rest of the pack one sequence of padding."""
        if self.end < len(self.source_T):
            self.shapes.append((len(self.source_T) - self.end, ()))

    def take(self, values_T: Tensor, *, padding: int) -> Tensor:
        """Return what the batch has for each token of the pack."""
        taken_T = values_T.new_full((len(self.source_T), *values_T.shape[1:]), padding)
        is_token_T = self.source_T >= 0
        taken_T[is_token_T] = values_T[self.source_T[is_token_T]]
        return taken_T

    def _add_response(self, i: int, *, last_of_prompt: int) -> None:
        sequences, at = self.sequences, self.end
        prompt_len, length = sequences.prompt_lens[i], sequences.response_lens[i]
        self.end = at + length
        span = slice(at, self.end)
        self.source_T[span] = torch.arange(length) + sequences.starts[i] + prompt_len
        self.response_T[span] = torch.arange(length) + sequences.response_starts[i]
        self.rollout_T[self.end - sequences.num_pooled(i) : self.end] = len(self.rollouts)
        self.position_T[span] = torch.arange(prompt_len, prompt_len + length)
        self.predictor_T[span] = torch.tensor([last_of_prompt, *range(at, self.end - 1)][:length])
        self.rollouts.append(i)


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
    pack = _Pack(sequences, total)
    for unit in units:
        pack.add(unit, layout.sequence_alignment)
    pack.fill()
    keep_L = _context_share([prompt + sum(responses) for prompt, responses in pack.shapes], layout.context, rank)
    tokens_T = pack.take(sequences.tokens_T, padding=0)
    experts_TXK = None if sequences.experts_TXK is None else pack.take(sequences.experts_TXK, padding=-1)
    local_T = torch.full((total,), -1, dtype=torch.int64)
    local_T[keep_L] = torch.arange(len(keep_L))
    target_t = (pack.response_T >= 0).nonzero().squeeze(1)
    target_t = target_t[local_T[pack.predictor_T[target_t]] >= 0]
    pooled_L = pack.rollout_T[keep_L] >= 0
    return MicroBatch(
        tokens_1L=tokens_T[keep_L].unsqueeze(0).to(device),
        packed=_packed_params(pack.shapes, pack.position_T, shared=sequences.shared_prompts, device=device),
        rollouts=tuple(pack.rollouts),
        predict_r=local_T[pack.predictor_T[target_t]].to(device),
        target_r=tokens_T[target_t].to(device),
        response_r=pack.response_T[target_t].to(device),
        pool_l=pooled_L.nonzero().squeeze(1).to(device),
        pool_rollout_l=pack.rollout_T[keep_L][pooled_L].to(device),
        pooled_n=torch.tensor([sequences.num_pooled(i) for i in pack.rollouts], device=device),
        is_token_L=(pack.source_T[keep_L] >= 0).to(device),
        experts_LXK=None if experts_TXK is None else experts_TXK[keep_L].to(device),
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
    """Return the positions of the packed tokens that context rank `rank` holds.

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
