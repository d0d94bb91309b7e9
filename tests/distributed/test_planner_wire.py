"""The planner's bytes on the wire against the messages of real gloo ranks, counted where torch hands them out.

Not covered: Transformer Engine's ring of context parallelism, and what NCCL makes of a message.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scaling import small_loss
from megatron_mcpo.config.config import Config
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.distributed.gather import gather_rows
from megatron_mcpo.planner.memory import ITEMSIZE
from megatron_mcpo.planner.planning import head_of
from megatron_mcpo.planner.push import full_tensor_bytes, is_resharded, received_bytes, resharded_elements
from megatron_mcpo.planner.ranks import rank_size
from megatron_mcpo.planner.step_shape import step_shape
from megatron_mcpo.planner.wire import wire_bytes
from megatron_mcpo.weights.full_sync import TransferStats, export
from megatron_mcpo.weights.reshard_plan import SyncPlan
from tests.support import tiny_models
from tests.support.planned import Kind, Trainer, config_of, save_model
from tests.support.ranks import run_ranks
from tests.support.traffic import Received


def counted(config: Config, world_size: int) -> dict[str, float]:
    """One step of a real trainer, without an engine."""
    trainer = Trainer.of(config, world_size)
    groups, policy, batch = trainer.groups, trainer.policy, trainer.batch
    with Received(groups) as training:
        z_ND = policy.score(batch).z_ND
        trainer.reference.score(batch)
        policy.update(batch, small_loss)
    with Received(groups) as contrast:
        assert z_ND is not None
        gather_rows(z_ND, batch, groups)
    stats = TransferStats()
    for _ in export(policy.chunks, policy.model_config, groups, stats=stats):
        pass
    return {**training.bytes, "sync": stats.received, "contrastive": sum(contrast.bytes.values())}


CASES: list[tuple[Kind, int, dict[str, dict[str, Any]], str]] = [
    ("qwen3", 2, {"parallel": {"tensor": 2}}, "tensor"),
    ("qwen3", 2, {"parallel": {"tensor": 2}, "model": {"recompute": "full"}}, "tensor"),
    ("llama", 2, {"parallel": {"tensor": 2, "sequence": False}}, "tensor"),
    ("qwen3", 2, {"parallel": {"pipeline": 2}}, "pipeline"),
    ("qwen3", 2, {"parallel": {"pipeline": 2, "virtual_pipeline": 2}}, "pipeline"),
    ("qwen3", 2, {"parallel": {"data": 2}}, "data"),
    ("experts", 2, {"parallel": {"data": 2, "expert": 2}}, "expert"),
    ("qwen3", 2, {"parallel": {"context": 2}}, "context"),
    ("qwen3", 4, {"parallel": {"tensor": 2, "pipeline": 2}}, "tensor"),
]


@pytest.mark.parametrize(("kind", "world_size", "sections", "group"), CASES, ids=str)
def test_bytes_are_those_of_real_messages(
    tmp_path: Path, kind: Kind, world_size: int, sections: dict[str, dict[str, Any]], group: str
) -> None:
    save_model(tmp_path, kind)
    config = config_of(tmp_path, **sections)
    layout, model = config.layout(world_size), from_folder(tmp_path)
    head, shape = head_of(config, model), step_shape(config, layout, config.rollout.max_response_tokens)
    sizes = [rank_size(model, layout, head, stage) for stage in range(layout.pipeline)]
    expected = wire_bytes(config, model, layout, sizes=sizes, head=head, shape=shape)
    # Plain attention keeps the keys and values it has gathered; the planned ring sends them again on the way back.
    expected["context"] *= 4 / 5
    found: Counter[str] = Counter()
    for rank in run_ranks(world_size, counted, config, world_size, timeout=540):
        found.update(rank)
    e = ITEMSIZE[config.model.dtype]
    gathered = [full_tensor_bytes(model, layout, stage, e) for stage in range(layout.pipeline)]
    assert found["sync"] == sum(gathered) * layout.world_size // layout.pipeline
    assert kind != "experts" or found["sync"] == expected["sync"]
    assert found["contrastive"] == expected["contrastive"]
    # Where two kinds of groups are the same ranks, a message could be of either: their sum is compared.
    training = expected.keys() - {"sync", "contrastive"}
    assert sum(found[name] for name in training) == pytest.approx(sum(expected[name] for name in training), rel=0.05)
    if group not in ("expert", "context"):
        assert found[group] == pytest.approx(expected[group], rel=0.05)


@pytest.mark.parametrize("engine_ranks", [1, 2, 4])
@pytest.mark.parametrize(
    "layout",
    [
        Layout(data=4),
        Layout(tensor=2, data=2, context=2, sequence=True),
        Layout(tensor=4, data=2, sequence=True),
        Layout(pipeline=4),
        Layout(tensor=2, pipeline=2, virtual_pipeline=2, data=2, sequence=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_bytes_from_rank_to_rank_are_those_of_the_push_plan(
    tmp_path: Path, kind: tiny_models.Kind, layout: Layout, engine_ranks: int
) -> None:
    tiny_models.save_model(tmp_path, kind)
    model = from_folder(tmp_path)
    expected = SyncPlan(model=model, layout=layout, engine_ranks=engine_ranks).totals().received
    assert resharded_elements(model, layout, engine_ranks) == expected
    config = tiny_models.config(tmp_path, model={"dtype": "bf16"}, engine={"tensor_parallel": engine_ranks})
    assert is_resharded(config, model)
    assert sum(received_bytes(config, model, layout, 2)) == 2 * sum(expected)


def test_the_way_of_a_push_is_the_program_s(tmp_path: Path) -> None:
    quantized: dict[str, dict[str, Any]] = {
        "engine": {"quantization": "fp8_per_block"},
        "model": {"dtype": "bf16"},
        "algorithm": {"importance": "truncate"},
    }
    for name, kind, sections, direct in (
        ("plain", "untied", {}, True),
        ("experts", "experts", {}, False),
        ("packed", "untied", quantized, False),
        ("servers", "untied", {"engine": {"servers": ["http://127.0.0.1:8000"]}}, False),
    ):
        tiny_models.save_model(tmp_path / name, kind)
        config = tiny_models.config(tmp_path / name, **sections)
        assert is_resharded(config, from_folder(tmp_path / name)) is direct, name
