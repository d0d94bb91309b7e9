"""The planner's bytes on the wire against the messages of real gloo ranks, counted where torch hands them out.

Not covered: Transformer Engine's ring of context parallelism, and what NCCL makes of a message.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from test_planner_memory import Kind, config_of, rollouts, save_model
from torch import Tensor

from megatron_mcpo import parallel
from megatron_mcpo.batch import make_batch
from megatron_mcpo.config import Config
from megatron_mcpo.gather import gather_rows
from megatron_mcpo.hf_config import from_folder
from megatron_mcpo.mcore.policy import LossInput, Policy, Reference
from megatron_mcpo.planner.planning import head_of
from megatron_mcpo.planner.ranks import rank_size
from megatron_mcpo.planner.wire import wire_bytes
from megatron_mcpo.planner.workload import workload
from megatron_mcpo.weights.sync import Meter, export
from tools.ranks import run_ranks
from tools.received import Received


def counted(config: Config, world_size: int) -> dict[str, float]:
    """One step of a real trainer, without an engine."""
    layout, model = config.layout(world_size), from_folder(Path(config.model.path))
    groups = parallel.init(layout, seed=0, timeout_seconds=60)
    policy, reference = Policy(config, model, groups), Reference(config, model, groups)
    batch = make_batch(
        rollouts(config),
        num_data_ranks=layout.data,
        data_rank=groups.data_rank,
        share_prompts=False,
    )

    def loss(x: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
        assert x.z_nD is not None
        return x.logp_r.sum() * 1e-6 + x.z_nD.sum() * 1e-6, {}

    with Received(groups) as training:
        z_ND = policy.score(batch).z_ND
        reference.score(batch)
        policy.update(batch, loss)
    with Received(groups) as contrast:
        assert z_ND is not None
        gather_rows(z_ND, batch, groups)
    meter = Meter()
    for _ in export(policy.chunks, model, groups, meter=meter):
        pass
    return {**training.bytes, "sync": meter.received, "contrastive": sum(contrast.bytes.values())}


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
    head, load = head_of(config, model), workload(config, layout)
    sizes = [rank_size(model, layout, head, stage) for stage in range(layout.pipeline)]
    expected = wire_bytes(config, model, layout, sizes=sizes, head=head, load=load)
    # Plain attention keeps the keys and values it has gathered; the planned ring sends them again on the way back.
    expected["context"] *= 4 / 5
    found: Counter[str] = Counter()
    for rank in run_ranks(world_size, counted, config, world_size, timeout=240):
        found.update(rank)
    assert found["sync"] == expected["sync"]
    assert found["contrastive"] == expected["contrastive"]
    # Where two kinds of groups are the same ranks, a message could be of either: their sum is compared.
    training = expected.keys() - {"sync", "contrastive"}
    assert sum(found[name] for name in training) == pytest.approx(sum(expected[name] for name in training), rel=0.05)
    if group not in ("expert", "context"):
        assert found[group] == pytest.approx(expected[group], rel=0.05)
