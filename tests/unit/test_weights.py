"""The mapping registry and the cutting and assembling of shards, without process groups or models.

Not covered here: that Megatron's modules compute the same as Hugging Face's with these shards, reading from files over
several ranks, and export (test_hf_parity.py).
"""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.weights.buckets import fill_buckets
from megatron_mcpo.weights.checkpoint_layout import checkpoint_entries, global_shape, problems
from megatron_mcpo.weights.mapping import ParamMapping, Split, hf_shapes, parameters, registry
from megatron_mcpo.weights.shards import ShardAssembler, cut_dim, fill, shard_shape, shard_slices
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


def full_tensors(mapping: ParamMapping) -> list[Tensor]:
    """Tensors of the mapping's shapes in which every value occurs once."""
    sizes = [torch.Size(shape).numel() for shape in mapping.shapes]
    values = torch.arange(1, sum(sizes) + 1, dtype=torch.float32).split(sizes)
    return [value.view(shape) for value, shape in zip(values, mapping.shapes, strict=True)]


def cut_all(mapping: ParamMapping, full: list[Tensor], num_ranks: int) -> list[Tensor]:
    """The shards of every rank that has one of its own, each written over values that must vanish."""
    dim = cut_dim(mapping)
    num_ranks = mapping.num_shards(Layout(tensor=num_ranks))
    shards = [torch.full(shard_shape(mapping, num_ranks), float("nan")) for _ in range(num_ranks)]
    for rank, shard in enumerate(shards):
        fill(mapping, shard, lambda p: full[p.tensor].narrow(dim, p.start, len(p)), rank=rank, num_ranks=num_ranks)
    return shards


