"""Compute causal attention in plain torch, for Megatron-Core's self-attention without Transformer Engine.

Megatron-Core's own module refuses packed sequences and context parallelism; this one does both, in the same layouts as
Transformer Engine's. Legend: T tokens of this rank, S tokens of all context ranks, L keys, D channels per head.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

LONGEST_PLAIN = 256
"""Up to this many keys, matrix products are faster on a CPU than torch's fused kernel, and their scores fit."""

LONGEST_PLAIN_UNIT = 512
"""Up to this many tokens of a prompt and its responses, one masked product is faster than one for each response."""


@dataclass
class SharedPrompts(PackedSeqParams):
    """A pack in which the responses to a prompt follow one copy of it and do not see each other.

    units: for every prompt in the pack its number of tokens and those of its responses, in packed order
    positions_T: int64, each token's position in its own sequence (prompt, then response)
    """

    units: tuple[tuple[int, tuple[int, ...]], ...] = ()
    positions_T: Tensor | None = None


class CoreAttention(MegatronModule):
    """softmax(scale q k^T + causal mask) v, with grouped queries; packed (thd) or equally long (sbhd) sequences.

    With context parallelism a sequence is cut into 2 * cp chunks, of which rank r holds chunks r and 2 * cp - 1 - r
    (equal work for all); keys and values are gathered, and every rank computes its own queries.
    The constructor's arguments are those that Megatron-Core passes; it raises ValueError for what it doesn't implement.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout or config.window_size is not None or config.softmax_type != "vanilla":
            raise ValueError(
                f"attention_dropout = {dropout}, window_size = {config.window_size}, softmax_type = "
                f"{config.softmax_type!r}: only full causal attention without dropout exists; use 0, None, 'vanilla'"
            )
        assert attention_type == "self" and attn_mask_type == AttnMaskType.causal
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["cp"])
        self.context_group = groups.cp
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend causally: packed query [T, heads, D], key and value [T, kv heads, D] -> [T, heads, D].

        Not packed: [s, b, heads, D] and so on -> [s, b, heads * D]. `attention_mask` is not read.
        """
        assert attention_bias is None
        if isinstance(packed_seq_params, SharedPrompts):
            return self._attend_shared(query, key, value, packed_seq_params.units)
        if packed_seq_params is not None:
            lengths = _lengths(packed_seq_params, self.context_group.size())
            return self._attend_packed(query, key, value, lengths)
        num_tokens, batch = query.shape[:2]
        q, k, v = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))
        out = self._attend_packed(q, k, v, (num_tokens,) * batch)
        return out.view(batch, num_tokens, -1).transpose(0, 1).contiguous()

    def _attend_packed(self, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Attend within each sequence of a pack.

        lengths: tokens that this rank holds of each sequence; they fill the first dimension of all tensors
        """
        assert sum(lengths) == query.shape[0], "the sequences must fill the pack: pad inside of them"
        num_ranks, rank = self.context_group.size(), self.context_group.rank()
        if num_ranks == 1:
            parts = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
            return torch.cat([causal_attention(q, k, v, self.scale) for q, k, v in parts])
        order_S = _sequence_order(lengths, num_ranks).to(query.device)
        both = gather_from_sequence_parallel_region(torch.stack((key, value), dim=1), group=self.context_group)
        key, value = both.index_select(0, order_S).unbind(1)
        whole = [n * num_ranks for n in lengths]
        outs = []
        for q, k, v in zip(query.split(lengths), key.split(whole), value.split(whole), strict=True):
            chunk = q.shape[0] // 2
            for part, number in zip(q.split(chunk), (rank, 2 * num_ranks - 1 - rank), strict=True):
                seen = (number + 1) * chunk
                outs.append(causal_attention(part, k[:seen], v[:seen], self.scale))
        return torch.cat(outs)

    def _attend_shared(
        self, query: Tensor, key: Tensor, value: Tensor, units: tuple[tuple[int, tuple[int, ...]], ...]
    ) -> Tensor:
        """Let every prompt attend to itself, and every response to its prompt and itself."""
        assert self.context_group.size() == 1, "prompts can't be shared where context parallelism cuts sequences"
        lengths = [prompt + sum(responses) for prompt, responses in units]
        parts = zip(units, *(x.split(lengths) for x in (query, key, value)), strict=True)
        return torch.cat([shared_attention(q, k, v, unit, self.scale) for unit, q, k, v in parts])


class PackedSelfAttention(SelfAttention):
    """Megatron-Core's self-attention, with the rotary angles of a pack laid out once instead of sequence by sequence.

    Given angles for positions 0..longest, Megatron-Core rotates every sequence on its own, which is slow for many short
    ones. Given one row of angles per token it rotates the pack at once.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Do what the base class does, with `rotary_pos_emb` [longest, 1, 1, D] laid out for the pack."""
        if isinstance(packed_seq_params, SharedPrompts) and rotary_pos_emb is not None:
            rotary_pos_emb = rotary_pos_emb[packed_seq_params.positions_T]
        elif packed_seq_params is not None and rotary_pos_emb is not None:
            lengths = _lengths(packed_seq_params, 1)
            rotary_pos_emb = torch.cat([rotary_pos_emb[:n] for n in lengths])
        return super().forward(
            hidden_states,
            attention_mask,
            *args,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
            **kwargs,
        )


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return the attention [T, heads, D] of one sequence in which the queries are the last T of the L positions.

    query: [T, heads, D]; key, value: [L, kv heads, D]
    Scores and softmax are fp32 in every dtype: bf16 scores quadruple the error of the output.
    """
    num_queries, num_keys = query.shape[0], key.shape[0]
    if query.device.type == "cpu" and num_keys <= LONGEST_PLAIN:
        causal = _causal_mask(query.device)[num_keys - num_queries : num_keys, :num_keys]
        return _plain(query, key, value, scale, causal)
    mask = None
    if num_queries < num_keys:
        mask = query.new_ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[0].transpose(0, 1)


def shared_attention(
    query: Tensor, key: Tensor, value: Tensor, unit: tuple[int, tuple[int, ...]], scale: float
) -> Tensor:
    """Return the `causal_attention` of a prompt and the responses behind it, which do not see each other."""
    prompt, responses = unit
    if query.device.type == "cpu" and query.shape[0] <= LONGEST_PLAIN_UNIT:
        return _plain(query, key, value, scale, _unit_mask(prompt, responses, query.device))
    lengths = [prompt, *responses]
    prompt_k, prompt_v = key[:prompt], value[:prompt]
    outs = [causal_attention(query[:prompt], prompt_k, prompt_v, scale)]
    for q, k, v in list(zip(*(x.split(lengths) for x in (query, key, value)), strict=True))[1:]:
        outs.append(causal_attention(q, torch.cat((prompt_k, k)), torch.cat((prompt_v, v)), scale))
    return torch.cat(outs)


def _plain(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor) -> Tensor:
    """Compute attention as two batched matrix products; the heads of a group share its keys without copies of them.

    mask: [T, L], added to the scores
    """
    (num_queries, num_heads, dim), (num_keys, num_groups, _) = query.shape, key.shape
    share = num_heads // num_groups
    rows = (num_groups, share * num_queries)
    q = (query.float() * scale).view(num_queries, num_groups, share, dim).permute(1, 2, 0, 3).reshape(*rows, dim)
    scores = torch.bmm(q, key.float().permute(1, 2, 0)).view(num_heads, num_queries, num_keys)
    weights = (scores + mask).softmax(-1).to(value.dtype).view(*rows, num_keys)
    out = torch.bmm(weights, value.transpose(0, 1)).view(num_groups, share, num_queries, dim)
    return out.permute(2, 0, 1, 3).reshape(num_queries, num_heads, dim)


@functools.cache
def _causal_mask(device: torch.device) -> Tensor:
    return torch.full((LONGEST_PLAIN, LONGEST_PLAIN), -math.inf, device=device).triu(1)


@functools.lru_cache(maxsize=128)
def _unit_mask(prompt: int, responses: tuple[int, ...], device: torch.device) -> Tensor:
    """Return a mask [T, T] with -inf where a token of a unit must not see another: later ones, and other responses."""
    owner = torch.repeat_interleave(torch.arange(len(responses) + 1), torch.tensor([prompt, *responses]))
    visible = ((owner[:, None] == owner) | (owner == 0)).tril()
    return torch.zeros(visible.shape).masked_fill(~visible, -math.inf).to(device)


def _lengths(params: PackedSeqParams, num_ranks: int) -> tuple[int, ...]:
    """Return how many tokens a rank holds of each sequence of a pack, padding included."""
    assert params.qkv_format == "thd"
    ends = params.cu_seqlens_q if params.cu_seqlens_q_padded is None else params.cu_seqlens_q_padded
    whole = ends.diff().tolist()
    assert num_ranks == 1 or all(n % (2 * num_ranks) == 0 for n in whole), "pad sequences to Layout.sequence_alignment"
    return tuple(n // num_ranks for n in whole)


@functools.lru_cache(maxsize=16)
def _sequence_order(lengths: tuple[int, ...], num_ranks: int) -> Tensor:
    """Return the places [S] of all sequences' tokens, in their own order, in the concatenation of the ranks' packs."""
    num_local, start, order = sum(lengths), 0, []
    for length in lengths:
        half = length // 2
        for rank in range(num_ranks):
            order.append(torch.arange(half) + rank * num_local + start)
        for rank in reversed(range(num_ranks)):
            order.append(torch.arange(half) + rank * num_local + start + half)
        start += length
    return torch.cat(order)
