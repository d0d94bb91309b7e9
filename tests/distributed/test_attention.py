"""Attention against a direct formula, packed against alone, and shared over context ranks against unshared.

Not covered: Transformer Engine's attention; a GPU; sequences beyond a few hundred tokens.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_mcpo.config.layout import Layout
from megatron_mcpo.distributed import parallel
from megatron_mcpo.mcore import attention
from megatron_mcpo.mcore.spec import layer_spec
from tests.support.ranks import run_ranks

VOCAB = 64
LENGTHS = (16, 8, 24, 16)


def _direct(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute attention by its definition, in double precision."""
    share = query.shape[1] // key.shape[1]
    q, k, v = (x.double().transpose(0, 1) for x in (query, key, value))
    k, v = (x.repeat_interleave(share, 0) for x in (k, v))
    offset = k.shape[1] - q.shape[1]
    seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(offset)
    scores = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1)


@pytest.mark.parametrize("longest_plain", [0, attention.LONGEST_PLAIN], ids=["fused kernel", "matrix products"])
@pytest.mark.parametrize("num_queries", [13, 5], ids=["whole sequence", "last tokens"])
def test_kernels_follow_the_definition(longest_plain: int, num_queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "LONGEST_PLAIN", longest_plain)
    attention._causal_mask.cache_clear()
    shapes = [(num_queries, 6, 8), (13, 2, 8), (13, 2, 8)]
    mine = [torch.randn(shape, requires_grad=True) for shape in shapes]
    direct = [x.detach().clone().requires_grad_() for x in mine]
    out = attention.causal_attention(*mine, scale=8**-0.5)
    expected = _direct(*direct)
    weight = torch.randn(out.shape)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    attention._causal_mask.cache_clear()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(mine, direct, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def _model(layout: Layout) -> GPTModel:
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        ffn_hidden_size=64,
        normalization="RMSNorm",
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        tensor_model_parallel_size=layout.tensor,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=layer_spec(config, None),
        vocab_size=VOCAB,
        max_sequence_length=64,
        position_embedding_type="rope",
    )
    with torch.no_grad():  # larger scores, so that a wrong mask or angle shows
        for name, parameter in model.named_parameters():
            if "linear_qkv" in name:
                parameter.mul_(20)
    return model


def _sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, VOCAB, (n,), generator=generator) for n in LENGTHS]


def _mine(x: Tensor, groups: parallel.Groups) -> Tensor:
    """Return this context rank's tokens of one sequence."""
    if groups.layout.context == 1:
        return x
    chunks = x.chunk(2 * groups.layout.context)
    return torch.cat([chunks[groups.context_rank], chunks[-1 - groups.context_rank]])


def _logits(model: GPTModel, sequences: list[Tensor], groups: parallel.Groups, *, packed: bool) -> Tensor:
    """[T, V / tensor] of this rank's tokens: with `packed` of all at once, otherwise of a batch of equal lengths."""
    if not packed:
        tokens = torch.stack([_mine(s, groups) for s in sequences])
        positions = torch.zeros_like(tokens)  # rotary angles come from the order alone
        return model(tokens, positions, None).flatten(0, 1)
    tokens = torch.cat([_mine(s, groups) for s in sequences])[None]
    ends = torch.tensor([0, *[len(s) for s in sequences]]).cumsum(0).int()
    longest = max(len(s) for s in sequences)
    params = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
    )
    return model(tokens, torch.zeros_like(tokens), None, packed_seq_params=params)[0]


def _objective(logits: Tensor, sequences: list[Tensor], groups: parallel.Groups) -> Tensor:
    """Return a sum over tokens whose weights differ by sequence, position and vocabulary entry."""
    place = torch.cat([_mine(torch.sin(torch.arange(len(s)) + 7.0 * i), groups) for i, s in enumerate(sequences)])
    entry = torch.cos(torch.arange(VOCAB) * 1.7).chunk(groups.layout.tensor)[groups.tensor_rank]
    return (logits * place[:, None] * entry).sum()


def _run(layout: Layout) -> tuple[float, dict[str, Tensor]]:
    """Value and gradients of the packed objective, summed over the context ranks. Tensor-sharded ones of this rank."""
    groups = parallel.init(layout, seed=5, timeout_seconds=240)
    model, sequences = _model(layout), _sequences()
    value = _objective(_logits(model, sequences, groups, packed=True), sequences, groups)
    value.backward()
    total = value.detach().clone()
    dist.all_reduce(total, group=groups.context)
    dist.all_reduce(total, group=groups.tensor)
    grads = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad.clone()
        dist.all_reduce(grad, group=groups.context)
        if getattr(parameter, "sequence_parallel", False) or (layout.sequence and "layernorm" in name):
            dist.all_reduce(grad, group=groups.tensor)
        grads[name] = grad
    return total.item(), grads


