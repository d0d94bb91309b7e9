"""Real Megatron models, filled from Hugging Face folders, against transformers: logits in fp32 and exported tensors.

Covers every architecture in every layout with packed sequences. Not covered here: context parallelism, gradients,
Transformer Engine's layer spec and GPUs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import layout_problems
from megatron_mcpo.distributed import parallel
from megatron_mcpo.distributed.parallel import Groups
from megatron_mcpo.mcore.head import HeadSpec
from megatron_mcpo.mcore.model import build_chunks
from megatron_mcpo.weights.full_sync import export
from megatron_mcpo.weights.load import load_hf
from megatron_mcpo.weights.mapping import hf_shapes
from tests.support.ranks import run_ranks

VOCAB = 101
SEQUENCE_LENGTHS = [(36, 84), (60, 60)]
"""Two micro-batches of packed sequences; the totals are equal and divide by the tensor ranks."""

DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_BOUNDS = {"original_max_position_embeddings": 2048, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False}
"""Bounds for which the frequencies of these small heads are others than for the default ones."""
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, untied, linear rope": (
        "llama",
        {"rope_parameters": {**DEFAULT_ROPE, "rope_type": "linear", "factor": 2.5}},
    ),
    "llama, tied, llama3 rope": (
        "llama",
        {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True, "head_dim": 32},
    ),
    "qwen2, tied, one kv head": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen2, untied": ("qwen2", {}),
    "qwen3, untied, yarn rope": ("qwen3", {"head_dim": 24, "rope_parameters": YARN_ROPE}),
    "qwen2, tied, yarn rope with other bounds": (
        "qwen2",
        {"tie_word_embeddings": True, "rope_parameters": YARN_ROPE | YARN_BOUNDS | {"attention_factor": 1.3}},
    ),
    "qwen3, untied, wide heads": ("qwen3", {"head_dim": 24}),
    "mistral, untied": ("mistral", {"sliding_window": None}),
    "qwen3 with experts": (
        "qwen3_moe",
        {"head_dim": 24, **EXPERTS, "moe_intermediate_size": 40, "norm_topk_prob": True},
    ),
    "qwen3 with experts, shares not normalized": ("qwen3_moe", {**EXPERTS, "moe_intermediate_size": 32}),
    "mixtral": ("mixtral", EXPERTS),
    "qwen3, tied, bf16 in many files": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True, "dtype": "bfloat16"}),
}
LAYOUTS = [
    Layout(),
    Layout(tensor=2),
    Layout(tensor=2, sequence=True),
    Layout(pipeline=2),
    Layout(pipeline=2, virtual_pipeline=2),
    Layout(tensor=2, pipeline=2, sequence=True),
    Layout(tensor=2, expert=2, sequence=True),
    Layout(pipeline=2, data=2, expert=2),
]


@dataclass(frozen=True)
class Case:
    """A folder, the logits [T, V] of each micro-batch as transformers computes them, and its tensors."""

    name: str
    folder: Path
    logits: list[Tensor]
    tensors: dict[str, Tensor]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    return [make_case(name, tmp_path_factory.mktemp("model")) for name in ARCHITECTURES]


def make_case(name: str, folder: Path) -> Case:
    family, options = ARCHITECTURES[name]
    sizes = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 1, "max_position_embeddings": 32768}
    config = AutoConfig.for_model(family, **{**sizes, **heads, "rope_parameters": DEFAULT_ROPE, **options})
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms and biases that are not all alike, and logits that react to everything.
            parameter.add_(0.1 * torch.randn_like(parameter)) if parameter.dim() == 1 else parameter.mul_(3)
    model.save_pretrained(folder, max_shard_size="100KB" if "many files" in name else "5GB")
    assert (folder / "model.safetensors.index.json").exists() == ("many files" in name)
    tensors = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    model = model.float()
    with torch.no_grad():
        logits = [
            torch.cat([model(ids).logits[0] for ids in tokens(micro).split(lengths, dim=1)])
            for micro, lengths in enumerate(SEQUENCE_LENGTHS)
        ]
    return Case(name, folder, logits, tensors)


def tokens(micro: int) -> Tensor:
    """[1, T] of one micro-batch."""
    generator = torch.Generator().manual_seed(micro)
    return torch.randint(0, VOCAB, (1, sum(SEQUENCE_LENGTHS[micro])), generator=generator)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_logits_and_exported_tensors_are_those_of_transformers(cases: list[Case], layout: Layout) -> None:
    """One fork for each layout, all architectures inside that it is for. `order` comes from every rank."""
    cases = [case for case in cases if not layout_problems(from_folder(case.folder), layout, 1)]
    assert len(cases) >= (3 if layout.expert > 1 else 7)
    reports = run_ranks(layout.world_size, check_layout, layout, cases, timeout=480)
    for number, case in enumerate(cases):
        found = [report[number] for report in reports]
        errors = [report["error"] for report in found if report["error"] is not None]
        assert len(errors) == layout.tensor * layout.data
        assert max(errors) <= 1e-4, case.name
        assert all(report["differing"] == [] for report in found), case.name
        assert all(report["order"] == list(hf_shapes(from_folder(case.folder))) for report in found), case.name
        assert set(found[0]["order"]) == set(case.tensors), case.name


def check_layout(layout: Layout, cases: list[Case]) -> list[dict[str, Any]]:
    groups = parallel.init(layout, seed=1, timeout_seconds=60)
    return [check_case(case, groups) for case in cases]


def check_case(case: Case, groups: Groups) -> dict[str, Any]:
    model = from_folder(case.folder)
    chunks = build_chunks(model, groups, dtype=torch.float32, head=HeadSpec(dim=8))
    heads = {name: tensor.clone() for name, tensor in head_parameters(chunks)}
    assert bool(heads) == groups.is_last_stage
    for chunk in chunks:
        fill_with_nan(chunk)
    load_hf(chunks, model, case.folder, groups)
    assert all(torch.equal(tensor, heads[name]) for name, tensor in head_parameters(chunks))
    logits = packed_logits(chunks, groups)
    assert bool(logits) == groups.is_last_stage
    assert all((padding == 0).all() for padding in (mine[:, VOCAB:] for mine in logits))
    pairs = zip(logits, case.logits if logits else [], strict=True)
    errors = [(mine[:, :VOCAB] - reference).abs().max().item() for mine, reference in pairs]
    differing, order = [], []
    for name, tensor in export(chunks, model, groups):
        order.append(name)
        if not torch.equal(tensor, case.tensors[name].float()):
            differing.append(name)
    return {"error": max(errors, default=None), "differing": differing, "order": order}


def head_parameters(chunks: list[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for chunk in chunks:
        yield from ((n, p.detach()) for n, p in chunk.named_parameters() if "contrastive_head." in n)


def fill_with_nan(chunk: nn.Module) -> None:
    """So that whatever is not loaded shows, padding of the vocabulary included."""
    with torch.no_grad():
        for name, parameter in chunk.named_parameters():
            if "contrastive_head." not in name:
                parameter.fill_(float("nan"))


def packed_logits(chunks: list[nn.Module], groups: Groups) -> list[Tensor]:
    """[T, padded vocabulary] of each micro-batch on every rank of the last stage; [] on other stages."""

    def forward(micros: Iterator[int], chunk: nn.Module) -> tuple[Tensor, Any]:
        micro = next(micros)
        output = chunk(tokens(micro), None, None, packed_seq_params=packed(SEQUENCE_LENGTHS[micro]))
        return output, lambda logits_1TV: (logits_1TV.sum(), gathered_vocab(logits_1TV, groups))

    iterators = [iter(range(len(SEQUENCE_LENGTHS))) for _ in chunks]
    with torch.no_grad():
        outputs: list[Tensor] = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=len(SEQUENCE_LENGTHS),
            seq_length=sum(SEQUENCE_LENGTHS[0]),
            micro_batch_size=1,
            forward_only=True,
        )
    return outputs


def packed(lengths: tuple[int, ...]) -> PackedSeqParams:
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    longest = max(lengths)
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def gathered_vocab(logits_1TV: Tensor, groups: Groups) -> Tensor:
    shards = [torch.empty_like(logits_1TV[0]) for _ in range(groups.layout.tensor)]
    dist.all_gather(shards, logits_1TV[0].contiguous(), group=groups.tensor)
    return torch.cat(shards, dim=-1)


def test_bf16_models_are_read_and_exported_in_bf16(cases: list[Case]) -> None:
    assert run_ranks(4, check_bf16, cases[0]) == [[]] * 4


def check_bf16(case: Case) -> list[str]:
    groups = parallel.init(Layout(tensor=2, pipeline=2), seed=1, timeout_seconds=60)
    model = from_folder(case.folder)
    chunks = build_chunks(model, groups, dtype=torch.bfloat16, head=None)
    load_hf(chunks, model, case.folder, groups)
    return [n for n, tensor in export(chunks, model, groups) if not torch.equal(tensor, case.tensors[n].bfloat16())]


def test_leftovers_of_old_checkpoints_are_ignored(cases: list[Case], tmp_path: Path) -> None:
    tied = next(case for case in cases if "tied, one kv head" in case.name)
    embedding = tied.tensors["model.embed_tokens.weight"]
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "lm_head.weight": embedding.clone()}
    write_folder(tied, {**tied.tensors, **extra}, tmp_path)
    assert run_ranks(1, loading_error, tied, tmp_path, 1) == [""]


def test_wrong_tensors_are_all_named_and_nothing_is_loaded(cases: list[Case], tmp_path: Path) -> None:
    tensors = dict(cases[0].tensors)
    del tensors["model.layers.3.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = torch.ones(65)
    tensors["model.layers.1.input_layernorm.weight"] = torch.ones(64, dtype=torch.int8)
    tensors["model.layers.0.self_attn.q_proj.lora_A"] = torch.ones(2)
    write_folder(cases[0], tensors, tmp_path)
    for message in run_ranks(2, loading_error, cases[0], tmp_path, 2):
        assert "model.layers.3.mlp.up_proj.weight: missing" in message
        assert "model.norm.weight: has shape (65,), must have (64,)" in message
        assert "model.layers.1.input_layernorm.weight: has type I8" in message
        assert "model.layers.0.self_attn.q_proj.lora_A: unknown" in message


def write_folder(case: Case, tensors: dict[str, Tensor], folder: Path) -> None:
    (folder / "config.json").write_text((case.folder / "config.json").read_text())
    save_file(tensors, folder / "model.safetensors")


def loading_error(case: Case, folder: Path, num_ranks: int) -> str:
    """Return why load_hf refuses on `num_ranks` pipeline stages, having changed nothing; '' if it loads.

    The model is described by the intact folder: what is wrong with the files is for load_hf to find.
    """
    groups = parallel.init(Layout(pipeline=num_ranks), seed=1, timeout_seconds=60)
    model = from_folder(case.folder)
    chunks = build_chunks(model, groups, dtype=torch.float32, head=None)
    for chunk in chunks:
        fill_with_nan(chunk)
    try:
        load_hf(chunks, model, folder, groups)
    except ValueError as error:
        assert all(parameter.isnan().all() for chunk in chunks for parameter in chunk.parameters())
        return str(error)
    return ""
