"""The table of weights and the cutting and joining of shards, without process groups or models.

Not covered here: that Megatron's modules compute the same as Hugging Face's with these shards, reading from files over
several ranks, and export (test_hf_parity.py).
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.weights.mapping import ParamMapping, Split, hf_shapes, parameters, table
from megatron_mcpo.weights.shards import ShardAssembler, cut_dim, fill, shard_shape, slices
from tests.support.families import FAMILIES, MODEL, WITH_EXPERTS


@st.composite
def models(draw: st.DrawFn) -> tuple[ModelConfig, int]:
    """A model of any shape with a number of tensor ranks that Megatron accepts for it."""
    num_ranks = draw(st.integers(1, 4))
    kv_heads = draw(st.sampled_from([n for n in range(1, 9) if n % num_ranks == 0 or num_ranks % n == 0]))
    heads = kv_heads * num_ranks * draw(st.integers(1, 3))
    head_dim = 2 * num_ranks * draw(st.integers(1, 3))
    model = replace(
        draw(st.sampled_from(FAMILIES + WITH_EXPERTS)),
        num_layers=1,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=draw(st.integers(1, 9)),
        ffn_hidden_size=num_ranks * draw(st.integers(1, 5)),
        vocab_size=draw(st.integers(1, 30)),
    )
    return model, num_ranks


def full_tensors(row: ParamMapping) -> list[Tensor]:
    """Tensors of the row's shapes in which every value occurs once."""
    sizes = [torch.Size(shape).numel() for shape in row.shapes]
    values = torch.arange(1, sum(sizes) + 1, dtype=torch.float32).split(sizes)
    return [value.view(shape) for value, shape in zip(values, row.shapes, strict=True)]


def cut_all(row: ParamMapping, full: list[Tensor], num_ranks: int) -> list[Tensor]:
    """The shards of every rank that has one of its own, each written over values that must vanish."""
    dim = cut_dim(row)
    num_ranks = row.num_shards(Layout(tensor=num_ranks))
    shards = [torch.full(shard_shape(row, num_ranks), float("nan")) for _ in range(num_ranks)]
    for rank, shard in enumerate(shards):
        fill(row, shard, lambda p: full[p.tensor].narrow(dim, p.start, len(p)), rank=rank, num_ranks=num_ranks)
    return shards


