"""Reading a Hugging Face folder's numbers and files, and the rules of dividing a model and of the engine.

Not covered here: that the numbers give Hugging Face's results, tensors that are not the model's (test_hf_parity.py).
"""

import json
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import (
    Experts,
    ModelConfig,
    RopeScaling,
    engine_problems,
    layout_problems,
    quantization_problems,
)
from tests.support import families

QWEN25 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LLAMA32 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
QWEN3_V5 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "dtype": "float32",
    "eos_token_id": 2,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_types": ["full_attention"] * 28,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "pad_token_id": None,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "sliding_window": None,
    "tie_word_embeddings": True,
    "transformers_version": "5.12.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


NO_TENSORS = struct.pack("<Q", 2) + b"{}"
"""A safetensors file: the length of the header, the header."""


def write(folder: Path, values: dict[str, Any], *, weights: str = "model.safetensors") -> Path:
    (folder / "config.json").write_text(json.dumps(values))
    (folder / weights).write_bytes(NO_TENSORS)
    return folder


def problems_of(folder: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        from_folder(folder)
    return caught.value.problems


@pytest.mark.parametrize(
    ("names", "holds"),
    [
        ([], "nothing"),
        (["README.md", "qwen3-0.6b/config.json"], "README.md, qwen3-0.6b/"),
        ([f"{letter}.bin" for letter in "gfedcba"], "a.bin, b.bin, c.bin, d.bin, e.bin, 2 more"),
    ],
)
def test_a_folder_without_a_model_is_described(tmp_path: Path, names: list[str], holds: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert problems_of(tmp_path) == [
        f"model.path = {str(tmp_path)!r}: must hold a model: config.json, a tokenizer and safetensors (it holds "
        f"{holds}). Get one with `hf download Qwen/Qwen3-0.6B --local-dir models/qwen3-0.6b` and name that folder."
    ]


def test_transformers_4_qwen2(tmp_path: Path) -> None:
    assert from_folder(write(tmp_path, QWEN25)) == ModelConfig(
        family="qwen2",
        num_layers=24,
        hidden_size=896,
        ffn_hidden_size=4864,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        vocab_size=151936,
        max_positions=32768,
        norm_eps=1e-6,
        rope_theta=1e6,
        rope_scaling=None,
        tied_embeddings=True,
        qkv_bias=True,
        qk_norm=False,
        experts=None,
        eos_token_ids=(151645,),
    )


def test_transformers_4_llama_with_scaled_rope(tmp_path: Path) -> None:
    model = from_folder(write(tmp_path, LLAMA32))
    assert model.rope_scaling == RopeScaling(
        kind="llama3", factor=32.0, low_freq_factor=1, high_freq_factor=4, original_max_positions=8192
    )
    assert (model.family, model.rope_theta, model.qkv_bias, model.qk_norm) == ("llama", 500000.0, False, False)
    assert model.eos_token_ids == (128001, 128008, 128009)


def test_transformers_5_qwen3(tmp_path: Path) -> None:
    model = from_folder(write(tmp_path, QWEN3_V5))
    assert (model.family, model.head_dim, model.rope_theta, model.qk_norm) == ("qwen3", 128, 1e6, True)


def test_linear_scaling_in_both_spellings(tmp_path: Path) -> None:
    linear = RopeScaling(kind="linear", factor=2.5)
    old = {**QWEN25, "rope_scaling": {"type": "linear", "factor": 2.5}}
    assert from_folder(write(tmp_path, old)).rope_scaling == linear
    new = {**QWEN3_V5, "rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e6}}
    assert from_folder(write(tmp_path, new)).rope_scaling == linear


def test_missing_optional_fields_mean_what_transformers_assumes(tmp_path: Path) -> None:
    gone = ("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "tie_word_embeddings")
    llama = from_folder(write(tmp_path, {k: v for k, v in LLAMA32.items() if k not in gone}))
    assert (llama.num_kv_heads, llama.head_dim, llama.rope_theta, llama.tied_embeddings) == (32, 64, 10000.0, False)
    qwen3 = from_folder(write(tmp_path, {k: v for k, v in QWEN3_V5.items() if k != "head_dim"}))
    assert qwen3.head_dim == 128


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "qwen3_moe", "mixtral"])
def test_reads_what_transformers_writes(tmp_path: Path, family: str) -> None:
    from transformers import AutoConfig

    extra = {"eos_token_id": 5, **({"sliding_window": None} if family == "mistral" else {})}
    architectures = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    architectures |= {"mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM"}
    architectures["qwen3_moe"] = "Qwen3MoeForCausalLM"
    config = AutoConfig.for_model(family, architectures=[architectures[family]], **extra)
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(NO_TENSORS)
    model = from_folder(tmp_path)
    assert (model.family, model.num_layers, model.vocab_size) == (family, config.num_hidden_layers, config.vocab_size)
    assert (model.num_heads, model.num_kv_heads) == (config.num_attention_heads, config.num_key_value_heads)
    assert (model.hidden_size, model.rope_theta) == (config.hidden_size, config.rope_parameters["rope_theta"])
    experts = {
        "qwen3_moe": Experts(count=128, per_token=8, ffn_hidden_size=768, normalized=False),
        "mixtral": Experts(count=8, per_token=2, ffn_hidden_size=14336, normalized=True),
    }
    assert model.experts == experts.get(family)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("attention_dropout", 0.1),
        ("pretraining_tp", 2),
        ("partial_rotary_factor", 0.5),
        ("rope_interleaved", True),
        ("sliding_window", 4096),
        ("auto_map", {"AutoModel": "modeling.Mine"}),
        ("quantization_config", {"quant_method": "awq"}),
        ("model_type", "mistral"),
        ("num_key_value_heads", 5),
        ("head_dim", 63),
        ("hidden_size", "2048"),
        ("rms_norm_eps", None),
        ("eos_token_id", [128256]),
        ("embedding_multiplier", 12.0),
    ],
)
def test_a_field_that_changes_the_result_is_refused_by_name(tmp_path: Path, field: str, value: Any) -> None:
    problems = problems_of(write(tmp_path, {**LLAMA32, field: value}))
    assert len(problems) == 1
    assert field in problems[0]


