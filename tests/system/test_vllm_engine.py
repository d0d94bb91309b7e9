"""The vLLM engine with tiny random models on a CPU, in processes of their own.

Not covered: a GPU (sleep that frees memory, CUDA graphs, NCCL, its FP8 kernels), engines of more than 2 ranks, speed.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_mcpo.config.environment import vllm_on_cpu
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.model import engine_problems
from tests.support import vllm_cases as cases

SIZES: dict[str, Any] = dict(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=256,
    initializer_range=0.1,
    eos_token_id=5,
)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders tied_a, tied_b (Llama), untied_a, untied_b (Qwen3), experts_a, experts_b (Qwen3-MoE)."""
    import transformers
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig
    from transformers import Qwen3MoeForCausalLM as Experts

    transformers.utils.logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("models")
    moe = SIZES | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True)
    families = {
        "tied": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True)),
        "untied": (Qwen3ForCausalLM, Qwen3Config(**SIZES, tie_word_embeddings=False)),
        "experts": (Experts, Qwen3MoeConfig(**moe, tie_word_embeddings=False)),
    }
    for name, (model, config) in families.items():
        for seed, suffix in enumerate("ab"):
            torch.manual_seed(seed)
            model(config).save_pretrained(folder / f"{name}_{suffix}")
    asks_for_more = {"do_sample": True, "top_k": 2, "temperature": 0.1, "repetition_penalty": 3.0, "eos_token_id": 5}
    (folder / "untied_a" / "generation_config.json").write_text(json.dumps(asks_for_more))
    return folder


def test_importing_the_module_does_not_import_vllm() -> None:
    code = "import sys, megatron_mcpo.rollout.vllm_engine; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


def test_cpu_head_dims_are_those_of_vllm(models: Path) -> None:
    model = from_folder(models / "tied_a")

    def refused(size: int) -> bool:
        limits = {"max_prompt_tokens": 32, "max_response_tokens": 32}
        return bool(engine_problems(replace(model, head_dim=size), **limits, on_cpu=True))

    assert [size for size in range(1, 1025) if not refused(size)] == cases.run(_vllm_head_dims)


def test_a_cpu_build_is_told_as_vllm_tells_it() -> None:
    assert cases.run(_vllm_is_on_cpu) == vllm_on_cpu()


def _vllm_is_on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _vllm_head_dims() -> list[int]:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    return sorted(CPUAttentionBackend.get_supported_head_sizes())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["tied", "untied", "experts"])
def test_update_equals_an_engine_built_from_the_checkpoint(models: Path, family: str, dtype: str) -> None:
    cases.run(cases.update_equals_fresh, models, family, dtype)


def test_tied_head_is_stale_without_the_fix_and_is_found(models: Path) -> None:
    """Fails when vLLM has mended its reload: then lower LAST_AFFECTED and delete `after_reload`."""
    assert cases.run(cases.without_fixes, models, "tied") == (False, ("lm_head.weight",))


def test_experts_are_stale_without_the_fix_and_are_found(models: Path) -> None:
    """Fails when vLLM has mended its reload: then lower LAST_AFFECTED and delete `before_reload`."""
    equal, different = cases.run(cases.without_fixes, models, "experts")
    assert not equal
    assert len(different) == 2 * 4 * 3 and all(".experts." in name for name in different)


def test_untied_model_needs_no_fix(models: Path) -> None:
    assert cases.run(cases.without_fixes, models, "untied") == (True, ())


def test_trainer_state_is_untouched(models: Path) -> None:
    cases.run(cases.leaves_no_trace, models, fresh=True)


