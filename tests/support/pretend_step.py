"""One MCPO step with everything that touches a device, on real ranks: for the CPU and for the pretend CUDA device.

`python -m tests.support.pretend_step MODELS FILE` runs all CASES on the pretend device and writes what they found.
"""

import json
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import pretend_cuda

if __name__ == "__main__":
    pretend_cuda.install()  # before the imports below, which ask whether there is a GPU

import torch

from benchmarks.push import Engine
from megatron_mcpo.config.config import Config
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.data.batch import make_batch
from megatron_mcpo.distributed import parallel
from megatron_mcpo.distributed.device import uses_gpu
from megatron_mcpo.distributed.gather import gather_rows
from megatron_mcpo.distributed.memory import trim
from megatron_mcpo.mcore.policy import Policy, Reference
from megatron_mcpo.reporting.step_metrics import BatchReport, rollout_stats, step_metrics
from megatron_mcpo.trainer.gradient_diagnostics import domain_gradients, term_gradients
from megatron_mcpo.trainer.objective import Objective, Scored
from megatron_mcpo.weights.reshard_sync import FullTensorSync, choose_weight_sync
from tests.support import tiny_models
from tests.support.checkpoints import checkpoints_of, learn
from tests.support.ranks import run_ranks


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layout with settings that move tensors between host and device."""

    layout: Layout
    kind: tiny_models.Kind = "tied"
    dtype: str = "fp32"
    recompute: str = "none"
    mode: str = "loss"
    offload: bool = False
    in_background: bool = False

    def config(self, models: Path) -> Config:
        return tiny_models.config(
            models / self.kind,
            model={"dtype": self.dtype, "recompute": self.recompute, "offload_reference": self.offload},
            batch={"micro_batch_tokens": 128},
            optimizer={"lr": 1e-3, "offload": self.offload},
            algorithm={"kl_weight": 0.01},
            contrastive={"dim": 16, "mode": self.mode, "diagnose_every": 1},
        )


CASES = {
    "fp32, data 2": Case(layout=Layout(data=2)),
    "bf16, data 2, offloaded, saved in background": Case(
        layout=Layout(data=2), dtype="bf16", offload=True, in_background=True
    ),
    "fp32, tensor 2, offloaded, recompute full": Case(
        layout=Layout(tensor=2, sequence=True), recompute="full", offload=True
    ),
    "fp32, pipeline 2, mode reward, recompute selective": Case(
        layout=Layout(pipeline=2), kind="untied", recompute="selective", mode="reward"
    ),
    "fp32, experts 2": Case(layout=Layout(data=2, expert=2), kind="experts"),
    "fp32, context 2": Case(layout=Layout(context=2), kind="untied"),
}


def step(case: Case, models: Path, folder: Path) -> dict[str, Any]:
    """Run one step on this rank, save, learn more, load the checkpoint into a new policy and learn the same.

    Returns the step's metrics, sums of the weights as exported and as synced, and where the tensors of the policy are.
    """
    config = case.config(models)
    with _mode():
        groups = parallel.init(case.layout, seed=0, timeout_seconds=120)
        model = from_folder(Path(config.model.path))
        policy, reference = Policy(config, model, groups), Reference(config, model, groups)
        metrics = _learn(config, policy, reference)
        found: dict[str, Any] = {"metrics": metrics, "exported": _sums(policy), "places": sorted(_places(policy))}
        found["synced"] = [_synced(policy, only_full=only_full) for only_full in (True, False)]
        found["fused"] = policy.chunks[0].config.gradient_accumulation_fusion
        checkpoints = checkpoints_of(policy, folder, in_background=case.in_background)
        checkpoints.save(1, {"loop": 1})
        checkpoints.finish()
        learn(policy, 1)
        again = Policy(config, model, groups)
        loaded = checkpoints_of(again, folder).load()
        assert loaded is not None and loaded.step == 1
        learn(again, 1)
        pairs = zip(policy.weights(), again.weights(), strict=True)
        found["resumed_apart"] = [name for (name, mine), (_, theirs) in pairs if not torch.equal(mine, theirs)]
        trim()
    return found


def mixed_up(case: Case, models: Path) -> dict[str, str]:
    """Return what is said when something is left on the host: advantages of the loss, a tensor over NCCL."""
    config = case.config(models)
    with _mode():
        groups = parallel.init(case.layout, seed=0, timeout_seconds=120)
        policy = Policy(config, from_folder(Path(config.model.path)), groups)
        batch = _batch(policy)
        left_behind_R = torch.ones(int(batch.response_lens_N.sum()))
        said = {}
        try:
            policy.update(batch, lambda x: ((x.logp_r * left_behind_R[x.response_r]).sum(), {}))
        except RuntimeError as error:
            said["loss"] = str(error)
        try:
            torch.distributed.all_reduce(torch.ones(2), group=groups.world)
        except RuntimeError as error:
            said["collective"] = str(error)
        return said


def _mode() -> AbstractContextManager[Any]:
    return pretend_cuda.Device() if uses_gpu() else nullcontext()


def _batch(policy: Policy) -> Any:
    return make_batch(
        tiny_models.rollout_groups(num_prompts=6, num_samples=4),
        num_data_ranks=policy.groups.layout.data,
        data_rank=policy.groups.data_rank,
        share_prompts=policy.shares_prompts,
    )


def _learn(config: Config, policy: Policy, reference: Reference) -> dict[str, float]:
    """Do what Trainer.score, learn, diagnose and log do."""
    sampled = tiny_models.rollout_groups(num_prompts=6, num_samples=4)
    batch, groups = _batch(policy), policy.groups
    old, reference_logp_R = policy.score(batch), reference.score(batch).logp_R
    objective = Objective(config, policy, groups)
    prepared = objective.prepare(
        Scored(groups=sampled, batch=batch, old=old, reference_logp_R=reference_logp_R), step=1
    )
    assert prepared.contrasted is not None
    diagnosis = domain_gradients(objective, policy, prepared)
    if config.contrastive.mode == "loss":
        diagnosis |= term_gradients(objective, policy, prepared)
    update = policy.update(batch, objective.loss(prepared), representation_version=prepared.representation_version)
    report = BatchReport(
        groups=sampled,
        advantages_M=prepared.advantages_M,
        stats_MK=gather_rows(rollout_stats(batch, old, reference_logp_R), batch, groups),
        z_MD=prepared.contrasted.z_MD,
        contrast=prepared.contrasted.contrast,
        labels=batch.labels,
        num_tokens=batch.num_tokens,
        metrics={**update.metrics, "update/grad_norm": update.grad_norm},
        diagnosis=diagnosis,
    )
    return step_metrics([report], sampled, config.domain_names)


def _synced(policy: Policy, *, only_full: bool) -> dict[str, float]:
    """Return sums of an engine's parameters after a weight sync: of full tensors, or as a run would choose."""
    model, groups = policy.model_config, policy.groups
    engine = Engine(model, engine_ranks=1, rank=0)
    sync, _ = choose_weight_sync(policy.chunks, model, groups, engine, engine_ranks=1)
    if only_full:
        sync = FullTensorSync(chunks=policy.chunks, model=model, groups=groups, engine=engine)
    sync.sync(1)
    return {name: tensor.double().abs().sum().item() for name, tensor in engine.own.items()}


def _sums(policy: Policy) -> dict[str, float]:
    return {name: tensor.double().abs().sum().item() for name, tensor in policy.weights()}


def _places(policy: Policy) -> set[str]:
    """Return which devices hold parameters, gradient buffers and exported weights."""
    tensors = [parameter for chunk in policy.chunks for parameter in chunk.parameters()]
    tensors += [buffer.grad_data for buffer in policy.gradient_buffers] + [tensor for _, tensor in policy.weights()]
    return {tensor.device.type for tensor in tensors}


def main(models: Path, file: Path) -> None:
    found: dict[str, Any] = {}
    for number, (name, case) in enumerate(CASES.items()):
        found[name] = run_ranks(2, step, case, models, file.parent / f"checkpoints_{number}", timeout=60)
    found["mixed up"] = run_ranks(2, mixed_up, next(iter(CASES.values())), models)
    file.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
