"""Updates of the real model: learning-rate schedule, refusals, recomputation, scores that don't depend on the packing.

Not covered here: exactness of gradients (test_gradients), checkpoints (test_checkpoint).
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.fp8_utils import is_first_last_bf16_layer
from torch import Tensor

from megatron_mcpo.config.config import Config
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.schema import Fp8
from megatron_mcpo.distributed import parallel
from megatron_mcpo.mcore.model import transformer_config, unwrap
from megatron_mcpo.mcore.policy import Policy, Reference
from megatron_mcpo.mcore.precision import TOKEN_MULTIPLE
from megatron_mcpo.trainer.objective import Objective, Scored
from tests.support import tiny_models
from tests.support.policies import maximise, start
from tests.support.ranks import run_ranks

TWO_UPDATES = {"minibatches": 2}  # a step


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_models.save_model(path, "tied")
    return path


def closed_form(schedule: str, update: int, *, warmup: int, updates: int) -> float:
    """Return the rate of an update (from 1), at most 1e-3; a decay reaches 1e-4 in update number updates + 1."""
    if update <= warmup:
        return 1e-3 * update / warmup
    progress = (update - warmup) / (updates + 1 - warmup)
    shape = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return 1e-4 + shape[schedule] * 9e-4


def test_learning_rates_of_model_and_head_follow_the_schedule(folder: Path) -> None:
    """The head's rate has the same shape, from its own peak."""

    def rates(config: Config) -> list[tuple[float, float]]:
        policy, batch = start(config)
        updates = [policy.update(batch, maximise(1.0)) for _ in range(6)]
        return [(update.lr, update.head_lr) for update in updates]

    for schedule in ("constant", "linear", "cosine"):
        for warmup in (0, 2, 6):
            optimizer = {"lr": 1e-3, "head_lr": 7e-3, "min_lr": 1e-4, "warmup_steps": warmup, "schedule": schedule}
            config = tiny_models.config(folder, run={"steps": 3}, optimizer=optimizer, batch=TWO_UPDATES)
            expected = [closed_form(schedule, update, warmup=warmup, updates=6) for update in range(1, 7)]
            of_model, of_head = zip(*run_ranks(1, rates, config)[0], strict=True)
            assert of_model == pytest.approx(expected, rel=1e-6), (schedule, warmup)
            assert of_head == pytest.approx([7 * rate for rate in expected], rel=1e-6), (schedule, warmup)


def test_the_rates_are_the_same_on_every_stage_and_without_a_head_it_has_none(folder: Path) -> None:
    def rates(config: Config) -> tuple[float, float]:
        policy, batch = start(config, Layout(pipeline=2))
        update = policy.update(batch, maximise(1.0))
        return update.lr, update.head_lr

    with_head = tiny_models.config(folder, optimizer={"lr": 1e-3, "head_lr": 7e-3})
    assert run_ranks(2, rates, with_head) == [(1e-3, 7e-3)] * 2
    off = {"cross_domain_weight": 0.0, "in_domain_weight": 0.0}
    assert run_ranks(2, rates, tiny_models.config(folder, contrastive=off)) == [(1e-3, 0.0)] * 2


def test_a_warm_up_longer_than_the_run_ends_with_it(folder: Path) -> None:
    def rates(config: Config) -> list[float]:
        policy, batch = start(config)
        return [policy.update(batch, maximise(1.0)).lr for _ in range(2)]

    optimizer = {"lr": 1e-3, "warmup_steps": 9, "schedule": "linear"}
    config = tiny_models.config(folder, run={"steps": 1}, optimizer=optimizer, batch=TWO_UPDATES)
    assert run_ranks(1, rates, config)[0] == pytest.approx([5e-4, 1e-3], rel=1e-6)


def test_a_gradient_that_is_not_finite_moves_nothing(folder: Path) -> None:
    def check(config: Config) -> None:
        policy, batch = start(config)
        before = {name: tensor.clone() for name, tensor in policy.weights()}
        for factor in (float("nan"), 1e30):  # of which every gradient is finite and the norm is not
            update = policy.update(batch, maximise(factor))
            assert not update.applied and policy.version == 0
            assert all(torch.equal(tensor, before[name]) for name, tensor in policy.weights())
        update = policy.update(batch, maximise(1.0))
        assert update.applied and policy.version == 1
        assert not all(torch.equal(tensor, before[name]) for name, tensor in policy.weights())

    run_ranks(1, check, tiny_models.config(folder))


