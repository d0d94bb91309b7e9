"""The planner's bytes against those of real trainers on a CPU: one rank and two, tensor, pipeline and data parallel.

Weights, gradients, optimizer and reference exactly; activations within 5 % of what autograd keeps at one time. Not
covered: Transformer Engine's kernels, and everything that is only on a GPU (engine, caches, the driver).
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.scaling import small_loss
from megatron_mcpo.config.config import Config
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.data.batch import make_batch
from megatron_mcpo.distributed import parallel
from megatron_mcpo.mcore.offload import state_tensors
from megatron_mcpo.mcore.policy import Policy, Reference
from megatron_mcpo.planner.activations import PLAIN
from megatron_mcpo.planner.hardware import H100
from megatron_mcpo.planner.memory import ITEMSIZE, RankMemory, engine_memory, rank_memory
from megatron_mcpo.planner.planning import head_of
from megatron_mcpo.planner.ranks import rank_size
from megatron_mcpo.planner.step_shape import step_shape
from tests.support.planned import Kind, Trainer, config_of, rollouts, save_model
from tests.support.ranks import run_ranks

SECONDS = 540.0  # bf16 is slow on a CPU without AVX-512


class Kept:
    """Bytes of the tensors that autograd keeps, each memory counted once, parameters not at all."""

    def __init__(self, policy: Policy):
        self.now = self.peak = 0
        self._uses: Counter[int] = Counter()
        self._not = {each.data_ptr() for chunk in policy.chunks for each in chunk.parameters()}
        self._not |= {buffer.param_data.untyped_storage().data_ptr() for buffer in policy.gradient_buffers}

    def pack(self, tensor: Tensor) -> "Tensor | _Held":
        memory = tensor.untyped_storage()
        if not self._not.isdisjoint((tensor.data_ptr(), memory.data_ptr())):
            return tensor
        return _Held(self, tensor)

    def add(self, tensor: Tensor, uses: int) -> None:
        memory = tensor.untyped_storage()
        before = self._uses[memory.data_ptr()]
        self._uses[memory.data_ptr()] += uses
        if before == 0 or before + uses == 0:
            self.now += uses * memory.nbytes()
        self.peak = max(self.peak, self.now)

    @contextmanager
    def counting(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self.pack, _Held.unpack):
            yield


class _Held:
    """A kept tensor; counted until nobody keeps it any more."""

    def __init__(self, kept: Kept, tensor: Tensor):
        self.kept, self.tensor = kept, tensor
        kept.add(tensor, 1)

    def __del__(self) -> None:
        self.kept.add(self.tensor, -1)

    @staticmethod
    def unpack(value: "Tensor | _Held") -> Tensor:
        return value.tensor if isinstance(value, _Held) else value


def measured(config: Config, world_size: int) -> dict[str, float]:
    """Bytes of a real trainer on this rank after an update."""
    trainer = Trainer.of(config, world_size)
    policy, reference = trainer.policy, trainer.reference
    kept = Kept(policy)
    with kept.counting():
        policy.update(trainer.batch, small_loss)
    buffers = policy.gradient_buffers
    return {
        "weights": sum(buffer.param_data.nbytes for buffer in buffers),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": optimizer_bytes(policy),
        "reference": sum(each.nbytes for chunk in reference.chunks for each in chunk.parameters()),
        "kept": kept.peak,
        "params": sum(each.numel() for chunk in policy.chunks for each in chunk.parameters()),
    }


def optimizer_bytes(policy: Policy) -> int:
    """Moments, and the fp32 copies that they belong to."""
    total = 0
    inner = getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])
    for optimizer in inner:
        for group in optimizer.optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.optimizer.state[parameter]
                total += parameter.nbytes + state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes
    return total


def planned(config: Config, world_size: int, stage: int) -> dict[str, float]:
    layout, model = config.layout(world_size), from_folder(Path(config.model.path))
    head, shape = head_of(config, model), step_shape(config, layout, config.rollout.max_response_tokens)
    size = rank_size(model, layout, head, stage)
    engine = engine_memory(config, model, layout, H100, shape)
    assert ITEMSIZE[config.model.dtype] == 2
    memory = rank_memory(config, model, layout, size=size, head=head, shape=shape, engine=engine, kernels=PLAIN)
    return {**memory.parts, "kept": memory.parts["activations"], "params": size.params}


CASES: list[tuple[Kind, int, dict[str, dict[str, Any]]]] = [
    ("llama", 1, {}),
    ("qwen3", 1, {}),
    ("qwen3", 1, {"model": {"recompute": "full"}}),
    ("qwen3", 1, {"model": {"recompute": "selective"}}),
    ("experts", 1, {"model": {"recompute": "selective"}}),
    ("experts", 1, {}),
    ("qwen3", 2, {"parallel": {"tensor": 2}}),
    ("qwen3", 2, {"parallel": {"tensor": 2, "sequence": False}}),
    ("qwen3", 2, {"parallel": {"pipeline": 2}}),
    ("qwen3", 2, {"parallel": {"pipeline": 2, "virtual_pipeline": 2}}),
    ("qwen3", 2, {"parallel": {"pipeline": 2}, "model": {"recompute": "full"}}),
    ("llama", 2, {"parallel": {"data": 2}, "contrastive": {"dim": 64, "head": "mlp"}}),
    ("experts", 2, {"parallel": {"data": 2, "expert": 2}}),
]


@pytest.mark.parametrize(("kind", "world_size", "sections"), CASES, ids=str)
def test_bytes_are_those_of_a_real_trainer(
    tmp_path: Path, kind: Kind, world_size: int, sections: dict[str, dict[str, Any]]
) -> None:
    save_model(tmp_path, kind)
    config = config_of(tmp_path, **sections)
    stages = config.parallel.pipeline
    for rank, found in enumerate(run_ranks(world_size, measured, config, world_size, timeout=SECONDS)):
        expected = planned(config, world_size, rank * stages // world_size)
        exact = {name: expected[name] for name in ("weights", "gradients", "optimizer", "reference", "params")}
        assert {name: found[name] for name in exact} == exact, f"rank {rank}"
        assert found["kept"] == pytest.approx(expected["kept"], rel=0.05), f"rank {rank}"


OFFLOADED: dict[str, dict[str, Any]] = {"optimizer": {"offload": True}, "model": {"offload_reference": True}}


def in_host_memory(config: Config) -> tuple[int, int]:
    """(bytes of a real trainer that wait in host memory after an update, those of its gradient buffers)."""
    model = from_folder(Path(config.model.path))
    groups = parallel.init(config.layout(1), seed=0, timeout_seconds=60)
    policy, reference = Policy(config, model, groups), Reference(config, model, groups)
    batch = make_batch(rollouts(config), num_data_ranks=1, data_rank=0, share_prompts=False)
    policy.update(batch, lambda x: (x.logp_r.sum() * 1e-6, {}))
    weights = [each for chunk in reference.chunks for each in chunk.parameters()]
    waiting = sum(tensor.nbytes for tensor in [*state_tensors(policy.optimizer), *weights])
    return waiting, sum(buffer.grad_data.untyped_storage().nbytes() for buffer in policy.gradient_buffers)


def test_what_waits_in_host_memory_is_planned_there_and_not_in_the_phases(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen3")
    model = from_folder(tmp_path)

    def memory_of(config: Config) -> RankMemory:
        layout = config.layout(1)
        head, shape = head_of(config, model), step_shape(config, layout, config.rollout.max_response_tokens)
        engine = engine_memory(config, model, layout, H100, shape)
        size = rank_size(model, layout, head, 0)
        return rank_memory(config, model, layout, size=size, head=head, shape=shape, engine=engine, kernels=PLAIN)

    plain, offloaded = memory_of(config_of(tmp_path)), memory_of(config_of(tmp_path, **OFFLOADED))
    assert run_ranks(1, in_host_memory, config_of(tmp_path, **OFFLOADED), timeout=SECONDS)[0] == (offloaded.host, 0)
    assert (plain.host, plain.parts) == (0.0, offloaded.parts)
    state = sum(plain.parts[name] for name in ("gradients", "optimizer"))
    saved = {phase: plain.phases[phase] - offloaded.phases[phase] for phase in plain.phases}
    assert saved["rollout"] == saved["sync"] == pytest.approx(state + plain.parts["reference"])
    assert saved["score"] == pytest.approx(state)
    assert saved["update"] >= plain.parts["reference"] - 1
