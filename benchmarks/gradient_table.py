"""Check the gradient of every parameter, and its update, in every parallel layout, on real gloo ranks.

`.venv/bin/python -m benchmarks.gradient_table [--json] [--layouts tp2 dp2 ...]`
The reference is autograd in float64 through a Hugging Face model in one process (tests/support/reference.py), and the
formula of Adam's first update. An error is the largest in a parameter's gradient, or in its change, relative to its
largest entry. Exit code 1: an error exceeds the bound.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.gradient_variants import VARIANTS
from megatron_mcpo.config.config import Config
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.data.batch import make_batch
from megatron_mcpo.distributed import parallel
from megatron_mcpo.distributed.parallel import Groups
from megatron_mcpo.mcore import policy as policy_module
from megatron_mcpo.mcore.head import ContrastiveHead, HeadSpec
from megatron_mcpo.mcore.policy import Policy
from megatron_mcpo.trainer.objective import Objective, Scored
from megatron_mcpo.types import RolloutGroup, Scores
from megatron_mcpo.weights.full_sync import export
from tests.support import reference, tiny_models
from tests.support.ranks import run_ranks

BOUND = 1e-5
HEAD = "contrastive_head"
UPDATE = "update of "
_BUCKET_ELEMENTS = 3000  # the gradients of the small models are reduced in several buckets
LAYOUTS = {
    "dp1": Layout(),
    "dp2": Layout(data=2),
    "dp4": Layout(data=4),
    "tp2": Layout(tensor=2),
    "tp2_sp": Layout(tensor=2, sequence=True),
    "tp4_sp": Layout(tensor=4, sequence=True),
    "tp3_sp": Layout(tensor=3, sequence=True),
    "pp2": Layout(pipeline=2),
    "pp3": Layout(pipeline=3),
    "pp4": Layout(pipeline=4),
    "pp3_uneven": Layout(pipeline=3, layers_per_stage=(1, 2, 1)),
    "vpp2": Layout(pipeline=2, virtual_pipeline=2),
    "cp2": Layout(context=2),
    "tp2_pp2": Layout(tensor=2, pipeline=2, sequence=True),
    "dp2_tp2": Layout(tensor=2, data=2, sequence=True),
    "dp2_pp2": Layout(pipeline=2, data=2),
    "tp2_cp2": Layout(tensor=2, context=2, sequence=True),
    "pp2_cp2": Layout(pipeline=2, context=2),
    "vpp2_dp2": Layout(pipeline=2, virtual_pipeline=2, data=2),
    "tp2_pp2_dp2": Layout(tensor=2, pipeline=2, data=2, sequence=True),
    "ep2": Layout(data=2, expert=2),
    "ep4": Layout(data=4, expert=4),
    "ep2_dp4": Layout(data=4, expert=2),
    "ep2_tp2": Layout(tensor=2, expert=2, sequence=True),
    "ep2_tp4": Layout(tensor=4, expert=2, sequence=True),
    "ep2_cp2": Layout(context=2, expert=2),
    "ep2_pp2": Layout(pipeline=2, data=2, expert=2),
}
_EVEN = {"num_layers": 4, "num_heads": 4, "num_kv_heads": 2}
MODELS: dict[str, tuple[tuple[tiny_models.Kind, ...], dict[str, int]]] = {
    "halves": (("tied", "untied"), _EVEN),
    "thirds": (("tied", "untied"), {"num_layers": 3, "num_heads": 9, "num_kv_heads": 3}),
    "experts": (("experts",), _EVEN),
}
"""Models whose layers and heads can be divided by 2 or by 3, and one with experts."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, a configuration, rollouts, and the gradient of every parameter as the reference computes it.

    updated: the optimizer's update is checked, too
    """

    name: str
    config: Config
    groups: Sequence[RolloutGroup]
    share_prompts: bool
    expected: dict[str, Tensor]
    updated: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        """Return what is checked of each parameter, as prefixes of its name: the gradient, and its update."""
        return ("", UPDATE) if self.updated else ("",)

    def in_bf16(self) -> Self:
        """Return the same case for a policy that computes in bf16."""
        model = self.config.model.model_copy(update={"dtype": "bf16"})
        return replace(self, config=self.config.model_copy(update={"model": model}))


def cases_for(layout: Layout, cases: Sequence[Case]) -> list[Case]:
    """Return the cases for a layout; context parallelism divides rollouts, so that it can't have GSPO's ratios."""
    return [case for case in cases if layout.context == 1 or case.config.algorithm.clip != "gspo"]


def models_for(layout: Layout) -> list[str]:
    """Return the keys of MODELS that a layout is tried with."""
    if layout.expert > 1:
        return ["experts"]
    if layout in (Layout(), Layout(tensor=2, sequence=True)):
        return ["halves", "experts"]
    return ["thirds" if 3 in (layout.tensor, layout.pipeline) and not layout.layers_per_stage else "halves"]


def make_cases(folder: Path, model: str, *, sure: bool = False) -> list[Case]:
    """Return every variant with the models of one key of MODELS, whose files are written into `folder`.

    sure: no choice of experts, positives or clipped tokens could change by rounding to bf16
    """
    kinds, shape = MODELS[model]
    cases = []
    for kind in kinds:
        reference_model = tiny_models.save_model(folder / kind, kind, sure=sure, **shape)
        for variant in VARIANTS:
            groups = tiny_models.rollout_groups(num_prompts=6, num_samples=3, shortest_prompt=variant.shortest_prompt)
            groups = tiny_models.uneven(groups) if variant.uneven else groups
            sections = _without_choices(variant.sections) if sure else variant.sections
            if kind == "experts" and variant.replays:
                groups = tiny_models.with_experts(groups, num_layers=shape["num_layers"])
                sections = {**sections, "model": {**sections["model"], "router_replay": "engine"}}
            config = make_config(folder / kind, sections)
            cases.append(
                Case(
                    name=f"{kind}, {variant.name}",
                    config=config,
                    groups=groups,
                    share_prompts=variant.share_prompts,
                    expected=expected_gradients(reference_model, groups, config),
                    updated=variant.updated,
                )
            )
    return cases


def _without_choices(sections: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the sections without bounds on the ratio, and with every candidate as a positive."""
    unclipped = {**sections.get("algorithm", {}), "clip_low": 1.0, "clip_high": 1e6}
    return {**sections, "algorithm": unclipped, "contrastive": {**sections.get("contrastive", {}), "transfer": "all"}}


