"""Optimizer and reference in host memory: nothing that a run computes or saves changes, and the device holds less.

On a CPU both places are host memory. Tensors really leave the place they compute in: its memory is freed, and what
comes back is a copy. Not covered: pinned memory, a GPU's allocator, Transformer Engine's optimizer.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_mcpo.config.config import Config
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.mcore.offload import state_tensors
from megatron_mcpo.mcore.policy import Policy, Reference
from megatron_mcpo.storage import checkpoint_files
from tests.support import tiny_models
from tests.support.checkpoints import (
    UPDATES,
    build,
    checkpoints_of,
    learn,
    load_train,
    settings,
    train_save_train,
    weights,
)
from tests.support.policies import maximise, start
from tests.support.ranks import run_ranks

LAYOUTS: list[tuple[str, str, Layout]] = [
    ("tied", "bf16", Layout()),
    ("tied", "fp32", Layout(data=2)),
    ("untied", "bf16", Layout(data=2)),
    ("tied", "bf16", Layout(pipeline=2, data=2)),
    ("untied", "bf16", Layout(tensor=2, sequence=True)),
    ("experts", "bf16", Layout(data=2, expert=2)),
]
State = tuple[dict[str, Tensor], list[Tensor], list[float]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("tied", "untied", "experts")}
    for kind, folder in folders.items():
        tiny_models.save_model(folder, kind)
    return folders


def offloaded(config: Config, offload: bool = True) -> Config:
    return config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"offload": offload})})


def storages(tensors: list[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


def gradient_bytes(policy: Policy) -> int:
    return sum(buffer.grad_data.untyped_storage().nbytes() for buffer in policy.gradient_buffers)


def trained(config: Config, layout: Layout) -> State:
    """Weights, optimizer state and gradient norms after a few updates."""
    policy = build(config, layout)
    norms = [learn(policy, seed).grad_norm for seed in range(UPDATES)]
    state = [tensor.clone() for tensor in state_tensors(policy.optimizer)]
    return weights(policy), state, norms


def assert_equal(found: State, expected: State) -> None:
    assert found[2] == expected[2]
    assert found[0].keys() == expected[0].keys()
    assert all(torch.equal(found[0][name], tensor) for name, tensor in expected[0].items())
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found[1], expected[1], strict=True))


@pytest.mark.parametrize(("kind", "dtype", "layout"), LAYOUTS, ids=str)
def test_every_bit_is_the_same(models: dict[str, Path], kind: str, dtype: str, layout: Layout) -> None:
    config = settings(models[kind], dtype)
    expected = run_ranks(layout.world_size, trained, config, layout)
    found = run_ranks(layout.world_size, trained, offloaded(config), layout)
    for mine, theirs in zip(found, expected, strict=True):
        assert len(theirs[1]) > 0
        assert_equal(mine, theirs)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_device_holds_neither_state_nor_gradients_between_updates(models: dict[str, Path], dtype: str) -> None:
    def check(config: Config) -> None:
        policy = build(config, Layout(data=2))
        buffers = {buffer.param_data.untyped_storage().data_ptr() for buffer in policy.gradient_buffers}
        assert gradient_bytes(policy) == 0
        for seed in range(3):
            learn(policy, seed)
            state = state_tensors(policy.optimizer)
            # One block of host memory; fp32 weights are the model's own and stay where it computes.
            (block,) = storages(state)
            assert block not in buffers
            # Nothing else holds what was on the device: the block is as large as the state, up to its alignment.
            size = state[0].untyped_storage().nbytes()
            assert sum(tensor.nbytes for tensor in state) <= size < sum(tensor.nbytes + 64 for tensor in state)
            assert gradient_bytes(policy) == 0
            with policy.optimizer_on_device():
                assert storages(state_tensors(policy.optimizer)).isdisjoint({block})
                assert state_tensors(policy.optimizer)[0] is state[0]
            assert storages(state_tensors(policy.optimizer)) == {block}

    run_ranks(2, check, offloaded(settings(models["tied"], dtype)))


def test_without_the_setting_nothing_moves(models: dict[str, Path]) -> None:
    def check(config: Config) -> None:
        policy = build(config, Layout())
        learn(policy, 0)
        before = storages(state_tensors(policy.optimizer))
        learn(policy, 1)
        with policy.optimizer_on_device():
            assert storages(state_tensors(policy.optimizer)) == before
        assert len(before) > 1 and gradient_bytes(policy) > 0

    run_ranks(1, check, settings(models["tied"], "bf16"))


def test_an_update_that_is_left_out_leaves_no_gradients(models: dict[str, Path]) -> None:
    def check(config: Config) -> None:
        policy, batch = start(config)
        before = [tensor.clone() for tensor in state_tensors(policy.optimizer)]
        assert not policy.update(batch, maximise(float("nan"))).applied
        assert gradient_bytes(policy) == 0
        after = state_tensors(policy.optimizer)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(after, before, strict=True))
        assert policy.update(batch, maximise(1.0)).applied

    run_ranks(1, check, offloaded(tiny_models.config(models["tied"], model={"dtype": "bf16"})))


def test_gradients_of_single_terms_are_the_same(models: dict[str, Path]) -> None:
    def gradient(config: Config) -> tuple[Tensor, int]:
        policy, batch = start(config)
        found = policy.trunk_gradient(batch, maximise(1.0))
        assert policy.update(batch, maximise(1.0)).applied
        return found, gradient_bytes(policy)

    config = tiny_models.config(models["tied"])
    ((expected, kept),) = run_ranks(1, gradient, config)
    ((found, left),) = run_ranks(1, gradient, offloaded(config))
    assert torch.equal(found, expected) and expected.abs().max() > 0
    assert kept > left == 0


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("written", "read"), [(True, True), (True, False), (False, True)])
def test_a_checkpoint_goes_on_bit_for_bit(
    models: dict[str, Path], tmp_path: Path, dtype: str, written: bool, read: bool
) -> None:
    """Saved while the state is in host memory, and loaded by a run that has it elsewhere."""
    config, layout = settings(models["tied"], dtype), Layout(data=2)
    expected = run_ranks(2, train_save_train, config, layout, tmp_path / "expected")
    first = run_ranks(2, train_save_train, offloaded(config, written), layout, tmp_path / "first")
    second = run_ranks(2, load_train, offloaded(config, read), layout, tmp_path / "first")
    for plain, *others in zip(expected, first, second, strict=True):
        for saved, after, norm, _ in others:
            assert norm == plain[2]
            for mine, theirs in ((saved, plain[0]), (after, plain[1])):
                assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())
    # What lies on the disk says nothing of where it was.
    hashes = [checkpoint_files.measure(*shards(tmp_path / name)) for name in ("expected", "first")]
    assert hashes[0] == hashes[1] and hashes[0]


def shards(folder: Path) -> tuple[Path, list[str]]:
    step = folder / f"step_{UPDATES:06d}"
    return step, sorted(path.name for path in step.glob("*.distcp"))


def test_a_save_beside_training_keeps_what_was_there(models: dict[str, Path], tmp_path: Path) -> None:
    def train_on(config: Config, folder: Path, in_background: bool) -> None:
        policy = build(config, Layout(data=2))
        learn(policy, 0)
        checkpoints = checkpoints_of(policy, folder, in_background=in_background)
        checkpoints.save(UPDATES, {"loop": []})
        learn(policy, 1)
        checkpoints.finish()

    config = offloaded(settings(models["tied"], "bf16"))
    for name, in_background in (("waited", False), ("beside", True)):
        run_ranks(2, train_on, config, tmp_path / name, in_background)
    waited, beside = (checkpoint_files.measure(*shards(tmp_path / name)) for name in ("waited", "beside"))
    assert waited == beside and waited


@pytest.mark.parametrize(("kind", "layout"), [("tied", Layout()), ("experts", Layout(tensor=2, sequence=True))])
def test_the_reference_says_the_same_and_waits_in_host_memory(
    models: dict[str, Path], kind: str, layout: Layout
) -> None:
    def scored(config: Config) -> tuple[list[Tensor], set[int], bool]:
        policy, batch = start(config, layout)
        reference = Reference(config, from_folder(Path(config.model.path)), policy.groups)
        weights = [weight for chunk in reference.chunks for weight in chunk.parameters()]
        places = [storages(weights)]
        scores = []
        for _ in range(2):
            scores.append(reference.score(batch).logp_R)
            policy.update(batch, maximise(1.0))
            places.append(storages(weights))
        return scores, set.union(*places), places[0] == places[1] == places[2]

    config = tiny_models.config(models[kind], model={"dtype": "bf16"})
    away = config.model_copy(update={"model": config.model.model_copy(update={"offload_reference": True})})
    for mine, theirs in zip(
        run_ranks(layout.world_size, scored, away), run_ranks(layout.world_size, scored, config), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(mine[0], theirs[0], strict=True))
        assert len(mine[1]) == 1 < len(theirs[1]) and mine[2]
