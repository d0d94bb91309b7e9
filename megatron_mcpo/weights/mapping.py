"""Register which Megatron parameter holds which Hugging Face tensors, for both directions of a conversion.

Knows names, shapes and places; moves no tensor. Layers are numbered from 0 over the whole model in Hugging Face names
and from 0 within a pipeline chunk in Megatron's.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from math import prod
from pathlib import Path

from megatron_mcpo.config.hf_files import is_computed, is_sharded, read_headers, same_values
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import Experts, ModelConfig

HEAD_PREFIX = "contrastive_head."
"""Parameters of the contrastive head have no Hugging Face counterpart: never loaded, never exported."""
_DTYPES = ("F64", "F32", "F16", "BF16")
_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_SHOWN = 50
"""Wrong tensors that a message names."""


class Split(Enum):
    """Say how a parameter is divided over the tensor-parallel ranks."""

    REPLICATED = "replicated"
    """Every rank holds all of it."""
    ROWS = "rows"
    """Dimension 0 is cut; the last shards are padded with zero rows where it doesn't divide (the vocabulary)."""
    COLUMNS = "columns"
    """Dimension 1 is cut."""
    GROUPS = "groups"
    """Dimension 0 is cut, after group g of every tensor was laid behind group g of the one before.

    Queries, keys and values: a group is a key-value head with the query heads that use it (the order that
    Megatron-Core's SelfAttention reads).
    """
    RANKS = "ranks"
    """As GROUPS with a group for every rank: gate and up projection, of which each rank holds its own parts."""


class Place(Enum):
    """Say where in the pipeline a parameter is."""

    FIRST = "first chunk"
    LAYER = "the chunk of its layer"
    LAST = "last chunk"


@dataclass(frozen=True, kw_only=True)
class ParamMapping:
    """Say how one kind of parameter is named, shaped and divided on both sides.

    megatron: names the parameter may have: in Megatron's local layer spec, then in its Transformer Engine spec;
        {expert} stands for an expert's number, here among those of its rank
    hugging_face: the tensors it is made of, in order; shapes: their full shapes
    groups: for Split.GROUPS, how many
    expert: of one expert: its number comes behind "experts" in Hugging Face names; tensor ranks don't divide it
    tied: a second copy of the input embedding, for the output layer of another pipeline chunk; there only if needed,
        loaded but not exported
    """

    megatron: tuple[str, ...]
    hugging_face: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    split: Split
    place: Place = Place.LAYER
    groups: int = 1
    expert: bool = False
    tied: bool = False

    def num_shards(self, layout: Layout) -> int:
        """Return over how many ranks it is divided."""
        return 1 if self.expert else layout.tensor

    def num_different(self, layout: Layout) -> int:
        """Return how many of these shards differ: one where every rank holds the same."""
        return 1 if self.split is Split.REPLICATED else self.num_shards(layout)


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of the whole model: its mapping, its names filled in, and where it is.

    stage: pipeline rank; chunk: which of the stage's virtual pipeline chunks
    expert_rank: of the ranks that have it; None: all of them
    """

    mapping: ParamMapping
    megatron: tuple[str, ...]
    hugging_face: tuple[str, ...]
    stage: int
    chunk: int
    expert_rank: int | None = None


def registry(model: ModelConfig) -> tuple[ParamMapping, ...]:
    """Return the mappings of one family, in the order of export: embedding, a layer, final norm, output layer."""
    hidden, vocab = model.hidden_size, model.vocab_size
    embedding = ParamMapping(
        megatron=("embedding.word_embeddings.weight",),
        hugging_face=(_EMBEDDING,),
        shapes=((vocab, hidden),),
        split=Split.ROWS,
        place=Place.FIRST,
    )
    final_norm = ParamMapping(
        megatron=("decoder.final_layernorm.weight",),
        hugging_face=("model.norm.weight",),
        shapes=((hidden,),),
        split=Split.REPLICATED,
        place=Place.LAST,
    )
    output = ParamMapping(
        megatron=("output_layer.weight",),
        hugging_face=(_EMBEDDING if model.tied_embeddings else _OUTPUT,),
        shapes=((vocab, hidden),),
        split=Split.ROWS,
        place=Place.LAST,
        tied=model.tied_embeddings,
    )
    mlp = _expert_mappings(model, model.experts) if model.experts else _mlp_mappings(model)
    return (embedding, *_attention_mappings(model), *mlp, final_norm, output)


def parameters(model: ModelConfig, layout: Layout) -> Iterator[Parameter]:
    """Yield every parameter of the model, of all pipeline stages, in the order of export: the same on every rank."""
    mappings = registry(model)
    for mapping in mappings:
        if mapping.place is Place.FIRST:
            yield Parameter(
                mapping=mapping, megatron=mapping.megatron, hugging_face=mapping.hugging_face, stage=0, chunk=0
            )
    num_experts = model.experts.count if model.experts else layout.expert
    chunk_layers = layout.chunk_layers(model.num_layers)
    per_expert_rank, rest_of_experts = divmod(num_experts, layout.expert)
    assert sum(chunk_layers) == model.num_layers and not rest_of_experts, "layout_problems() refuses them"
    layer_mappings = [mapping for mapping in mappings if mapping.place is Place.LAYER]
    in_layer: list[tuple[ParamMapping, int | None]] = [
        (mapping, None) for mapping in layer_mappings if not mapping.expert
    ]
    in_layer += [(mapping, expert) for expert in range(num_experts) for mapping in layer_mappings if mapping.expert]
    places = [(chunk, number) for chunk, count in enumerate(chunk_layers) for number in range(count)]
    for layer, (place, in_chunk) in enumerate(places):
        chunk, stage = divmod(place, layout.pipeline)
        for mapping, expert in in_layer:
            number, rank = (None, None) if expert is None else (expert % per_expert_rank, expert // per_expert_rank)
            yield Parameter(
                mapping=mapping,
                megatron=tuple(f"decoder.layers.{in_chunk}.{_number(name, number)}" for name in mapping.megatron),
                hugging_face=tuple(f"model.layers.{layer}.{_number(name, expert)}" for name in mapping.hugging_face),
                stage=stage,
                chunk=chunk,
                expert_rank=rank,
            )
    last_stage, last_chunk = layout.pipeline - 1, layout.virtual_pipeline - 1
    for mapping in mappings:
        if mapping.place is Place.LAST:
            yield Parameter(
                mapping=mapping,
                megatron=mapping.megatron,
                hugging_face=mapping.hugging_face,
                stage=last_stage,
                chunk=last_chunk,
            )


def _number(name: str, expert: int | None) -> str:
    return name if expert is None else name.format(expert=expert)


def hf_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return names and full shapes of the Hugging Face tensors, in the order of export, without tied ones."""
    return {
        name: shape
        for parameter in parameters(model, Layout())
        if not parameter.mapping.tied
        for name, shape in zip(parameter.hugging_face, parameter.mapping.shapes, strict=True)
    }