QWEN3_MOE = {
    **{key: value for key, value in QWEN3_V5.items() if key not in ("architectures", "model_type")},
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "router_aux_loss_coef": 0.001,
}


def test_experts(tmp_path: Path) -> None:
    model = from_folder(write(tmp_path, QWEN3_MOE))
    assert model.experts == Experts(count=128, per_token=8, ffn_hidden_size=768, normalized=True)
    assert model.qk_norm
    coder = {"qkv_bias": False, "shared_expert_intermediate_size": 0, "use_qk_norm": True}
    assert from_folder(write(tmp_path, {**QWEN3_MOE, **coder})) == model


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("decoder_sparse_step", 2),
        ("mlp_only_layers", [0]),
        ("num_experts", None),
        ("num_experts_per_tok", 129),
        ("moe_intermediate_size", 0),
        *(("shared_expert_intermediate_size", value) for value in (4, None)),
        ("qkv_bias", True),
        ("use_qk_norm", False),
    ],
)
def test_experts_that_are_not_built_are_refused(tmp_path: Path, field: str, value: Any) -> None:
    (problem,) = problems_of(write(tmp_path, {**QWEN3_MOE, field: value}))
    assert field in problem


def test_jitter_and_a_window_left_out_are_refused(tmp_path: Path) -> None:
    mixtral = {**LLAMA32, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4}
    mixtral |= {"num_experts_per_tok": 2, "rope_scaling": None}
    assert from_folder(write(tmp_path, mixtral)).experts is not None
    (problem,) = problems_of(write(tmp_path, {**mixtral, "router_jitter_noise": 0.1}))
    assert "router_jitter_noise = 0.1" in problem
    mistral = {**LLAMA32, "architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    (problem,) = problems_of(write(tmp_path, mistral))
    assert "sliding_window = 4096" in problem
    assert from_folder(write(tmp_path, {**mistral, "sliding_window": None})).family == "mistral"


def test_fields_of_experts_are_unknown_to_dense_models(tmp_path: Path) -> None:
    (problem,) = problems_of(write(tmp_path, {**LLAMA32, "num_experts": 4}))
    assert "num_experts" in problem and "unknown" in problem


def test_sliding_window_layers_are_refused(tmp_path: Path) -> None:
    kinds = ["sliding_attention"] + ["full_attention"] * 27
    problems = problems_of(write(tmp_path, {**QWEN3_V5, "layer_types": kinds, "use_sliding_window": True}))
    assert len(problems) == 2
    assert "sliding_window" in problems[0]
    assert "layer_types has sliding_attention" in problems[1]


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}


def test_yarn_is_read_with_its_defaults(tmp_path: Path) -> None:
    model = from_folder(write(tmp_path, {**LLAMA32, "rope_scaling": YARN}))
    yarn = RopeScaling(kind="yarn", factor=4, original_max_positions=8192, beta_fast=32, beta_slow=1, truncate=True)
    assert (model.rope_scaling, model.max_positions) == (yarn, 4 * 8192)  # vLLM's table of frequencies ends there
    mine = {**YARN, "beta_fast": 16, "truncate": False, "attention_factor": 1.3, "mscale": 2.0, "mscale_all_dim": 1.0}
    changed = replace(yarn, beta_fast=16, truncate=False, attention_factor=1.3)
    assert from_folder(write(tmp_path, {**LLAMA32, "rope_scaling": mine})).rope_scaling == changed
    scales = {**YARN, "mscale": 2.0, "mscale_all_dim": 1.0}
    scaling = from_folder(write(tmp_path, {**LLAMA32, "rope_scaling": scales})).rope_scaling
    assert scaling is not None and scaling.attention_factor == pytest.approx(1.277259 / 1.138629, abs=1e-6)