@pytest.mark.parametrize(
    ("kind", "layouts"),
    [
        ("tied", [Layout(data=2), Layout(tensor=2, sequence=True), Layout(pipeline=2)]),
        (
            "experts",
            [
                Layout(data=2, expert=2),
                Layout(tensor=2, expert=2, sequence=True),
                Layout(data=4, expert=2),
                Layout(tensor=2, sequence=True),
            ],
        ),
    ],
)
def test_a_clipped_update_is_that_of_one_rank(tmp_path: Path, kind: tiny_models.Kind, layouts: list[Layout]) -> None:
    """The norm that gradients are clipped to is of all ranks' shards, each counted once."""

    def updated(layout: Layout, config: Config) -> tuple[float, dict[str, Tensor]]:
        policy, batch = start(config, layout)
        norm = policy.update(batch, maximise(1.0)).grad_norm
        return norm, {name: tensor.clone() for name, tensor in policy.weights()}

    tiny_models.save_model(tmp_path, kind)
    # A step in proportion to the gradient, and not as long for the smallest as for the largest.
    proportional = {"eps": 100.0, "lr": 3000.0, "clip_grad": 0.1}
    config = tiny_models.config(tmp_path, optimizer=proportional)
    ((norm, expected),) = run_ranks(1, updated, Layout(), config)
    ((_, before),) = run_ranks(
        1, updated, Layout(), tiny_models.config(tmp_path, optimizer={**proportional, "lr": 1e-9})
    )
    assert norm > 1
    for layout in layouts:
        for found_norm, found in run_ranks(layout.world_size, updated, layout, config, timeout=480):
            assert found_norm == pytest.approx(norm, rel=1e-5), layout
            for name, weight in expected.items():
                moved = weight - before[name]
                torch.testing.assert_close(found[name] - before[name], moved, rtol=0, atol=1e-4 * moved.abs().max())


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(pipeline=2, virtual_pipeline=2), Layout(tensor=2, context=2, sequence=True)], ids=str
)
def test_an_update_returns_the_scores_of_a_pass_of_its_own(folder: Path, layout: Layout) -> None:
    """So that a step needs no such pass, where nothing has to be known before the backward pass."""

    def check(config: Config) -> None:
        policy, batch = start(config, layout)
        expected, found = policy.score(batch), policy.update(batch, maximise(1.0)).scores
        assert found.version == expected.version == 0
        assert torch.equal(found.logp_R, expected.logp_R)
        assert torch.equal(found.entropy_R, expected.entropy_R)
        assert found.z_ND is not None and expected.z_ND is not None
        assert torch.equal(found.z_ND, expected.z_ND)
        assert not torch.equal(policy.score(batch).logp_R, expected.logp_R), "an update that changes nothing"

    run_ranks(layout.world_size, check, tiny_models.config(folder))


def test_without_a_scoring_pass_the_gradient_is_the_same(folder: Path) -> None:
    def gradient(config: Config, is_scored: bool) -> Tensor:
        policy, batch = start(config)
        objective = Objective(config, policy, policy.groups)
        old = policy.score(batch) if is_scored else None
        groups = tiny_models.rollout_groups(num_prompts=4, num_samples=3)
        prepared = objective.prepare(Scored(groups=groups, batch=batch, old=old, reference_logp_R=None), step=1)
        return policy.trunk_gradient(batch, objective.loss(prepared))

    off = {"cross_domain_weight": 0.0, "in_domain_weight": 0.0}
    config = tiny_models.config(folder, contrastive=off, algorithm={"kl_weight": 0.0})
    with_pass, without = (run_ranks(1, gradient, config, is_scored)[0] for is_scored in (True, False))
    assert torch.equal(with_pass, without) and with_pass.any()


def test_an_update_with_representations_of_other_weights_is_refused(folder: Path) -> None:
    def check(config: Config) -> None:
        policy, batch = start(config)
        scores = policy.score(batch)
        policy.update(batch, maximise(1.0), representation_version=scores.version)
        before = {name: tensor.clone() for name, tensor in policy.weights()}
        with pytest.raises(ValueError, match="representation_version = 0: must be 1"):
            policy.update(batch, maximise(1.0), representation_version=scores.version)
        assert all(torch.equal(tensor, before[name]) for name, tensor in policy.weights())
        assert policy.update(batch, maximise(1.0), representation_version=policy.score(batch).version).applied

    run_ranks(1, check, tiny_models.config(folder))


