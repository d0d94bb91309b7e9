"""Fused weight gradients: Megatron-Core's real layers call our product, and nothing but a compiled extension counts.

Not covered: the product of bf16 with an fp32 sum, which only a GPU has (tests/gpu), NVIDIA's own extension.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.data.batch import make_batch
from megatron_mcpo.distributed import parallel
from megatron_mcpo.distributed.device import uses_gpu
from megatron_mcpo.mcore import gradient_fusion
from megatron_mcpo.mcore import model as mcore_model
from megatron_mcpo.mcore.policy import LossInput, Policy
from tests.support import tiny_models
from tests.support.ranks import run_ranks

needs_no_extension = pytest.mark.skipif(gradient_fusion.extension_there(), reason="NVIDIA's extension is installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_models.save_model(folder, "untied", num_layers=2)
    return folder


def gradients(folder: Path, *, fused: bool) -> dict[str, Tensor]:
    """Of two micro-batches and more, in fp32."""
    mcore_model.fuses_gradients = lambda dtype: fused
    if fused:
        gradient_fusion.put_in()
    config = tiny_models.config(folder, contrastive={"cross_domain_weight": 0.0, "in_domain_weight": 0.0})
    policy = Policy(config, from_folder(folder), parallel.init(Layout(), seed=0, timeout_seconds=240))
    groups = tiny_models.rollout_groups(num_prompts=6, num_samples=3)
    batch = make_batch(groups, num_data_ranks=1, data_rank=0, share_prompts=policy.shares_prompts)

    def loss(x: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
        return -x.logp_r.sum() / batch.num_response_tokens, {}

    policy.backward(batch, loss)
    (chunk,) = policy.chunks
    added = [name for name, parameter in chunk.named_parameters() if parameter.grad_added_to_main_grad]
    assert len(added) == (8 if fused else 0), added  # qkv, proj, fc1 and fc2 of two layers
    return {name: parameter.main_grad.clone() for name, parameter in chunk.named_parameters()}


@pytest.mark.skipif(uses_gpu(), reason="plain layers in fp32 are for a CPU")
def test_fused_gradients_are_the_gradients(folder: Path) -> None:
    (plain,), (fused,) = (run_ranks(1, lambda fused=f: gradients(folder, fused=fused)) for f in (False, True))
    assert plain.keys() == fused.keys()
    for name, gradient in plain.items():
        assert torch.allclose(fused[name], gradient, rtol=1e-5, atol=1e-6 * gradient.abs().max()), name


@needs_no_extension
def test_megatron_refuses_without_the_extension(folder: Path) -> None:
    """Fails when Megatron-Core fuses without it, or leaves an unused output layer alone: delete it then."""

    def build() -> None:
        mcore_model.fuses_gradients = lambda dtype: True
        Policy(tiny_models.config(folder), from_folder(folder), parallel.init(Layout(), seed=0, timeout_seconds=240))

    with pytest.raises(RuntimeError, match=f"gradient_accumulation_fusion.*(\n.*)*{gradient_fusion.EXTENSION}"):
        run_ranks(1, build)


@pytest.mark.skipif(uses_gpu(), reason="on there")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_is_off_on_a_cpu(dtype: torch.dtype) -> None:
    assert not gradient_fusion.fuses_gradients(dtype)


@needs_no_extension
def test_the_name_apex_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "apex"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('was imported')")
    note = gradient_fusion.foreign_apex()
    assert note is not None and "is not NVIDIA's" in note and str(package) in note
    assert not gradient_fusion.extension_there()
    (package / "normalization").mkdir()
    (package / "normalization" / "__init__.py").touch()
    assert gradient_fusion.foreign_apex() is None