@pytest.mark.parametrize(
    ("rope", "named"),
    [
        ({"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings"),
        ({**YARN, "attention_factor": -1.3}, "attention_factor"),
        ({**YARN, "factor": 1.0, "attention_factor": 1.3}, "attention_factor"),
        ({**YARN, "truncate": None}, "truncate"),
        ({"type": "dynamic", "factor": 2.0}, "dynamic"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 1}, "beta_fast"),
        ({**LLAMA32["rope_scaling"], "low_freq_factor": 2.0}, "low_freq_factor"),
        ({**LLAMA32["rope_scaling"], "original_max_position_embeddings": 4096}, "original_max_position_embeddings"),
        ({"rope_type": "default", "partial_rotary_factor": 0.25}, "partial_rotary_factor"),
    ],
)
def test_rope_that_megatron_does_not_compute_is_refused(tmp_path: Path, rope: dict[str, Any], named: str) -> None:
    problems = problems_of(write(tmp_path, {**LLAMA32, "rope_scaling": rope}))
    assert len(problems) == 1
    assert named in problems[0]


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    values = {**LLAMA32, "architectures": ["GPT2LMHeadModel"], "mlp_bias": True, "vocab_size": 0, "scale_emb": 12}
    problems = "\n".join(problems_of(write(tmp_path, values, weights="pytorch_model.bin")))
    for word in ("GPT2LMHeadModel", "Qwen3ForCausalLM", "mlp_bias", "vocab_size", "scale_emb", "pytorch_model.bin"):
        assert word in problems


def test_missing_folder_config_and_weights(tmp_path: Path) -> None:
    assert "no such folder" in problems_of(tmp_path / "nowhere")[0]
    assert "config.json" in problems_of(tmp_path)[0]
    (tmp_path / "config.json").write_text("{")
    assert "must be JSON (" in problems_of(tmp_path)[0]
    (tmp_path / "config.json").write_text(json.dumps(QWEN25))
    assert "safetensors" in problems_of(tmp_path)[0]


def test_every_weight_file_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    names = ["whole.safetensors", "missing.safetensors", "empty.safetensors", "cut.safetensors"]
    index = tmp_path / "model.safetensors.index.json"
    write(tmp_path, QWEN25, weights=names[0])
    index.write_text(json.dumps({"weight_map": {str(number): name for number, name in enumerate(names)}}))
    save_file({"0": np.ones(9)}, tmp_path / names[0])
    (tmp_path / names[2]).touch()
    save_file({"a": np.ones(9)}, tmp_path / names[3])
    (tmp_path / names[3]).write_bytes((tmp_path / names[3]).read_bytes()[:-1])
    problems = problems_of(tmp_path)
    assert [name for name in names if any(name in problem for problem in problems)] == names[1:]
    assert sum("Download it again." in problem for problem in problems) == 3
    for table in ([], {"weight_map": ["a"]}, {"weight_map": {"a": 1}}):
        index.write_text(json.dumps(table))
        assert len(problems_of(tmp_path)) == 1


MODEL = replace(
    families.MODEL,
    family="llama",
    num_layers=12,
    hidden_size=64,
    ffn_hidden_size=96,
    num_heads=8,
    head_dim=8,
    vocab_size=101,
    qk_norm=False,
)


@pytest.mark.parametrize(
    ("layout", "engine", "found"),
    [
        (Layout(), 1, []),
        (Layout(tensor=4, sequence=True), 4, []),  # more ranks than key-value heads, an odd vocabulary
        (Layout(pipeline=2, virtual_pipeline=3, tensor=2), 2, []),
        (Layout(tensor=3), 1, ["parallel.tensor = 3: must divide the 8 attention heads", "Possible: 1, 2, 4, 8."]),
        (Layout(tensor=3), 1, ["2 key-value heads"]),
        (Layout(tensor=16), 1, ["8 attention heads"]),
        (Layout(pipeline=5), 1, ["must divide the 12 layers", "Possible products: 1, 2, 3, 4, 6, 12; or set"]),
        (Layout(pipeline=4, virtual_pipeline=2), 1, ["4 x 2"]),
        (Layout(virtual_pipeline=2), 1, ["requires parallel.pipeline >= 2"]),
        (Layout(tensor=2, data=3), 4, ["engine.tensor_parallel = 4: must divide the 6 ranks", "Possible: 1, 2."]),
        (Layout(data=3), 3, ["engine.tensor_parallel = 3: must divide the 8 attention heads"]),
    ],
)
def test_layouts(layout: Layout, engine: int, found: list[str]) -> None:
    problems = layout_problems(MODEL, layout, engine)
    assert bool(problems) == bool(found)
    assert all(text in "\n".join(problems) for text in found)


