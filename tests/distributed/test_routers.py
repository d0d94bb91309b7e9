"""Choices of experts: replayed by a second pass, from an engine, and counted, through every way to divide a model.

That gradients are those of the choices which the engine made is in benchmarks/gradient_table.py (tests/distributed/
test_gradients.py). Not covered: Transformer Engine's grouped products, which need a GPU.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_mcpo.config.config import Config
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model_rules import problems
from megatron_mcpo.data.batch import make_batch
from megatron_mcpo.distributed import parallel
from megatron_mcpo.mcore.policy import LossInput, Policy
from megatron_mcpo.types import RolloutGroup, TrainBatch
from tests.support import tiny_models
from tests.support.ranks import run_ranks

LAYOUTS = [
    Layout(),
    Layout(pipeline=2, virtual_pipeline=2),
    Layout(pipeline=3, layers_per_stage=(1, 2, 1)),
    Layout(tensor=2, data=2, expert=2, sequence=True),
    Layout(context=2, pipeline=2, expert=2),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experts")
    tiny_models.save_model(path, "experts")
    return path


def settings(folder: Path, **model: Any) -> Config:
    return tiny_models.config(folder, model=model, contrastive={"cross_domain_weight": 0.0, "in_domain_weight": 0.0})


def groups(*, with_experts: bool) -> list[RolloutGroup]:
    plain = tiny_models.rollout_groups(num_prompts=6, num_samples=3)
    return tiny_models.with_experts(plain, num_layers=4) if with_experts else plain


def share(policy: Policy, rollouts: list[RolloutGroup]) -> TrainBatch:
    return make_batch(
        rollouts,
        num_data_ranks=policy.groups.layout.data,
        data_rank=policy.groups.data_rank,
        share_prompts=policy.shares_prompts,
    )


def total(given: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
    return given.logp_r.square().sum() / 100, {}


def disturb_routers(policy: Policy) -> None:
    """Change the routers as an update might, but so much that they would choose other experts."""
    for chunk in policy.chunks:
        for name, parameter in chunk.named_parameters():
            if "router" in name:
                parameter.data.copy_(parameter.data.roll(1, dims=0))


def second_passes(layout: Layout, folder: Path) -> dict[str, bool]:
    """Find what holds of passes after the routers have changed."""
    ranks = parallel.init(layout, seed=0, timeout_seconds=240)
    policy = Policy(settings(folder, router_replay="trainer", recompute="full"), from_folder(folder), ranks)
    batch = share(policy, groups(with_experts=False))
    first = policy.score(batch)
    disturb_routers(policy)
    own, again = policy.score(batch), policy.score(batch, routes=first.routes)
    gradients = [policy.trunk_gradient(batch, total, routes=routes) for routes in (first.routes, None, again.routes)]
    assert first.routes is not None and own.routes is not None and again.routes is not None
    pairs = zip(sum(first.routes, ()), sum(again.routes, ()), strict=True)
    return {
        "the same experts": all(torch.equal(one, other) for one, other in pairs),
        "other experts without": any(
            not torch.equal(one, other) for one, other in zip(sum(first.routes, ()), sum(own.routes, ()), strict=True)
        ),
        "other log-probs without": not torch.allclose(own.logp_R, again.logp_R, atol=1e-3),
        "gradients repeat": torch.equal(gradients[0], gradients[2]),
        "another gradient without": not torch.allclose(gradients[0], gradients[1], atol=1e-3),
        "the update's own pass": torch.allclose(
            policy.update(batch, total, routes=first.routes).scores.logp_R, again.logp_R, atol=1e-5
        ),
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_second_pass_gives_every_token_the_experts_of_the_first(folder: Path, layout: Layout) -> None:
    for found in run_ranks(layout.world_size, second_passes, layout, folder, timeout=300):
        assert all(found.values()), found


def logprobs(layout: Layout, folder: Path, with_experts: bool) -> dict[int, list[float]]:
    """Log-probs of the rank's rollouts by row of the batch, with an engine's experts or the routers' own."""
    ranks = parallel.init(layout, seed=0, timeout_seconds=240)
    policy = Policy(settings(folder, router_replay="engine"), from_folder(folder), ranks)
    batch = share(policy, groups(with_experts=with_experts))
    of_rollouts = policy.score(batch).logp_R.split(batch.response_lens_N.tolist())
    return {row: logp_r.tolist() for row, logp_r in zip(batch.rows_N.tolist(), of_rollouts, strict=True)}


def test_an_engines_experts_are_used_wherever_it_says_them(folder: Path) -> None:
    [alone] = run_ranks(1, logprobs, Layout(), folder, True)
    [own] = run_ranks(1, logprobs, Layout(), folder, False)
    assert all(alone[row] != pytest.approx(own[row], abs=1e-3) for row in alone)
    for layout in LAYOUTS[1:]:
        found: dict[int, list[float]] = {}
        for of_rank in run_ranks(layout.world_size, logprobs, layout, folder, True, timeout=300):
            found |= of_rank
        assert found.keys() == alone.keys()
        for row, logp_r in found.items():
            assert logp_r == pytest.approx(alone[row], abs=1e-4), (layout, row)


def loads(layout: Layout, folder: Path) -> tuple[list[list[float]], int]:
    """Count the tokens that every expert was given in an update, and all tokens."""
    ranks = parallel.init(layout, seed=0, timeout_seconds=240)
    policy = Policy(settings(folder, router_replay="engine", recompute="full"), from_folder(folder), ranks)
    batch = make_batch(
        groups(with_experts=True), num_data_ranks=layout.data, data_rank=ranks.data_rank, share_prompts=False
    )
    load_XE = policy.update(batch, total).load_XE
    assert load_XE is not None
    return load_XE.tolist(), batch.num_tokens


def test_the_load_of_experts_counts_every_token_once_and_no_padding(folder: Path) -> None:
    rollouts = groups(with_experts=True)
    [(alone, num_tokens)] = run_ranks(1, loads, Layout(), folder)
    for layer in range(4):
        said = torch.cat(
            [c.experts[:, layer].flatten() for g in rollouts for c in g.completions if c.experts is not None]
        )
        rest = torch.tensor(alone[layer]) - said.bincount(minlength=tiny_models.EXPERTS)
        assert (rest >= 0).all() and rest.sum() == 2 * sum(len(g.completions) for g in rollouts), "of the last tokens"
        assert sum(alone[layer]) == 2 * num_tokens
    for layout in LAYOUTS[-2:]:  # tokens divided in every way
        for found, _ in run_ranks(layout.world_size, loads, layout, folder, timeout=300):
            assert found == alone, layout


def test_only_models_with_experts_replay(folder: Path, tmp_path: Path) -> None:
    tiny_models.save_model(tmp_path, "tied")
    config = settings(folder, router_replay="engine")
    assert not problems(config, from_folder(folder), on_cpu=False)
    [problem] = problems(config, from_folder(tmp_path), on_cpu=False)
    assert problem == "model.router_replay = 'engine': must be 'off' (the model has no experts). Set it to that."


def test_completions_without_experts_are_not_half_replayed(folder: Path) -> None:
    some = groups(with_experts=True)
    some[2] = replace(some[2], completions=tuple(replace(c, experts=None) for c in some[2].completions))
    assert make_batch(some, num_data_ranks=1, data_rank=0, share_prompts=False).experts_TXK is None
