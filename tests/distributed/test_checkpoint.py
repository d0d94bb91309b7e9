"""Checkpoints of the real model: written under one parallel layout, loaded under another, and trained on.

Not covered here: damaged and foreign checkpoints (test_checkpoint_refusals), the whole program (test_resume),
checkpoints of Transformer Engine's or apex's optimizer, GPUs.
"""

import queue
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch import Tensor

from megatron_mcpo.config.config import Config, ConfigError
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.mcore import checkpoint, megatron_fixes, spec
from tests.support import tiny_models
from tests.support.checkpoints import (
    HEAD,
    UPDATES,
    build,
    checkpoints_of,
    distance,
    learn,
    load_train,
    random_states,
    settings,
    train_save_train,
    weights,
)
from tests.support.ranks import run_ranks

NORM = "model.norm.weight"

CHANGES = [
    ("tied", Layout(data=2), Layout()),
    ("untied", Layout(data=2), Layout(data=4)),
    ("tied", Layout(data=2), Layout(tensor=2, sequence=True)),
    ("untied", Layout(tensor=2, sequence=True), Layout()),
    ("tied", Layout(pipeline=2), Layout()),
    ("tied", Layout(pipeline=2, virtual_pipeline=2), Layout(pipeline=2, data=2)),
    ("untied", Layout(context=2), Layout(tensor=2, pipeline=2, sequence=True)),
    ("tied", Layout(tensor=2, pipeline=2, sequence=True), Layout(data=4)),
    ("experts", Layout(data=2, expert=2), Layout(tensor=2, data=2, expert=4, sequence=True)),
    ("experts", Layout(tensor=2, sequence=True), Layout(data=2, expert=2)),
    ("experts", Layout(), Layout(pipeline=2)),
    ("tied", Layout(pipeline=2, layers_per_stage=(1, 3)), Layout(pipeline=2, layers_per_stage=(3, 1), data=2)),
]