def _packed_alone_and_batched() -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    groups = parallel.init(Layout(), seed=5, timeout_seconds=240)
    model, results = _model(Layout()), {}
    sequences = _sequences()
    equal = [sequences[0], sequences[3]]
    cases = {
        "packed": lambda: _logits(model, sequences, groups, packed=True),
        "alone": lambda: torch.cat([_logits(model, [s], groups, packed=False) for s in sequences]),
        "equal packed": lambda: _logits(model, equal, groups, packed=True),
        "equal batched": lambda: _logits(model, equal, groups, packed=False),
    }
    for name, logits_of in cases.items():
        model.zero_grad()
        logits = logits_of()
        _objective(logits, equal if name.startswith("equal") else sequences, groups).backward()
        results[name] = (logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters()})
    return results


def test_packed_equals_one_by_one_equals_batched() -> None:
    (results,) = run_ranks(1, _packed_alone_and_batched)
    for one, other in (("packed", "alone"), ("equal packed", "equal batched")):
        torch.testing.assert_close(results[one][0], results[other][0], rtol=1e-5, atol=1e-5)
        for name, grad in results[one][1].items():
            torch.testing.assert_close(grad, results[other][1][name], rtol=1e-4, atol=1e-4, msg=f"{one}: {name}")


def test_context_parallel_ranks_compute_the_same_values_and_gradients() -> None:
    ((value, grads),) = run_ranks(1, _run, Layout())
    for layout in (Layout(context=2), Layout(context=4)):
        for other_value, other_grads in run_ranks(layout.world_size, _run, layout):
            assert other_value == pytest.approx(value, rel=1e-4)
            for name, grad in grads.items():
                torch.testing.assert_close(other_grads[name], grad, rtol=1e-4, atol=1e-4, msg=f"{layout}: {name}")


def test_tensor_and_context_parallel_together_with_sequence_parallelism() -> None:
    ((value, grads),) = run_ranks(1, _run, Layout())
    layout = Layout(tensor=2, context=2, sequence=True)
    results = run_ranks(layout.world_size, _run, layout)
    for other_value, other_grads in results:
        assert other_value == pytest.approx(value, rel=1e-4)
        for name, grad in grads.items():
            if other_grads[name].shape == grad.shape:
                torch.testing.assert_close(other_grads[name], grad, rtol=1e-4, atol=1e-4, msg=name)
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    whole = torch.cat([results[0][1][name], results[1][1][name]])
    torch.testing.assert_close(whole, grads[name], rtol=1e-4, atol=1e-4)


def test_what_it_does_not_implement_is_refused() -> None:
    def build() -> str:
        parallel.init(Layout(), seed=5, timeout_seconds=240)
        config = replace(_model(Layout()).config, attention_dropout=0.1)
        with pytest.raises(ValueError, match=r"attention_dropout = 0\.1"):
            layer = layer_spec(config, None).layer_specs[0]
            GPTModel(config=config, transformer_layer_spec=layer, vocab_size=VOCAB, max_sequence_length=64)
        return "refused"

    assert run_ranks(1, build) == ["refused"]


@pytest.mark.parametrize("longest_unit", [0, attention.LONGEST_PLAIN_UNIT], ids=["one by one", "one product"])
def test_responses_behind_one_prompt_attend_as_if_each_had_its_own(
    longest_unit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "LONGEST_PLAIN_UNIT", longest_unit)
    prompt, responses = 7, (3, 1, 4)
    total = prompt + sum(responses)
    mine = [torch.randn(total, heads, 8, requires_grad=True) for heads in (6, 2, 2)]
    direct = [x.detach().clone().requires_grad_() for x in mine]
    out = attention.shared_attention(*mine, (prompt, responses), 8**-0.5)
    query, key, value = direct
    expected, start = [_direct(query[:prompt], key[:prompt], value[:prompt])], prompt
    for length in responses:
        seen = [*range(prompt), *range(start, start + length)]
        expected.append(_direct(query[start : start + length], key[seen], value[seen]))
        start += length
    weight = torch.randn(out.shape)
    (out * weight).sum().backward()
    (torch.cat(expected) * weight).sum().backward()
    torch.testing.assert_close(out.double(), torch.cat(expected), rtol=1e-5, atol=1e-5)
    for a, b in zip(mine, direct, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