WITH_EXPERTS = replace(
    MODEL, experts=Experts(count=6, per_token=2, ffn_hidden_size=36, normalized=True), ffn_hidden_size=7
)


@pytest.mark.parametrize(
    ("layout", "engine", "found"),
    [
        (Layout(data=2), 2, []),
        (Layout(data=6, expert=3), 1, []),
        (Layout(tensor=2, sequence=True, expert=2), 1, []),
        (Layout(pipeline=2, data=2, expert=2), 1, []),
        (Layout(data=4, expert=4), 1, ["must divide the 6 experts and the 4 ranks", "Possible: 1, 2."]),
        (Layout(pipeline=2, data=2, expert=6), 1, ["the 2 ranks of a pipeline stage"]),
        (Layout(tensor=2, sequence=True), 1, []),
        (Layout(tensor=2, expert=2), 1, ["parallel.sequence = false"]),
        (Layout(data=8), 8, ["engine.tensor_parallel = 8", "must divide the 36 hidden units of an expert"]),
    ],
)
def test_layouts_of_experts(layout: Layout, engine: int, found: list[str]) -> None:
    problems = layout_problems(WITH_EXPERTS, layout, engine)
    assert bool(problems) == bool(found)
    assert all(text in "\n".join(problems) for text in found)


def test_dense_models_have_no_experts_to_divide() -> None:
    (problem,) = layout_problems(MODEL, Layout(data=2, expert=2), 1)
    assert "parallel.expert = 2" in problem and "must be 1" in problem


def test_rules_of_the_mlp_and_the_fused_matrix() -> None:
    assert "97 hidden units" in layout_problems(replace(MODEL, ffn_hidden_size=97), Layout(tensor=2), 1)[0]
    one_kv_head = replace(MODEL, num_kv_heads=1, head_dim=2)
    assert "20 rows" in layout_problems(one_kv_head, Layout(tensor=8), 1)[0]


def test_rollouts_must_fit_the_models_positions() -> None:
    assert engine_problems(MODEL, max_prompt_tokens=60, max_response_tokens=4, on_cpu=False) == []
    (problem,) = engine_problems(MODEL, max_prompt_tokens=60, max_response_tokens=5, on_cpu=False)
    assert "60 + 5" in problem and "max_position_embeddings = 64" in problem and "Lower" in problem


def test_head_sizes_are_limited_on_a_cpu_only() -> None:
    limits = {"max_prompt_tokens": 1, "max_response_tokens": 1}
    assert engine_problems(MODEL, **limits, on_cpu=False) == []
    assert engine_problems(replace(MODEL, head_dim=80), **limits, on_cpu=True) == []
    (problem,) = engine_problems(MODEL, **limits, on_cpu=True)
    assert "head_dim = 8" in problem and "32, 64" in problem and "GPU" in problem


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    write(tmp_path, QWEN25)
    code = (
        "import sys; from pathlib import Path; from megatron_mcpo.config.hf_config import from_folder; "
        f"from_folder(Path({str(tmp_path)!r})); sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=180).returncode == 0


def test_what_fp8_kernels_do_not_take_is_refused() -> None:
    good = replace(MODEL, hidden_size=256, ffn_hidden_size=512, num_heads=8, num_kv_heads=4, head_dim=32, experts=None)
    assert quantization_problems(good, 2, in_servers=False, on_cpu=False) == []
    assert quantization_problems(replace(good, hidden_size=576), 1, in_servers=False, on_cpu=True) == []
    (problem,) = quantization_problems(replace(good, hidden_size=576), 1, in_servers=False, on_cpu=False)
    assert (
        "fp8_per_block" in problem
        and "multiple of 128 for vLLM's kernels, an engine rank has 576 hidden size" in problem
    )
    found = quantization_problems(good, 8, in_servers=False, on_cpu=False)
    assert [problem.split(" has ")[1][:4] for problem in found] == ["32 q", "96 q", "64 M"]
    assert quantization_problems(good, 8, in_servers=False, on_cpu=True) == []
    (problem,) = quantization_problems(good, 1, in_servers=True, on_cpu=True)
    assert problem.endswith(
        "must be 'none' for a server on a CPU (vLLM lacks the kernels). Leave engine.servers empty, "
        "or set it to 'none'."
    )