def test_requests_are_followed(models: Path) -> None:
    cases.run(cases.follows_requests, models)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_bare_model(models: Path, temperature: float) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models / "untied_a", dtype=torch.float32)
    samples = cases.run(cases.logprobs_for, models, temperature)
    assert len(samples) == 2 * len(cases.PROMPTS)
    for row, (tokens, logprobs) in enumerate(samples):
        prompt = cases.PROMPTS[row // 2]
        assert len(tokens) == 12, "the model's end-of-sequence token or generation_config.json ended the sample"
        with torch.no_grad():
            logits_TV = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        wanted = torch.log_softmax(logits_TV / temperature, -1)[range(12), tokens]
        assert torch.allclose(torch.tensor(logprobs), wanted, atol=1e-4), (torch.tensor(logprobs) - wanted).abs().max()


def test_experts_are_those_of_transformers_also_of_prompts_that_are_cached(models: Path) -> None:
    """The second sample of a prompt finds its first block in the cache."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models / "experts_a", dtype=torch.float32)
    samples = cases.run(cases.experts_for, models)
    assert len(samples) == 2 * len(cases.PROMPTS)
    for tokens, found in samples:
        with torch.no_grad():
            logits = model(torch.tensor([tokens]), output_router_logits=True).router_logits
        wanted_TXK = torch.stack([layer_TE.topk(2).indices for layer_TE in logits], dim=1)[:-1]
        assert torch.equal(torch.tensor(found).sort(-1).values, wanted_TXK.sort(-1).values)


def test_bad_update_is_refused_and_ends_the_engine(models: Path) -> None:
    messages = cases.run(cases.refuses_bad_updates, models)
    assert "model.layers.1.self_attn.q_proj.weight" in messages["missing"]
    assert "lm_head.weight: must be a tensor of the checkpoint" in messages["unknown"]
    assert "(64, 128)" in messages["shape"]
    assert "(128, 128)" in messages["shape"]
    assert "sent twice" in messages["twice"]
    assert "the exporter died" in messages["exporter"]


@cases.needs_fp8
@pytest.mark.parametrize("family", ["tied", "untied", "experts"])
def test_update_of_a_quantized_engine_equals_one_built_from_the_checkpoint(models: Path, family: str) -> None:
    cases.run(cases.update_equals_fresh, models, family, "bf16", "fp8_per_block")


@pytest.mark.skipif(torch.cpu._is_amx_tile_supported(), reason="vLLM asks for AMX, and here it is")
def test_fp8_is_refused_without_the_fix(models: Path) -> None:
    """Fails when vLLM has mended what it asks for: then delete `cpu_fp8`."""
    assert "AMX" in cases.run(cases.fp8_without_fix, models)


@pytest.mark.parametrize(
    ("family", "dtype", "quantization"),
    [
        ("tied", "fp32", "none"),
        ("untied", "bf16", "none"),
        ("experts", "fp32", "none"),
        ("experts", "bf16", "none"),
        pytest.param("tied", "bf16", "fp8_per_block", marks=cases.needs_fp8),
        pytest.param("experts", "bf16", "fp8_per_block", marks=cases.needs_fp8),
    ],
)
def test_compare_names_exactly_what_differs(models: Path, family: str, dtype: str, quantization: str) -> None:
    cases.run(cases.finds_what_differs, models, family, dtype, quantization)


@pytest.mark.parametrize("family", ["tied", "untied", "experts"])
def test_tensor_parallel_ranks_agree(models: Path, family: str) -> None:
    two = cases.run(cases.on_ranks, models, family, 2, ranks=2)
    assert two[0]["a"] == two[1]["a"]
    assert two[0]["b"] == two[1]["b"]
    assert [rank["sum"] for rank in two] == [2.0, 2.0], "the trainer's process group must outlive the engine"
    assert [rank["segments"] for rank in two] == [[], []], "names left in /dev/shm would outlive a crash"
    one = cases.run(_single, models, family)
    for (tokens, logprobs), (tokens_1, logprobs_1) in zip(two[0]["a"], one, strict=True):
        assert tokens == tokens_1
        assert torch.allclose(torch.tensor(logprobs), torch.tensor(logprobs_1), atol=1e-4)


def _single(folder: Path, family: str) -> Any:
    engine = cases.build(folder / f"{family}_a", load_weights=True)
    return cases.sampled(engine)


def test_two_engines_of_one_rank_each(models: Path) -> None:
    two = cases.run(cases.on_ranks, models, "tied", 1, ranks=2)
    assert two[0]["a"] == two[1]["a"] == cases.run(_single, models, "tied")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"job_tag": "a/b"}, "job_tag"),
        ({"tensor_parallel": 2}, "distributed = True"),
        ({"distributed": True}, "process group"),
    ],
)
def test_impossible_arguments_are_refused(models: Path, changes: dict[str, Any], problem: str) -> None:
    good: dict[str, Any] = dict(
        dtype="fp32", quantization="none", tensor_parallel=1, max_model_len=64, max_concurrent=4, kv_cache_gib=0.1,
        gpu_memory_utilization=0.5, distributed=False, job_tag="x",
    )  # fmt: skip
    with pytest.raises(ValueError, match=problem):
        cases.VllmEngine(models / "tied_a", **(good | changes))