@settings(deadline=None, max_examples=150)
@given(models(), st.integers(1, 40))
def test_slices_of_all_shards_assemble_to_the_full_tensors(case: tuple[ModelConfig, int], step: int) -> None:
    model, num_ranks = case
    for mapping in registry(model):
        full, dim = full_tensors(mapping), cut_dim(mapping)
        shards = cut_all(mapping, full, 1 if mapping.split is Split.REPLICATED else num_ranks)
        assembler = ShardAssembler(mapping)
        back = {}
        for start in range(0, shards[0].shape[dim], step):
            for number, tensor in assembler.add([s.split(step, dim)[start // step] for s in shards], start=start):
                assert number not in back
                back[number] = tensor
        assert sorted(back) == list(range(len(full)))
        assert all(torch.equal(tensor, back[number]) for number, tensor in enumerate(full)), mapping


def test_a_full_tensor_is_there_with_its_last_element() -> None:
    """A gate is handed out before the memory of its up is taken."""
    mapping = next(mapping for mapping in registry(MODEL) if mapping.split is Split.RANKS)
    halves = [shard.chunk(2) for shard in cut_all(mapping, full_tensors(mapping), 2)]
    assembler = ShardAssembler(mapping)
    assert [number for number, _ in assembler.add([first for first, _ in halves])] == [0]
    assert [number for number, _ in assembler.add([second for _, second in halves], start=len(halves[0][0]))] == [1]


@settings(deadline=None, max_examples=150)
@given(models())
def test_shards_hold_every_value_once_and_zeros_elsewhere(case: tuple[ModelConfig, int]) -> None:
    model, num_ranks = case
    for mapping in registry(model):
        if mapping.split is Split.REPLICATED:
            continue
        full, shards = full_tensors(mapping), cut_all(mapping, full_tensors(mapping), num_ranks)
        values = torch.cat([shard.flatten() for shard in shards])
        assert torch.equal(values[values != 0].sort().values, torch.cat([t.flatten() for t in full]))


@settings(deadline=None, max_examples=100)
@given(models())
def test_fused_qkv_is_grouped_by_key_value_head(case: tuple[ModelConfig, int]) -> None:
    """Against the layout written the other way round: as views of heads."""
    model, num_ranks = case
    mapping = next(mapping for mapping in registry(model) if mapping.megatron == ("self_attention.linear_qkv.weight",))
    q, k, v = full_tensors(mapping)
    kv, d, h = model.num_kv_heads, model.head_dim, model.hidden_size
    heads = torch.cat([q.view(kv, -1, d, h), k.view(kv, 1, d, h), v.view(kv, 1, d, h)], dim=1)
    expected = heads.reshape(-1, h).chunk(num_ranks)
    assert all(torch.equal(a, b) for a, b in zip(cut_all(mapping, [q, k, v], num_ranks), expected, strict=True))


@settings(deadline=None, max_examples=100)
@given(models())
def test_each_rank_holds_its_own_gate_and_up_rows(case: tuple[ModelConfig, int]) -> None:
    model, num_ranks = case
    mapping = next(mapping for mapping in registry(replace(model, experts=None)) if mapping.split is Split.RANKS)
    gate, up = full_tensors(mapping)
    for rank, shard in enumerate(cut_all(mapping, [gate, up], num_ranks)):
        assert torch.equal(shard, torch.cat([gate.chunk(num_ranks)[rank], up.chunk(num_ranks)[rank]]))


def test_vocabulary_is_padded_with_zero_rows_even_over_whole_shards() -> None:
    embedding = next(mapping for mapping in registry(replace(MODEL, vocab_size=5)) if mapping.split is Split.ROWS)
    full = full_tensors(embedding)
    shards = cut_all(embedding, full, 4)
    assert [tuple(shard.shape) for shard in shards] == [(2, 12)] * 4
    assert torch.equal(torch.cat(shards)[:5], full[0])
    assert torch.cat(shards)[5:].abs().sum() == 0
    assert shard_slices(embedding, rank=3, num_ranks=4) == []


@pytest.mark.parametrize("model", FAMILIES + WITH_EXPERTS, ids=lambda m: m.family)
@pytest.mark.parametrize("pipeline, virtual, expert", [(1, 1, 1), (2, 1, 2), (4, 1, 4), (2, 2, 2), (4, 2, 1)])
def test_every_layout_exports_the_same_names_in_the_same_order(
    model: ModelConfig, pipeline: int, virtual: int, expert: int
) -> None:
    layout = Layout(pipeline=pipeline, virtual_pipeline=virtual, data=4, expert=expert if model.experts else 1)
    found = [name for p in parameters(model, layout) if not p.mapping.tied for name in p.hugging_face]
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
    rest = [p for p in parameters(WITH_EXPERTS[0], Layout(data=2, expert=2)) if not p.mapping.expert]
    assert {p.expert_rank for p in rest} == {None}


def test_both_layer_specs_are_in_the_registry() -> None:
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


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9))), st.integers(1, 20))
def test_buckets_hold_neighbours_and_as_many_as_fit_on_every_rank(sizes: list[tuple[int, int]], limit: int) -> None:
    buckets = list(fill_buckets(((number, pair) for number, pair in enumerate(sizes)), limit))
    assert [number for bucket in buckets for number in bucket] == list(range(len(sizes)))

    def fullest(bucket: list[int]) -> int:
        return max(sum(sizes[number][rank] for number in bucket) for rank in (0, 1))

    assert all(bucket and (fullest(bucket) <= limit or len(bucket) == 1) for bucket in buckets)
    assert all(fullest([*bucket, following[0]]) > limit for bucket, following in pairwise(buckets))


@pytest.mark.parametrize("model", FAMILIES + WITH_EXPERTS, ids=lambda m: m.family)
def test_a_checkpoint_of_another_model_is_described_line_by_line(model: ModelConfig) -> None:
    shapes = {entry.key: global_shape(model, entry, 4) for entry in checkpoint_entries(model)}
    assert shapes["embedding.word_embeddings.weight"][0] > model.vocab_size, "padding is no difference"
    shapes |= {"contrastive_head.weight": (7, 12), "optimizer.state.param.anything": (3,)}
    dtypes = dict.fromkeys(shapes, torch.bfloat16)
    assert problems(model, shapes, dtypes) == []
    norm, embedding = "decoder.final_layernorm.weight", "embedding.word_embeddings.weight"
    missing = {key: shape for key, shape in shapes.items() if key != norm}
    assert problems(model, missing, dtypes) == [f"{norm}: missing"]
    assert problems(model, shapes | {norm: (13,)}, dtypes) == [f"{norm}: has shape (13,), must have (12,)"]
    assert problems(model, shapes | {embedding: (20, 12)}, dtypes) == [
        f"{embedding}: has shape (20, 12), must have (21, 12)"
    ]
    assert problems(model, shapes, dtypes | {norm: torch.float16}) == [
        f"{norm}: has type torch.float16, must be bf16 or fp32"
    ]
    assert problems(model, shapes | {"bias": (1,)}, dtypes) == [
        f"bias: unknown, the {model.family} model has no such tensor"
    ]