@pytest.mark.parametrize(
    ("recompute", "part", "passes"),
    [("none", "", 1), ("full", "", 2), ("selective", "", 1), ("selective", "mlp", 2)],
)
def test_recomputed_in_the_backward_pass_alone(folder: Path, recompute: str, part: str, passes: int) -> None:
    """And never in the reference. That the gradient stays the same is shown by test_gradients."""

    def count(model: Policy | Reference, act: Callable[[], Any]) -> int:
        calls: list[int] = []
        layer = unwrap(model.chunks[0]).decoder.layers[1]
        handle = layer.get_submodule(part).register_forward_hook(lambda *_: calls.append(1))
        act()
        handle.remove()
        return len(calls)

    def check(config: Config) -> tuple[int, ...]:
        policy, batch = start(config)
        reference = Reference(config, from_folder(Path(config.model.path)), policy.groups)
        trained = count(policy, lambda: policy.backward(batch, maximise(1.0)))
        return trained, count(policy, lambda: policy.score(batch)), count(reference, lambda: reference.score(batch))

    config = tiny_models.config(folder, model={"recompute": recompute}, batch={"micro_batch_tokens": 4096})
    assert run_ranks(1, check, config) == [(passes, 1, 1)]


def test_fp8_is_refused_where_it_would_silently_be_bf16(folder: Path) -> None:
    config = tiny_models.config(folder, model={"dtype": "bf16", "fp8": "blockwise"})
    with pytest.raises(RuntimeError, match=r"model.fp8 = 'blockwise': needs a GPU, and there is none; set it to 'off'"):
        run_ranks(1, start, config)


@pytest.mark.parametrize(
    ("fp8", "expected"), [("blockwise", ("e4m3", "blockwise")), ("tensorwise", ("hybrid", "tensorwise"))]
)
def test_fp8_spares_the_first_and_the_last_layer(folder: Path, fp8: Fp8, expected: tuple[str, str]) -> None:
    def spared(config: Config) -> tuple[tuple[str, str], list[bool]]:
        groups = parallel.init(Layout(), seed=0, timeout_seconds=30)
        model = from_folder(Path(config.model.path))
        megatron = transformer_config(model, groups, dtype=torch.bfloat16, recompute="none", fp8=fp8)
        layers = [is_first_last_bf16_layer(megatron, number) for number in range(model.num_layers)]
        return (megatron.fp8, megatron.fp8_recipe), layers

    ((recipe, layers),) = run_ranks(1, spared, tiny_models.config(folder))
    assert recipe == expected
    assert layers == [True, *[False] * (len(layers) - 2), True] and len(layers) > 2


def test_packs_are_filled_up_to_a_multiple_and_say_the_same(folder: Path) -> None:
    def check(config: Config) -> None:
        policy, batch = start(config)
        expected = policy.score(batch).logp_R
        policy.token_multiple = TOKEN_MULTIPLE
        assert {micro.tokens_1L.shape[1] % TOKEN_MULTIPLE for micro in policy._pack(batch)} == {0}
        torch.testing.assert_close(policy.score(batch).logp_R, expected, rtol=1e-5, atol=1e-5)

    run_ranks(1, check, tiny_models.config(folder))


def test_an_update_raises_what_it_maximises_and_reports_sums(folder: Path) -> None:
    def check(config: Config) -> None:
        policy, batch = start(config)
        before = policy.score(batch).logp_R.sum()
        update = policy.update(batch, maximise(1.0))
        assert update.metrics["value"] == pytest.approx(-before.item() / 100, rel=1e-4)
        assert policy.score(batch).logp_R.sum() > before

    run_ranks(1, check, tiny_models.config(folder))


def test_scores_depend_neither_on_packing_nor_on_the_head(folder: Path) -> None:
    def scores(config: Config, head: bool) -> tuple[Tensor, Tensor]:
        policy, batch = start(config)
        model = policy if head else Reference(config, from_folder(Path(config.model.path)), policy.groups)
        result = model.score(batch)
        assert (result.z_ND is not None) == head
        return result.logp_R, result.entropy_R

    wide = {"batch": {"micro_batch_tokens": 4096}}
    expected = run_ranks(1, scores, tiny_models.config(folder), True)[0]
    for config, head in ((tiny_models.config(folder, **wide), True), (tiny_models.config(folder), False)):
        for mine, other in zip(run_ranks(1, scores, config, head)[0], expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