def make_config(folder: Path, sections: dict[str, dict[str, Any]]) -> Config:
    """Return a configuration in which all terms weigh enough that an error in any of them shows."""
    # The gradient is clipped, and eps is far above it, so that an update is proportional to it.
    optimizer = {"lr": 1e5, "head_lr": 3e5, "eps": 10.0, "clip_grad": 0.1}
    algorithm = {"kl_weight": 0.05, **sections.get("algorithm", {})}
    contrastive = {"cross_domain_weight": 0.5, "in_domain_weight": 0.3, "temperature": 0.2, "top_k": 2}
    contrastive |= sections.get("contrastive", {})
    changed = {"algorithm": algorithm, "contrastive": contrastive, "optimizer": optimizer}
    return tiny_models.config(folder, **{**sections, **changed})


def expected_gradients(model: PreTrainedModel, groups: Sequence[RolloutGroup], config: Config) -> dict[str, Tensor]:
    """Return the gradients of the reference in float64."""
    spec = HeadSpec.of(config.contrastive, hidden_size=tiny_models.HIDDEN, seed=config.run.seed)
    head: dict[str, Tensor] = {}
    if spec is not None:
        module = ContrastiveHead(tiny_models.HIDDEN, spec, dtype=torch.float32, device=torch.device("cpu"))
        head = dict(module.named_parameters())
    old, ref = (tiny_models.other_logprobs(groups, seed=seed) for seed in (1, 2))
    return tiny_models.as_saved(reference.gradients(model, head, groups, old, ref, config))


def score(policy: Policy, config: Config, groups: Sequence[RolloutGroup], share_prompts: bool) -> Scored:
    """Return the rollouts with made-up log-probs of older weights and of a reference; z has to be computed again."""
    ranks = policy.groups
    batch = make_batch(
        groups,
        num_data_ranks=ranks.layout.data,
        data_rank=ranks.data_rank,
        share_prompts=share_prompts and policy.shares_prompts,
    )
    old_R, ref_R = (
        torch.cat([torch.zeros(0), *(logprobs[row] for row in batch.rows_N.tolist())]).to(policy.device)
        for logprobs in (tiny_models.other_logprobs(groups, seed=seed) for seed in (1, 2))
    )
    old = Scores(logp_R=old_R, entropy_R=torch.zeros_like(old_R), z_ND=None, version=policy.version - 1)
    return Scored(groups=groups, batch=batch, old=old, reference_logp_R=ref_R)


def found_gradients(case: Case, ranks: Groups, objective_type: type[Objective]) -> dict[str, Tensor]:
    """Return the gradients on ranks, as a step of the trainer computes them."""
    policy = Policy(case.config, from_folder(Path(case.config.model.path)), ranks)
    objective = objective_type(case.config, policy, ranks)
    scored = score(policy, case.config, case.groups, case.share_prompts)
    policy.backward(scored.batch, objective.loss(objective.prepare(scored, step=1)))
    return export_gradients(policy)


def found_changes(case: Case, ranks: Groups, objective_type: type[Objective]) -> dict[str, Tensor]:
    """Return by how much the first update changes each parameter on ranks."""
    policy = Policy(case.config, from_folder(Path(case.config.model.path)), ranks)
    objective = objective_type(case.config, policy, ranks)
    scored = score(policy, case.config, case.groups, case.share_prompts)
    before = {name: tensor.clone() for name, tensor in _weights(policy).items()}
    loss = objective.loss(objective.prepare(scored, step=1))
    policy.backward(scored.batch, loss)  # Megatron reduces gradients during a backward pass from the second one on
    policy.update(scored.batch, loss)
    return {name: tensor - before[name] for name, tensor in _weights(policy).items()}