def whole(results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Combine what the ranks return: rank 0's export, and the head of a rank that has it."""
    return {**results[0], HEAD: next(result[HEAD] for result in results if HEAD in result)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("tied", "untied", "experts")}
    for kind, folder in folders.items():
        tiny_models.save_model(folder, kind)
    return folders


@pytest.mark.parametrize(("kind", "written", "read"), CHANGES, ids=str)
def test_another_layout_goes_on_as_the_first_would_have(
    models: dict[str, Path], tmp_path: Path, kind: str, written: Layout, read: Layout
) -> None:
    config = settings(models[kind], "fp32")
    first = run_ranks(written.world_size, train_save_train, config, written, tmp_path)
    second = run_ranks(read.world_size, load_train, config, read, tmp_path)
    saved, loaded = (whole([result[0] for result in results]) for results in (first, second))
    assert distance(loaded, saved)[0] == 0.0
    expected, found = (whole([result[1] for result in results]) for results in (first, second))
    error, name = distance(found, expected)
    assert error <= 1e-6, f"{name}: {error:.2e} apart after one more update"
    assert distance(expected, saved)[0] > 1e-4, "an update that changes nothing shows nothing"


def test_megatron_still_loses_count_of_padding(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once this fails, megatron_fixes.count_padding has nothing left to do."""
    monkeypatch.setattr(megatron_fixes, "count_padding", lambda buffers: None)
    config, layout = settings(models["tied"], "fp32"), Layout(pipeline=2)
    saved = [result[0] for result in run_ranks(2, train_save_train, config, layout, tmp_path)]
    loaded = [result[0] for result in run_ranks(2, load_train, config, layout, tmp_path)]
    assert distance(whole(loaded), whole(saved))[0] > 0.1


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_same_layout_goes_on_bit_for_bit(models: dict[str, Path], tmp_path: Path, dtype: str) -> None:
    config, layout = settings(models["tied"], dtype), Layout(pipeline=2, data=2)
    first = run_ranks(4, train_save_train, config, layout, tmp_path)
    second = run_ranks(4, load_train, config, layout, tmp_path)
    for (saved, expected, grad_norm, states), (loaded, found, other_norm, other_states) in zip(
        first, second, strict=True
    ):
        assert grad_norm == other_norm
        assert distance(loaded, saved)[0] == distance(found, expected)[0] == 0.0
        assert all(torch.equal(a, b) for a, b in zip(states, other_states, strict=True))


def test_rates_and_length_are_those_of_the_configuration_that_resumes(models: dict[str, Path], tmp_path: Path) -> None:
    """Adam's moments go on, and the schedule is the new one at the same update: only the size of the step changes."""
    config, layout = settings(models["tied"], "fp32"), Layout(data=2)
    changed = config.model_copy(
        update={
            "run": config.run.model_copy(update={"steps": 2 * config.run.steps}),
            "optimizer": config.optimizer.model_copy(update={"lr": 5e-4, "head_lr": 7e-3, "weight_decay": 0.0}),
        }
    )
    first = run_ranks(2, train_save_train, config, layout, tmp_path)
    saved, plain = (whole([result[i] for result in first]) for i in (0, 1))

    def resume() -> tuple[dict[str, Tensor], float, float]:
        policy = build(changed, layout)
        assert checkpoints_of(policy, tmp_path).load() is not None
        update = learn(policy, UPDATES)
        return weights(policy), update.lr, update.head_lr

    found = run_ranks(2, resume)
    left = 1 - (UPDATES + 1) / (changed.run.steps + 1)
    for _, lr, head_lr in found:
        assert (lr, head_lr) == pytest.approx((5e-4 * left, 7e-3 * left))
    resumed = whole([result[0] for result in found])
    before = 1 - (UPDATES + 1) / (config.run.steps + 1)
    for name, old, new in ((HEAD, 3e-3 * before, 7e-3 * left), (NORM, config.optimizer.lr * before, 5e-4 * left)):
        # Megatron's weight decay leaves out vectors such as a norm's weight; the head's is in both rates.
        decay = old * 0.1 * saved[name] if name == HEAD else 0.0
        expected = (plain[name] - saved[name] + decay) * new / old
        error = ((resumed[name] - saved[name]) - expected).abs().max() / expected.abs().max()
        assert error < 1e-3, name


class NormWithExtraState(spec.RMSNorm):
    """Saves something beside its parameters, as every module of Transformer Engine does."""

    def get_extra_state(self) -> Tensor:
        return torch.empty(0)

    def set_extra_state(self, state: Tensor) -> None:
        pass


@pytest.mark.parametrize("saved_by", [spec.RMSNorm, NormWithExtraState])
def test_modules_with_and_without_extra_state_load_each_others_checkpoints(
    models: dict[str, Path], tmp_path: Path, saved_by: type[spec.RMSNorm], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, layout = settings(models["tied"], "bf16"), Layout(pipeline=2)
    (loaded_by,) = {spec.RMSNorm, NormWithExtraState} - {saved_by}
    monkeypatch.setattr(spec, "RMSNorm", saved_by)
    saved = whole([result[0] for result in run_ranks(2, train_save_train, config, layout, tmp_path)])
    monkeypatch.setattr(spec, "RMSNorm", loaded_by)
    loaded = whole([result[0] for result in run_ranks(2, load_train, config, layout, tmp_path)])
    assert distance(loaded, saved)[0] == 0.0


@pytest.mark.parametrize(
    ("key", "is_extra"),
    [
        ("decoder.layers.0.input_layernorm._extra_state", True),
        ("decoder.layers.0.mlp.experts.experts.linear_fc1._extra_state127", True),
        ("decoder.layers.0.input_layernorm.weight", False),
    ],
)
def test_extra_states_of_experts_are_numbered(key: str, is_extra: bool) -> None:
    """Transformer Engine's names; a checkpoint that has some of them and not others can't be written."""
    assert bool(checkpoint._EXTRA_STATE.search(key)) is is_extra


def test_a_new_run_begins_with_the_weights_of_a_checkpoint(models: dict[str, Path], tmp_path: Path) -> None:
    """Under another layout, with a fresh optimizer; a head of another shape begins as in any new run."""
    config, layout = settings(models["tied"], "bf16"), Layout(data=2)
    saved = whole([result[0] for result in run_ranks(2, train_save_train, config, layout, tmp_path)])
    path = tmp_path / f"step_{UPDATES:06d}"
    other = config.model_copy(update={"contrastive": config.contrastive.model_copy(update={"dim": 8})})

    def begin(settings: Config) -> tuple[bool, dict[str, Tensor], dict[str, Tensor], int]:
        policy = build(settings, Layout(tensor=2, sequence=True))
        fits = checkpoints_of(policy, tmp_path / "new").load_weights(path)
        before = weights(policy)
        if fits:
            learn(policy, 0)
        return fits, before, weights(policy), policy.version

    results = run_ranks(2, begin, config)
    assert [(fits, version) for fits, *_, version in results] == [(True, 1)] * 2
    assert distance(whole([result[1] for result in results]), saved)[0] == 0.0
    moved, name = distance(whole([result[2] for result in results]), saved)
    assert 0 < moved < 0.5, f"{name}: the update starts from the loaded weights, not from those that were built"
    fits, found, *_ = run_ranks(2, begin, other)[0]
    assert not fits and found.pop(HEAD).shape[0] == 8
    assert distance(found, {key: value for key, value in saved.items() if key != HEAD})[0] == 0.0


@pytest.mark.parametrize(("written", "read"), [(2, 1), (1, 2)])
def test_whole_experts_do_not_go_on_from_divided_ones(
    models: dict[str, Path], tmp_path: Path, written: int, read: int
) -> None:
    def refused(config: Config) -> str:
        with pytest.raises(ConfigError) as caught:
            load_train(config, Layout(data=2, expert=read), tmp_path)
        return str(caught.value)

    config = settings(models["experts"], "fp32")
    run_ranks(2, train_save_train, config, Layout(data=2, expert=written), tmp_path)
    for message in run_ranks(2, refused, config):
        assert "was written as data 2" in message.replace("tensor 1 x pipeline 1 x context 1 x ", "")
        assert ("set parallel.expert above 1" if written == 2 else "set parallel.expert and tensor to 1") in message


def test_an_update_draws_from_no_random_state(models: dict[str, Path]) -> None:
    """Random states are left behind when the number of ranks changes; this is why that makes no difference."""

    def check(config: Config) -> None:
        policy = build(config, Layout(data=2))
        before = random_states(policy)
        learn(policy, 0)
        assert all(torch.equal(a, b) for a, b in zip(before, random_states(policy), strict=True))

    run_ranks(2, check, settings(models["tied"], "fp32"))


def test_megatron_still_starts_a_manager_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once this fails, megatron_fixes.need_no_manager has nothing left to do."""
    monkeypatch.setattr(filesystem_async, "_results_queue", None)
    theirs = filesystem_async.get_write_results_queue("fork")
    manager = theirs._manager
    assert manager._process.is_alive()
    manager.shutdown()
    megatron_fixes.need_no_manager()
    assert isinstance(filesystem_async.get_write_results_queue(), queue.Queue)
