"""Models of Transformer Engine's modules: built on a CPU in every layout, and their checkpoints; no forward pass.

Skipped without Transformer Engine, which the CPU environment does not have: `make check-te` runs this file where it is.
Its modules ask for a CUDA device when they are built; here they are told that there is one. Not covered: what they
compute, its optimizer.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.distributed import parallel
from megatron_mcpo.mcore import adam, spec
from megatron_mcpo.mcore import model as models
from megatron_mcpo.mcore.precision import transformer_engine_problem
from megatron_mcpo.weights.match_parameters import match_parameters
from tests.support import tiny_models
from tests.support.checkpoints import build, checkpoints_of, distance, settings, weights
from tests.support.paths import ROOT
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.skipif(
    transformer_engine_problem() is not None, reason=f"needs Transformer Engine, {transformer_engine_problem()}"
)

FAMILIES = ("qwen3-1.7b", "qwen3-30b-a3b", "qwen2.5-32b", "llama3-8b")
LAYOUTS = (
    Layout(),
    Layout(tensor=2, sequence=True),
    Layout(pipeline=2),
    Layout(pipeline=2, virtual_pipeline=2),
    Layout(context=2),
    Layout(data=2, expert=2),
)


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Let Transformer Engine's modules be built here, and the package choose them."""
    from transformer_engine.pytorch.module import base

    cuda = SimpleNamespace(**{**vars(torch.cuda), "is_available": lambda: True})
    monkeypatch.setattr(base, "torch", SimpleNamespace(**{**vars(torch), "cuda": cuda}))
    use(monkeypatch, True)
    return monkeypatch


def use(monkeypatch: pytest.MonkeyPatch, transformer_engine: bool) -> None:
    for module in (spec, models):
        monkeypatch.setattr(module, "uses_transformer_engine", lambda: transformer_engine)


def small(family: str, layout: Layout) -> ModelConfig:
    """A model with the options of a public one and fewer, smaller layers."""
    model = from_folder(ROOT / "examples" / "models" / family, with_weights=False)
    experts = model.experts and replace(model.experts, count=8, per_token=2, ffn_hidden_size=128)
    num_layers = 2 * layout.pipeline * layout.virtual_pipeline
    return replace(model, num_layers=num_layers, hidden_size=256, ffn_hidden_size=512, vocab_size=1000, experts=experts)


def sharded_names(chunks: list[Any]) -> set[str]:
    """The names that the weights have in a checkpoint."""
    found = {value.key for chunk in chunks for value in chunk.sharded_state_dict().values() if hasattr(value, "key")}
    return {name for name in found if "_extra_state" not in name}


@pytest.mark.parametrize(
    ("family", "layout"),
    [(family, layout) for family in FAMILIES for layout in LAYOUTS if layout.expert == 1 or "a3b" in family],
    ids=str,
)
def test_every_parameter_is_matched_and_named_as_without_it(
    modules: pytest.MonkeyPatch, family: str, layout: Layout
) -> None:
    model = small(family, layout)
    for rank in {0, layout.world_size - 1}:
        with parallel.pretend(layout, rank=rank) as groups:
            names = {}
            for has_te in (False, True):
                use(modules, has_te)
                chunks = models.build_chunks(model, groups, dtype=torch.bfloat16, head=None)
                kinds = {type(module).__module__.partition(".")[0] for chunk in chunks for module in chunk.modules()}
                assert ("transformer_engine" in kinds) is has_te
                names[has_te] = sharded_names(chunks)
            assert names[True] == names[False] != set()
            for recompute in ("none", "selective", "full"):
                for fp8 in ("off", "blockwise", "tensorwise"):
                    chunks = models.build_chunks(
                        model, groups, dtype=torch.bfloat16, head=None, recompute=recompute, fp8=fp8
                    )
                    assert chunks[0].config.fp8_recipe == fp8 or fp8 == "off"
                    matched = match_parameters(chunks, model, groups)  # raises for a name or a shape that is wrong
                    assert sum(tensor is not None for _, tensor in matched) > 0


@pytest.mark.parametrize(("saved_by", "loaded_by"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize(
    ("kind", "layout"),
    [("tied", Layout(pipeline=2)), ("untied", Layout(tensor=2, sequence=True)), ("experts", Layout(data=2, expert=2))],
    ids=str,
)
def test_checkpoints_load_with_and_without_it(
    modules: pytest.MonkeyPatch,
    tmp_path: Path,
    kind: tiny_models.Kind,
    layout: Layout,
    saved_by: bool,
    loaded_by: bool,
) -> None:
    tiny_models.save_model(tmp_path / "model", kind)
    config = settings(tmp_path / "model", "bf16")

    def save() -> dict[str, Tensor]:
        prepare_adam()
        policy = build(config, layout)
        with torch.no_grad():
            for chunk in policy.chunks:
                for weight in chunk.parameters():
                    weight.add_(0.25)
        checkpoints = checkpoints_of(policy, tmp_path / "run")
        checkpoints.save(1, {})
        return weights(policy)

    def load() -> dict[str, Tensor]:
        prepare_adam()
        policy = build(config, layout)
        loaded = checkpoints_of(policy, tmp_path / "run").load()
        assert loaded is not None and loaded.step == 1 and loaded.skipped == ()
        return weights(policy)

    use(modules, saved_by)
    saved = run_ranks(2, save)
    use(modules, loaded_by)
    for found, expected in zip(run_ranks(2, load), saved, strict=True):
        assert distance(found, expected)[0] == 0.0


def prepare_adam() -> None:
    """Use our Adam on this rank: that of Transformer Engine needs a GPU."""
    from megatron.core import optimizer

    optimizer.USING_PYTORCH_OPTIMIZER = True
    assert adam.install()
