"""Megatron-Core trains and saves without CUDA, through every interception of distributed/cpu_backend.py.

An interception that nothing here calls fails the test: a newer Megatron-Core may not need it any more.
Not covered: a GPU (only that nothing is touched there), MoE, fp16.
"""

import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_mcpo.config.environment import vllm_on_cpu
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import fast_dtype
from megatron_mcpo.config.schema import ModelSection
from megatron_mcpo.distributed import cpu_backend, parallel
from megatron_mcpo.distributed.device import backend, device, uses_gpu
from megatron_mcpo.mcore.spec import layer_spec
from tests.support.ranks import run_ranks

VOCAB, SEQ_LEN, NUM_MICRO_BATCHES = 64, 16, 2


def _config(layout: Layout) -> TransformerConfig:
    return TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        ffn_hidden_size=64,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.1,
        attention_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence,
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
        use_cpu_initialization=False,
        num_moe_experts=4 if layout.expert > 1 else None,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=layout.expert,
    )


def _model(config: TransformerConfig, groups: parallel.Groups) -> DistributedDataParallel:
    model = GPTModel(
        config=config,
        transformer_layer_spec=layer_spec(config, None),
        vocab_size=VOCAB,
        max_sequence_length=SEQ_LEN,
        pre_process=groups.is_first_stage,
        post_process=groups.is_last_stage,
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope",
    )
    reduction = DistributedDataParallelConfig(
        use_distributed_optimizer=True, grad_reduce_in_fp32=True, overlap_grad_reduce=True
    )
    return DistributedDataParallel(config, reduction, Float16Module(config, model))


def _forward_step(_batches: object, model: torch.nn.Module) -> Any:
    num_tokens = SEQ_LEN // model.config.context_parallel_size
    tokens = torch.arange(2 * num_tokens).view(2, num_tokens) % VOCAB
    losses = model(tokens, torch.zeros_like(tokens), None, labels=(tokens + 1) % VOCAB)

    def loss(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        value = output.float().mean()
        return value, {"loss": value.detach().clone()}

    return losses, loss


def _train_and_save(layout: Layout, folder: Path) -> tuple[list[float], dict[str, int]]:
    """Gradient norms of three steps (the third after a save and a load), and what was intercepted on this rank."""
    groups = parallel.init(layout, seed=1, timeout_seconds=60)
    config = _config(layout)
    model = _model(config, groups)
    settings = OptimizerConfig(
        optimizer="adam", lr=1e-3, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True
    )
    optimizer = get_megatron_optimizer(settings, [model])
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    norms = []
    for step in range(3):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=None,
            model=model,
            num_microbatches=NUM_MICRO_BATCHES,
            seq_length=SEQ_LEN,
            micro_batch_size=2,
            forward_only=False,
        )
        applied, norm, _ = optimizer.step()
        assert applied
        norms.append(float(norm))
        if step == 1:
            _save_and_load(model, optimizer, groups, folder)
    return norms, cpu_backend.interceptions()


def _save_and_load(model: DistributedDataParallel, optimizer: Any, groups: parallel.Groups, folder: Path) -> None:
    metadata = {"distrib_optim_sharding_type": "fully_reshardable", "dp_cp_group": groups.data_context}

    def state(loading: bool) -> dict[str, Any]:
        weights = model.module.module.sharded_state_dict(metadata=metadata)
        moments = optimizer.sharded_state_dict({"model": weights}, is_loading=loading, metadata=metadata)
        return {"model": weights, "optimizer": moments}

    dist_checkpointing.save(state(loading=False), str(folder))
    loaded = dist_checkpointing.load(state(loading=True), str(folder))
    model.module.module.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])


LAYOUTS = [Layout(data=2), Layout(pipeline=2), Layout(tensor=2, sequence=True), Layout(context=2),
           Layout(data=2, expert=2)]  # fmt: skip


@pytest.mark.skipif(uses_gpu(), reason="there is nothing to intercept on a GPU")
def test_training_and_saving_use_every_interception(tmp_path: Path) -> None:
    total: Counter[str] = Counter()
    for i, layout in enumerate(LAYOUTS):
        folder = tmp_path / str(i)
        folder.mkdir()
        for norms, hits in run_ranks(2, _train_and_save, layout, folder, timeout=480):
            assert all(math.isfinite(norm) and norm > 0 for norm in norms), (layout, norms)
            total.update(hits)
    unused = sorted(name for name in cpu_backend.interceptions() if not total[name])
    assert not unused, f"Megatron-Core does not ask for these any more, remove them from cpu_backend.py: {unused}"


def test_only_megatron_sees_another_torch() -> None:
    assert cpu_backend.apply() is not uses_gpu()
    if uses_gpu():
        return
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1).cuda()
    assert torch.zeros(1).type() == "torch.FloatTensor"
    assert device() == torch.device("cpu") and backend() == "gloo"


def test_changes_of_the_real_cuda_module_do_not_reach_megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.tensor_parallel import random

    if uses_gpu():
        pytest.skip("there is nothing to intercept on a GPU")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1 / 0)
    assert random.torch.cuda.current_device() == torch.device("cpu")


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=480)


def test_nothing_is_touched_on_a_gpu() -> None:
    code = """
import sys, torch
torch.cuda.is_available = lambda: True
from megatron_mcpo.config import environment
environment.vllm_on_cpu = lambda: False
before = dict(vars(torch)), torch.Tensor.cuda, torch.Tensor.type, list(sys.meta_path)
from megatron_mcpo.distributed import cpu_backend, device
assert device.uses_gpu() and cpu_backend.apply() is False
assert cpu_backend.interceptions() == {} and device.backend() == "nccl"
after = dict(vars(torch)), torch.Tensor.cuda, torch.Tensor.type, list(sys.meta_path)
assert before[1:] == after[1:]
assert all(after[0][name] is value for name, value in before[0].items())
"""
    done = _python(code)
    assert done.returncode == 0, done.stderr


def test_importing_is_quiet_and_loads_no_compiler() -> None:
    code = """
import sys, megatron_mcpo.mcore.spec
import megatron.core.dist_checkpointing, megatron.core.pipeline_parallel
assert "torch._inductor" not in sys.modules
"""
    done = _python(code)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if "Apex" in line or "CUDA" in line or "DEPRECATED" in line]
    assert not told, done.stderr


def test_auto_is_the_dtype_that_this_machine_is_fast_in() -> None:
    """As torch names the instructions that its own kernels are chosen by."""
    has_avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    assert fast_dtype() == ("bf16" if has_avx512 or not vllm_on_cpu() else "fp32")
    section = ModelSection.model_validate({"path": "model", "dtype": "auto"})
    assert section.dtype == fast_dtype() and ModelSection(path="model").dtype == "bf16"


def test_auto_heeds_what_torch_is_held_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    done = _python("import torch; print(torch.backends.cpu.get_cpu_capability())")
    assert done.stdout == "AVX2\n", done.stderr
    assert fast_dtype() == ("fp32" if vllm_on_cpu() else "bf16")