def total_params(model: ModelConfig) -> int:
    """Count the parameters of the whole model as Hugging Face does: tied embeddings once, no contrastive head."""
    return sum(map(prod, hf_shapes(model).values()))


def checkpoint_bytes(model: ModelConfig, *, element_size: int) -> int:
    """Estimate the bytes of a checkpoint: every weight, its fp32 copy and two moments, without the head."""
    return total_params(model) * (element_size + 12)


def tensor_problems(model: ModelConfig, folder: Path) -> list[str]:
    """Return how the tensors in `folder` differ from those of `model`: the fix, then a line for each; [] if they agree.

    Reads headers, and values only of an output layer beside a tied embedding; a sharded checkpoint is checked when it
    is loaded. Raises ConfigError for files that can't be read.
    """
    if is_sharded(folder):
        return []
    headers, expected = read_headers(folder), hf_shapes(model)
    problems = [f"{name}: missing" for name in expected if name not in headers]
    for name, header in headers.items():
        if name not in expected:
            if not is_computed(name) and not (model.tied_embeddings and name == _OUTPUT):
                problems.append(f"{name}: unknown, the {model.family} model has no such tensor")
        elif header.shape != expected[name]:
            problems.append(f"{name}: has shape {header.shape}, must have {expected[name]}")
        elif header.dtype not in _DTYPES:
            problems.append(f"{name}: has type {header.dtype}, must be one of {', '.join(_DTYPES)}")
    if problems:
        rule = "its safetensors must hold the model that its config.json describes; download both again"
        more = [f"  and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        return [f"model.path = {str(folder)!r}: {rule}:", *(f"  {problem}" for problem in problems[:_SHOWN]), *more]
    if model.tied_embeddings and _OUTPUT in headers and not same_values(headers[_OUTPUT], headers[_EMBEDDING]):
        rule = f"{_OUTPUT} must equal {_EMBEDDING} where config.json has tie_word_embeddings = true"
        fix = f"Set that to false to train this output layer, or remove {_OUTPUT} to use the embedding"
        return [f"model.path = {str(folder)!r}: {rule} (programs differ in which one they use). {fix}."]
    return []


def _attention_mappings(model: ModelConfig) -> list[ParamMapping]:
    """Return mappings whose names go behind decoder.layers.N. and model.layers.N., as those of `_mlp_mappings`."""
    hidden, head = model.hidden_size, model.head_dim
    q_rows, kv_rows = model.num_heads * head, model.num_kv_heads * head
    norm = ParamMapping(
        megatron=("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        hugging_face=("input_layernorm.weight",),
        shapes=((hidden,),),
        split=Split.REPLICATED,
    )
    qkv = [
        ParamMapping(
            megatron=(f"self_attention.linear_qkv.{kind}",),
            hugging_face=tuple(f"self_attn.{x}_proj.{kind}" for x in "qkv"),
            shapes=tuple((rows, *columns) for rows in (q_rows, kv_rows, kv_rows)),
            split=Split.GROUPS,
            groups=model.num_kv_heads,
        )
        for kind, columns in (("weight", (hidden,)), ("bias", ()))
        if kind == "weight" or model.qkv_bias
    ]
    qk_norms = [
        ParamMapping(
            megatron=(f"self_attention.{x}_layernorm.weight",),
            hugging_face=(f"self_attn.{x}_norm.weight",),
            shapes=((head,),),
            split=Split.REPLICATED,
        )
        for x in "qk"
        if model.qk_norm
    ]
    projection = ParamMapping(
        megatron=("self_attention.linear_proj.weight",),
        hugging_face=("self_attn.o_proj.weight",),
        shapes=((hidden, q_rows),),
        split=Split.COLUMNS,
    )
    return [norm, *qkv, *qk_norms, projection]


def _mlp_mappings(model: ModelConfig) -> list[ParamMapping]:
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    return [
        ParamMapping(
            megatron=("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
            hugging_face=("post_attention_layernorm.weight",),
            shapes=((hidden,),),
            split=Split.REPLICATED,
        ),
        ParamMapping(
            megatron=("mlp.linear_fc1.weight",),
            hugging_face=("mlp.gate_proj.weight", "mlp.up_proj.weight"),
            shapes=((ffn, hidden), (ffn, hidden)),
            split=Split.RANKS,
        ),
        ParamMapping(
            megatron=("mlp.linear_fc2.weight",),
            hugging_face=("mlp.down_proj.weight",),
            shapes=((hidden, ffn),),
            split=Split.COLUMNS,
        ),
    ]


def _expert_mappings(model: ModelConfig, experts: Experts) -> list[ParamMapping]:
    hidden, ffn = model.hidden_size, experts.ffn_hidden_size
    if model.family == "mixtral":
        router, gate, up, down = "block_sparse_moe.gate", "w1", "w3", "w2"
        expert = "block_sparse_moe.experts.{expert}"
    else:
        router, gate, up, down = "mlp.gate", "gate_proj", "up_proj", "down_proj"
        expert = "mlp.experts.{expert}"
    return [
        ParamMapping(
            megatron=("pre_mlp_layernorm.weight",),
            hugging_face=("post_attention_layernorm.weight",),
            shapes=((hidden,),),
            split=Split.REPLICATED,
        ),
        ParamMapping(
            megatron=("mlp.router.weight",),
            hugging_face=(f"{router}.weight",),
            shapes=((experts.count, hidden),),
            split=Split.REPLICATED,
        ),
        ParamMapping(
            megatron=("mlp.experts.local_experts.{expert}.linear_fc1.weight", "mlp.experts.linear_fc1.weight{expert}"),
            hugging_face=(f"{expert}.{gate}.weight", f"{expert}.{up}.weight"),
            shapes=((ffn, hidden), (ffn, hidden)),
            split=Split.RANKS,
            expert=True,
        ),
        ParamMapping(
            megatron=("mlp.experts.local_experts.{expert}.linear_fc2.weight", "mlp.experts.linear_fc2.weight{expert}"),
            hugging_face=(f"{expert}.{down}.weight",),
            shapes=((hidden, ffn),),
            split=Split.COLUMNS,
            expert=True,
        ),
    ]
