"""Checkpoints that a thread writes while training goes on, on two real ranks; and that each can be exported by itself.

A gate holds the real writer back, so that what happens meanwhile happens for certain.
Not covered here: copies from a device to the host, which take a GPU; a full disk (test_checkpoint_disk).
"""

import json
import os
import pickle
import resource
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_mcpo.config.config import Config
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.convert.convert import megatron_to_hf
from megatron_mcpo.mcore import saving
from megatron_mcpo.storage import checkpoint_files
from megatron_mcpo.weights import safe_unpickler
from megatron_mcpo.weights.hf_write import read_assets
from tests.support import tiny_models, tiny_run
from tests.support.checkpoints import (
    build,
    checkpoints_of,
    close_gate,
    distance,
    in_background,
    learn,
    names,
    settings,
    until,
    weights,
)
from tests.support.ranks import run_ranks

LAYOUTS = [Layout(data=2), Layout(tensor=2, sequence=True)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_models.save_model(folder, "untied")
    return folder


@pytest.fixture(scope="module")
def config(model: Path) -> Config:
    return settings(model, "bf16")


def contents(checkpoint: Path) -> dict[str, Any]:
    """Every file, but the manifest and what says where and when it was written; shards and all else as bytes."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    table = safe_unpickler.read_metadata(checkpoint)
    table.storage_meta = None
    found[".metadata"] = pickle.dumps(table)
    manifest = json.loads(found.pop("manifest.json"))["files"]
    assert set(manifest) == set(found), "the manifest names every file"
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_training_goes_on_and_what_is_saved_is_the_state_of_the_call(
    config: Config, tmp_path: Path, layout: Layout
) -> None:
    """Bit for bit what is written while training waits."""
    waiting, beside = tmp_path / "waiting", tmp_path / "beside"

    def save_both() -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        policy = build(config, layout)
        learn(policy, 0)
        checkpoints_of(policy, waiting).save(1, {"step": 1})
        saved, gate = weights(policy), close_gate()
        checkpoints = in_background(policy, beside)
        state = {"step": 1}
        checkpoints.save(1, state)
        state["step"] = 2
        for seed in range(1, 3):
            learn(policy, seed)
            checkpoints.advance()
        assert names(beside) == [".step_000001.tmp"], "no name before it is written"
        later = weights(policy)
        gate.set()
        checkpoints.finish()
        assert names(beside) == ["step_000001"]
        found = in_background(policy, beside).load()
        assert found is not None and (found.step, found.state) == (1, {"step": 1})
        return saved, later, weights(policy)

    for saved, later, loaded in run_ranks(2, save_both):
        assert distance(loaded, saved)[0] == 0.0
        assert distance(later, saved)[0] > 1e-4, "training that changes nothing shows nothing"
    expected, found = (contents(folder / "step_000001") for folder in (waiting, beside))
    assert [name for name in expected if expected[name] != found.get(name)] == []
    assert set(expected) == set(found) >= {"__0_0.distcp", "__1_0.distcp", ".metadata", "state.json", "config.json"}


def test_memory_that_training_writes_to_is_copied() -> None:
    live, dead = torch.zeros(3), torch.ones(3)
    [(_, _, (_, [(_, first), (_, second)]))] = saving.host_copies(
        [("path", "name", ([], [("a", live), ("b", dead)]))], {live.untyped_storage().data_ptr()}
    )
    live.fill_(7.0)
    assert first.tolist() == [0.0] * 3
    assert second is dead, "no memory for what nobody writes to"


def test_it_gets_its_name_at_the_first_step_that_finds_all_ranks_done(config: Config, tmp_path: Path) -> None:
    def save() -> None:
        policy = build(config, LAYOUTS[1])
        gate, other = close_gate(), policy.groups.rank == 1
        checkpoints = in_background(policy, tmp_path)
        checkpoints.save(1, {})
        if not other:
            gate.set()
            until(lambda: checkpoints._under_way is not None and checkpoints._under_way[1].is_written)
        torch.distributed.barrier()
        checkpoints.advance()
        assert names(tmp_path) == [".step_000001.tmp"], "rank 1 has not written its part"
        torch.distributed.barrier()
        gate.set()

        def has_name() -> bool:
            checkpoints.advance()
            return checkpoints._under_way is None

        until(has_name)
        assert names(tmp_path) == ["step_000001"]

    run_ranks(2, save)


def test_the_next_save_waits_for_the_one_under_way(config: Config, tmp_path: Path) -> None:
    def save_twice() -> None:
        policy = build(config, LAYOUTS[0])
        gate = close_gate()
        checkpoints = in_background(policy, tmp_path)
        checkpoints.save(1, {})
        threading.Timer(0.3, gate.set).start()
        checkpoints.save(2, {})
        assert "step_000001" in names(tmp_path)
        checkpoints.finish()
        assert names(tmp_path) == ["step_000001", "step_000002"]

    run_ranks(2, save_twice)


def test_a_write_that_fails_is_an_error_on_every_rank(config: Config, tmp_path: Path) -> None:
    def fail_on_rank_1() -> str:
        policy = build(config, LAYOUTS[1])
        checkpoints = in_background(policy, tmp_path)
        checkpoints.save(1, {})
        checkpoints.finish()
        learn(policy, 0)
        if policy.groups.rank == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        checkpoints.save(2, {})
        learn(policy, 1)
        with pytest.raises(RuntimeError) as caught:
            until(lambda: checkpoints.advance() is not None)
        found = checkpoints.load()
        assert found is not None and (found.step, found.skipped) == (1, ())
        if policy.groups.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        checkpoints.save(3, {})
        checkpoints.finish()
        return str(caught.value)

    first, second = run_ranks(2, fail_on_rank_1)
    assert first == second
    assert "step_000002: can't be written (rank 1: OSError: [Errno 27] File too large); it needs " in first
    assert names(tmp_path) == ["step_000001", "step_000003"], "nothing is left of the second"


def test_killed_while_it_writes_it_goes_on_from_the_one_before(config: Config, tmp_path: Path) -> None:
    def die() -> None:
        policy = build(config, LAYOUTS[0])
        checkpoints = in_background(policy, tmp_path)
        checkpoints.save(1, {})
        checkpoints.finish()
        close_gate()
        checkpoints.save(2, {})
        learn(policy, 0)
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RuntimeError, match="rank 0: died without a traceback"):
        run_ranks(2, die)
    assert names(tmp_path) == [".step_000002.tmp", "step_000001"]

    def go_on() -> None:
        checkpoints = in_background(build(config, LAYOUTS[0]), tmp_path)
        found = checkpoints.load()
        assert found is not None and (found.step, found.skipped) == (1, ())
        checkpoints.save(2, {})
        checkpoints.finish()

    run_ranks(2, go_on)
    assert names(tmp_path) == ["step_000001", "step_000002"]


def test_a_run_that_ends_early_leaves_what_is_under_way(config: Config, tmp_path: Path) -> None:
    """Its thread ends with the tensor that it is at, and the process can end."""

    def stop() -> None:
        policy = build(config, LAYOUTS[1])
        gate = close_gate()
        checkpoints = in_background(policy, tmp_path)
        checkpoints.save(1, {})
        threading.Timer(0.3, gate.set).start()
        checkpoints.close()
        assert checkpoints._under_way is not None and isinstance(checkpoints._under_way[1]._error, InterruptedError)
        assert [thread.name for thread in threading.enumerate() if thread.name.startswith("save ")] == []

    run_ranks(2, stop)
    assert names(tmp_path) == [".step_000001.tmp"]


def test_a_checkpoint_is_exported_without_the_folder_the_run_began_with(tmp_path: Path) -> None:
    """On another machine: from wherever it was copied to, with tokenizer and chat template, checked by the manifest."""
    model, run = tmp_path / "model", tmp_path / "run"
    tiny_run.save_chat_model(model, trained=False)
    wanted = {name: content for name, content in read_assets(model).items() if name != "config.json"}
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} <= set(wanted)

    def save() -> dict[str, Tensor]:
        policy = build(settings(model, "fp32"), LAYOUTS[0])
        learn(policy, 0)
        checkpoints = checkpoints_of(policy, run)
        checkpoints.assets = read_assets(model) if policy.groups.rank == 0 else {}
        checkpoints.save(1, {})
        return {name: tensor for name, tensor in weights(policy).items() if name != "contrastive_head"}

    trained, _ = run_ranks(2, save)
    shutil.rmtree(model)
    elsewhere = (run / "step_000001").rename(tmp_path / "elsewhere")
    assert checkpoint_files.problems(elsewhere, part=0, num_parts=1) == []
    megatron_to_hf(elsewhere, tmp_path / "out", verify_forward=False, say=lambda _: None)
    assert distance(load_file(tmp_path / "out" / "model.safetensors"), trained)[0] == 0.0
    assert {name: (tmp_path / "out" / name).read_bytes() for name in wanted} == wanted
    (elsewhere / "chat_template.jinja").write_text("another")
    assert "chat_template.jinja" in checkpoint_files.problems(elsewhere, part=0, num_parts=1)[0]