@settings(deadline=None, max_examples=150)
@given(models(), st.integers(1, 40))
def test_pieces_of_all_shards_join_to_the_full_tensors(case: tuple[ModelConfig, int], step: int) -> None:
    model, num_ranks = case
    for row in table(model):
        full, dim = full_tensors(row), cut_dim(row)
        shards = cut_all(row, full, 1 if row.split is Split.REPLICATED else num_ranks)
        joining = ShardAssembler(row)
        back = {}
        for start in range(0, shards[0].shape[dim], step):
            for number, tensor in joining.add([s.split(step, dim)[start // step] for s in shards], start=start):
                assert number not in back
                back[number] = tensor
        assert sorted(back) == list(range(len(full)))
        assert all(torch.equal(tensor, back[number]) for number, tensor in enumerate(full)), row


def test_a_full_tensor_is_there_with_its_last_element() -> None:
    """A gate is handed out before the memory of its up is taken."""
    row = next(row for row in table(MODEL) if row.split is Split.RANKS)
    halves = [shard.chunk(2) for shard in cut_all(row, full_tensors(row), 2)]
    joining = ShardAssembler(row)
    assert [number for number, _ in joining.add([first for first, _ in halves])] == [0]
    assert [number for number, _ in joining.add([second for _, second in halves], start=len(halves[0][0]))] == [1]


@settings(deadline=None, max_examples=150)
@given(models())
def test_shards_hold_every_value_once_and_zeros_elsewhere(case: tuple[ModelConfig, int]) -> None:
    model, num_ranks = case
    for row in table(model):
        if row.split is Split.REPLICATED:
            continue
        full, shards = full_tensors(row), cut_all(row, full_tensors(row), num_ranks)
        values = torch.cat([shard.flatten() for shard in shards])
        assert torch.equal(values[values != 0].sort().values, torch.cat([t.flatten() for t in full]))


@settings(deadline=None, max_examples=100)
@given(models())
def test_fused_qkv_is_grouped_by_key_value_head(case: tuple[ModelConfig, int]) -> None:
    """Against the layout written the other way round: as views of heads."""
    model, num_ranks = case
    row = next(row for row in table(model) if row.megatron == ("self_attention.linear_qkv.weight",))
    q, k, v = full_tensors(row)
    kv, d, h = model.num_kv_heads, model.head_dim, model.hidden_size
    heads = torch.cat([q.view(kv, -1, d, h), k.view(kv, 1, d, h), v.view(kv, 1, d, h)], dim=1)
    expected = heads.reshape(-1, h).chunk(num_ranks)
    assert all(torch.equal(a, b) for a, b in zip(cut_all(row, [q, k, v], num_ranks), expected, strict=True))


@settings(deadline=None, max_examples=100)
@given(models())
def test_each_rank_holds_its_own_gate_and_up_rows(case: tuple[ModelConfig, int]) -> None:
    model, num_ranks = case
    row = next(row for row in table(replace(model, experts=None)) if row.split is Split.RANKS)
    gate, up = full_tensors(row)
    for rank, shard in enumerate(cut_all(row, [gate, up], num_ranks)):
        assert torch.equal(shard, torch.cat([gate.chunk(num_ranks)[rank], up.chunk(num_ranks)[rank]]))


def test_vocabulary_is_padded_with_zero_rows_even_over_whole_shards() -> None:
    embedding = next(row for row in table(replace(MODEL, vocab_size=5)) if row.split is Split.ROWS)
    full = full_tensors(embedding)
    shards = cut_all(embedding, full, 4)
    assert [tuple(shard.shape) for shard in shards] == [(2, 12)] * 4
    assert torch.equal(torch.cat(shards)[:5], full[0])
    assert torch.cat(shards)[5:].abs().sum() == 0
    assert slices(embedding, rank=3, num_ranks=4) == []


@pytest.mark.parametrize("model", FAMILIES + WITH_EXPERTS, ids=lambda m: m.family)
@pytest.mark.parametrize("pipeline, virtual, expert", [(1, 1, 1), (2, 1, 2), (4, 1, 4), (2, 2, 2), (4, 2, 1)])
def test_every_layout_exports_the_same_names_in_the_same_order(
    model: ModelConfig, pipeline: int, virtual: int, expert: int
) -> None:
    layout = Layout(pipeline=pipeline, virtual_pipeline=virtual, data=4, expert=expert if model.experts else 1)
    found = [name for p in parameters(model, layout) if not p.row.tied for name in p.hugging_face]
    assert found == list(hf_shapes(model))
    assert len(set(found)) == len(found)


def test_interleaved_layers_go_round_the_stages() -> None:
    """Megatron deals chunk 0 of all stages first: with 8 layers over 2 stages of 2 chunks, 0-1 2-3 | 4-5 6-7."""
    norms = [p for p in parameters(MODEL, Layout(pipeline=2, virtual_pipeline=2)) if "post_attention" in str(p)]
    assert [(p.stage, p.chunk) for p in norms] == [(0, 0), (0, 0), (1, 0), (1, 0), (0, 1), (0, 1), (1, 1), (1, 1)]
    assert [p.megatron[0].split(".")[2] for p in norms] == ["0", "1"] * 4


def test_an_expert_rank_holds_neighbouring_experts_and_numbers_them_from_0() -> None:
    found = [p for p in parameters(WITH_EXPERTS[0], Layout(data=2, expert=2)) if "down_proj" in p.hugging_face[0]][:4]
    assert [p.hugging_face[0] for p in found] == [f"model.layers.0.mlp.experts.{e}.down_proj.weight" for e in range(4)]
    assert [p.expert_rank for p in found] == [0, 0, 1, 1]
    assert [p.megatron for p in found[2:]] == [
        (f"decoder.layers.0.mlp.experts.local_experts.{e}.linear_fc2.weight",
         f"decoder.layers.0.mlp.experts.linear_fc2.weight{e}")
        for e in range(2)
    ]  # fmt: skip
    rest = [p for p in parameters(WITH_EXPERTS[0], Layout(data=2, expert=2)) if not p.row.expert]
    assert {p.expert_rank for p in rest} == {None}


def test_both_layer_specs_are_in_the_table() -> None:
    """Transformer Engine fuses each norm into the linear layer behind it and so gives it another name."""
    names = {name for parameter in parameters(MODEL, Layout()) for name in parameter.megatron}
    assert {"decoder.layers.7.input_layernorm.weight", "decoder.layers.7.pre_mlp_layernorm.weight"} <= names
    assert "decoder.layers.7.self_attention.linear_qkv.layer_norm_weight" in names
    assert "decoder.layers.7.mlp.linear_fc1.layer_norm_weight" in names


@pytest.mark.parametrize("model", FAMILIES, ids=lambda m: m.family)
def test_names_and_shapes_are_those_of_transformers(model: ModelConfig) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        model.family,
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        tie_word_embeddings=model.tied_embeddings,
    )
    with torch.device("meta"):
        reference = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in reference.named_parameters()}
    assert hf_shapes(model) == shapes