def expected_changes(case: Case) -> dict[str, Tensor]:
    """Return the changes that Adam's first update (arXiv 1412.6980) makes with the clipped reference gradient."""
    optimizer = case.config.optimizer
    norm = torch.stack([gradient.norm() for gradient in case.expected.values()]).norm()
    clip = min(1.0, optimizer.clip_grad / (norm.item() + 1e-6))
    changes = {}
    for name, gradient in case.expected.items():
        rate = optimizer.head_lr if HEAD in name else optimizer.lr
        changes[name] = -rate * clip * gradient / ((clip * gradient).abs() + optimizer.eps)
    return changes


def _weights(policy: Policy) -> dict[str, Tensor]:
    """Return all weights under the names of the reference, the head's where this rank has it."""
    head = {
        name[name.index(HEAD) :]: parameter.data
        for chunk in policy.chunks
        for name, parameter in chunk.named_parameters()
        if HEAD in name
    }
    return dict(export(policy.chunks, policy.model_config, policy.groups)) | head


def export_gradients(policy: Policy) -> dict[str, Tensor]:
    """Return the gradients under the names of the reference: they replace the parameters and are exported."""
    for buffer in policy.gradient_buffers:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:  # with the distributed optimizer each rank has its own shard of the sum
            shards = bucket.grad_data.chunk(group.size())
            gathered = [torch.empty_like(shard) for shard in shards]
            dist.all_gather(gathered, shards[group.rank()].contiguous(), group=group)
            bucket.grad_data.copy_(torch.cat(gathered))
    for chunk in policy.chunks:
        for parameter in chunk.parameters():
            parameter.data.copy_(parameter.main_grad)
    return _weights(policy)


def errors_on_this_rank(
    layout: Layout, cases: Sequence[Case], objective_type: type[Objective]
) -> list[dict[str, float]]:
    """Return for each case the relative error of every parameter that this rank has."""
    ranks = parallel.init(layout, seed=0, timeout_seconds=240)
    policy_module.BUCKET_ELEMENTS = _BUCKET_ELEMENTS
    errors = []
    for case in cases:
        found = found_gradients(case, ranks, objective_type)
        errors.append({name: relative_error(found[name], case.expected[name]) for name in found})
        if case.updated:
            changed, expected = found_changes(case, ranks, objective_type), expected_changes(case)
            errors[-1] |= {UPDATE + name: relative_error(changed[name], expected[name]) for name in changed}
    return errors


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest error relative to the largest entry; infinite if it is not a number."""
    error = ((found.double() - expected).abs().max() / expected.abs().max()).item()
    return error if math.isfinite(error) else math.inf


def check(
    layout: Layout, cases: Sequence[Case], objective_type: type[Objective] = Objective
) -> dict[tuple[str, str], float]:
    """Return the worst error of all ranks by (case, parameter)."""
    cases = cases_for(layout, cases)
    reports = run_ranks(layout.world_size, errors_on_this_rank, layout, cases, objective_type, timeout=540)
    worst: dict[tuple[str, str], float] = {}
    for report in reports:
        for case, errors in zip(cases, report, strict=True):
            for name, error in errors.items():
                worst[case.name, name] = max(error, worst.get((case.name, name), 0.0))
    checked = [(case.name, kind + name) for case in cases for kind in case.kinds for name in case.expected]
    assert set(worst) == set(checked)
    return worst


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="default: all of them")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # a thread pool doesn't survive the fork of a rank
    rows: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory() as name:
        folder = Path(name)
        cases: dict[str, list[Case]] = {}
        for layout in options.layouts:
            needed = models_for(LAYOUTS[layout])
            cases |= {model: make_cases(folder / model, model) for model in needed if model not in cases}
            mine = [case for model in needed for case in cases[model]]
            errors = check(LAYOUTS[layout], mine)
            updates = [error for (_, name), error in errors.items() if name.startswith(UPDATE)]
            rows[layout] = {
                "max_rel_err": max(errors.values()),
                "max_rel_err_update": max(updates),
                "params": sum(gradient.numel() for case in mine for gradient in case.expected.values()),
            }
            if not options.json:
                row = rows[layout]
                print(
                    f"{layout:12} {row['max_rel_err']:.1e} over {row['params']:,} gradients, of which updates "
                    f"{row['max_rel_err_update']:.1e}",
                    flush=True,
                )
    worst = max(row["max_rel_err"] for row in rows.values())
    if options.json:
        print(json.dumps({"layouts": rows, "worst": worst}, indent=1))
    else:
        print(f"worst {worst:.1e}, bound {BOUND:.0e}")
    return int(not worst <= BOUND)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
