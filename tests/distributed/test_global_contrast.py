"""The contrastive gradient over real ranks against one process: gather, terms, surrogate, sum of the ranks' gradients.

A small head in float64 stands for the model. Not covered: the real model and Megatron's scaling (test_gradients).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus

from megatron_mcpo.algo.contrastive import contrastive
from megatron_mcpo.algo.surrogate import surrogate
from megatron_mcpo.config.config import Config
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.schema import ContrastiveConfig
from megatron_mcpo.data.batch import make_batch
from megatron_mcpo.distributed import parallel
from megatron_mcpo.distributed.gather import gather_rows
from megatron_mcpo.distributed.parallel import Groups
from megatron_mcpo.mcore.model import unwrap
from megatron_mcpo.mcore.policy import Policy
from megatron_mcpo.trainer.objective import Objective, Scored
from megatron_mcpo.types import RolloutLabels, TrainBatch
from tests.support import reference, tiny_models
from tests.support.ranks import run_ranks

HIDDEN = 5
SECONDS = 180
"""After which ranks count as hung."""
RIGHT, WRONG = True, False


@dataclass(frozen=True)
class Case:
    """Rollouts (domain, prompt, correctness), what the head reads of each, which rank holds it, how they are paired."""

    name: str
    rollouts: Sequence[tuple[int, int, bool]]
    owners: Sequence[int]
    features_MH: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def labels(self) -> RolloutLabels:
        domain, prompt, correct = zip(*self.rollouts, strict=True)
        return RolloutLabels(
            domain_M=torch.tensor(domain), prompt_M=torch.tensor(prompt), correct_M=torch.tensor(correct).bool()
        )

    @property
    def settings(self) -> ContrastiveConfig:
        return ContrastiveConfig(**{"cross_domain_weight": 0.7, "in_domain_weight": 0.3, "top_k": 2, **self.options})

    def share(self, rank: int, num_ranks: int) -> TrainBatch:
        """Return the part of a batch that gathering reads: which rows belong to which rank."""
        rank_rows = tuple(
            tuple(row for row, owner in enumerate(self.owners) if owner == other) for other in range(num_ranks)
        )
        lens_M = (1,) * len(self.rollouts)
        mine = torch.ones(len(rank_rows[rank]), dtype=torch.int64)
        return TrainBatch(
            tokens_T=torch.zeros(2 * len(mine), dtype=torch.int64),
            prompt_lens_N=mine,
            response_lens_N=mine,
            rows_N=torch.tensor(rank_rows[rank], dtype=torch.int64),
            engine_logp_R=torch.zeros(len(mine)),
            labels=self.labels,
            num_response_tokens=len(lens_M),
            prompt_lens_M=lens_M,
            response_lens_M=lens_M,
            rank_rows=rank_rows,
            shared_prompts=False,
        )


class Head(nn.Module):
    """Like the real one a zero stays zero: an empty response has no direction."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(1)
        self.inner = nn.Parameter(torch.randn(7, HIDDEN, generator=random, dtype=torch.float64))
        self.outer = nn.Parameter(torch.randn(4, 7, generator=random, dtype=torch.float64))

    def forward(self, features_NH: Tensor) -> Tensor:
        return normalize(torch.tanh(features_NH @ self.inner.T) @ self.outer.T, dim=1)


def features(num: int, seed: int, *, empty: Sequence[int] = (), copied: Sequence[int] = ()) -> Tensor:
    """Of these responses some are empty, others repeat the first one."""
    features_MH = torch.randn(num, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    features_MH[list(copied)] = features_MH[0].clone()
    features_MH[list(empty)] = 0.0
    return features_MH


def in_one_process(case: Case) -> list[Tensor]:
    """Gradient of the weighted terms with respect to the head's weights, by autograd through the dense reference."""
    head = Head()
    reference.contrastive_loss(head(case.features_MH), case.labels, case.settings).backward()
    return [parameter.grad for parameter in head.parameters() if parameter.grad is not None]


def summed(head: Head, groups: Groups) -> list[Tensor]:
    gradients = []
    for parameter in head.parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(gradient, group=groups.data)
        gradients.append(gradient)
    return gradients


def two_passes(case: Case, groups: Groups) -> tuple[Tensor, list[Tensor]]:
    """(everything a rank knows of all rollouts, the sum of the ranks' gradients)."""
    head, batch = Head(), case.share(groups.data_rank, groups.world_size)
    micro_batches = batch.rows_N.split(groups.data_rank + 1)  # of another size, and another number, on every rank
    with torch.no_grad():
        z_ND = torch.cat([head(case.features_MH[rows]) for rows in micro_batches])
    z_MD = gather_rows(z_ND, batch, groups)
    contrast = contrastive(z_MD, batch.labels, case.settings)
    for rows in micro_batches:
        surrogate(head(case.features_MH[rows]), contrast.grad_z_MD[rows]).backward()
    losses = torch.tensor([contrast.loss_cross_domain, contrast.loss_in_domain], dtype=torch.float64)
    return torch.cat([losses, z_MD.flatten(), contrast.grad_z_MD.flatten()]), summed(head, groups)


def on_ranks(cases: Sequence[Case], num_ranks: int, way: Any) -> list[list[tuple[Tensor, list[Tensor]]]]:
    """Return what `way` finds, by rank and case."""

    def rank_main() -> list[tuple[Tensor, list[Tensor]]]:
        groups = parallel.init(Layout(data=num_ranks), seed=0, timeout_seconds=SECONDS)
        return [way(case, groups) for case in cases]

    return run_ranks(num_ranks, rank_main, timeout=SECONDS)


def assert_exact(cases: Sequence[Case], num_ranks: int) -> None:
    """Finite, the same on every rank, and equal to one process."""
    for case, *found in zip(cases, *on_ranks(cases, num_ranks, two_passes), strict=True):
        expected = in_one_process(case)
        for known, gradients in found:
            assert known.isfinite().all(), case
            assert torch.equal(known, found[0][0]), case
            for gradient, other, exact in zip(gradients, found[0][1], expected, strict=True):
                assert torch.equal(gradient, other), case
                torch.testing.assert_close(gradient, exact, rtol=1e-12, atol=1e-12, msg=lambda m, c=case: f"{c}\n{m}")


MIXED = [(d, 2 * d + p, (d + p + i) % 3 > 0) for d in range(3) for p in range(2) for i in range(3)]


def named_cases(num_ranks: int) -> list[Case]:
    num = len(MIXED)
    dealt = [row % num_ranks for row in range(num)]
    uneven = [0] * 9 + [row % num_ranks for row in range(num - 9)]
    one_has_none = [row % (num_ranks - 1) for row in range(num)]
    wrong_apart = [0 if right else 1 + row % (num_ranks - 1) for row, (_, _, right) in enumerate(MIXED)]
    one_domain = [(0, prompt, right) for _, prompt, right in MIXED]
    one_prompt = [(domain, domain, right) for domain, _, right in MIXED]
    plain = features(num, 0)
    return [
        Case("mixed", MIXED, dealt, plain),
        Case("ranks of different sizes", MIXED, uneven, plain),
        Case("a rank without rollouts", MIXED, one_has_none, plain),
        Case("ranks without a correct rollout", MIXED, wrong_apart, plain),
        Case("all on the last rank", MIXED, [num_ranks - 1] * num, plain),
        Case("no correct rollout", [(d, p, WRONG) for d, p, _ in MIXED], dealt, plain),
        Case("no incorrect rollout", [(d, p, RIGHT) for d, p, _ in MIXED], dealt, plain),
        Case("no incorrect rollout, all", [(d, p, RIGHT) for d, p, _ in MIXED], dealt, plain, {"denominator": "all"}),
        Case("one domain", one_domain, dealt, plain),
        Case("one prompt a domain", one_prompt, dealt, plain, {"in_domain_scope": "prompt", "negatives": "prompt"}),
        Case("all of the domain", MIXED, dealt, plain, {"denominator": "all", "negatives": "domain"}),
        Case("all of the prompt", MIXED, dealt, plain, {"denominator": "all", "negatives": "prompt"}),
        Case("duplicates", MIXED, dealt, features(num, 0, copied=range(1, 12))),
        Case("nothing but duplicates", MIXED, dealt, features(num, 0, copied=range(num))),
        Case("empty responses", MIXED, dealt, features(num, 0, empty=(0, 1, 5, 6, 17))),
        Case("nothing but empty responses", MIXED, dealt, features(num, 0, empty=range(num))),
        Case("a single rollout", [(1, 0, RIGHT)], [num_ranks - 1], features(1, 0)),
    ]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_named_cases_are_exact(num_ranks: int) -> None:
    assert_exact(named_cases(num_ranks), num_ranks)


@st.composite
def a_case(draw: st.DrawFn, num_ranks: int) -> Case:
    rollouts = draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), st.booleans()), min_size=1, max_size=14))
    num = len(rollouts)
    owners = draw(st.lists(st.integers(0, num_ranks - 1), min_size=num, max_size=num))
    some = st.lists(st.integers(0, num - 1), max_size=4)
    options = {
        "transfer": draw(st.sampled_from(["top_k", "threshold", "all"])),
        "top_k": draw(st.integers(1, 3)),
        "threshold": draw(st.sampled_from([-1.0, 0.1])),
        "negatives": draw(st.sampled_from(["pool", "domain", "prompt"])),
        "in_domain_scope": draw(st.sampled_from(["domain", "prompt"])),
        "in_domain_loss": draw(st.sampled_from(["infonce", "align"])),
        "denominator": draw(st.sampled_from(["negatives", "negatives", "all"])),
        "temperature": draw(st.sampled_from([0.05, 0.1, 1.0])),
    }
    return Case(
        "drawn",
        [(domain, 10 * domain + prompt, correct) for domain, prompt, correct in rollouts],
        owners,
        features(num, draw(st.integers(0, 1000)), empty=draw(some), copied=draw(some)),
        options,
    )


# Forking ranks costs far more than a case: each example is many cases, and none is made smaller when one fails.
@pytest.mark.parametrize("num_ranks", [2, 4])
@settings(deadline=None, max_examples=3, phases=[Phase.generate])
@given(data=st.data())
def test_drawn_cases_are_exact(num_ranks: int, data: st.DataObject) -> None:
    assert_exact([data.draw(a_case(num_ranks)) for _ in range(40)], num_ranks)


def averaged_over_ranks(case: Case, groups: Groups) -> tuple[Tensor, list[Tensor]]:
    """Wrong: every rank differentiates the whole loss by its own slice, and gradients are averaged."""
    head, batch = Head(), case.share(groups.data_rank, groups.world_size)
    z_ND = head(case.features_MH[batch.rows_N])
    z_MD = gather_rows(z_ND, batch, groups).index_copy(0, batch.rows_N, z_ND)
    loss = reference.contrastive_loss(z_MD, batch.labels, case.settings)
    loss.backward()
    return loss.detach(), [gradient / groups.world_size for gradient in summed(head, groups)]


def with_local_anchors(case: Case, groups: Groups) -> tuple[Tensor, list[Tensor]]:
    """Wrong: every rank has the costs of its own anchors, over representations that came without a gradient."""
    head, batch, labels = Head(), case.share(groups.data_rank, groups.world_size), case.labels
    z_ND = head(case.features_MH[batch.rows_N])
    z_MD = gather_rows(z_ND, batch, groups).index_copy(0, batch.rows_N, z_ND)
    positives = reference.cross_domain_positives(z_MD, labels, case.settings)
    logits = z_MD @ z_MD.T / case.settings.temperature
    rivals = logits.masked_fill(~reference.negatives(labels, case.settings), -torch.inf).logsumexp(1, keepdim=True)
    costs = (softplus(rivals - logits) * positives).sum(1) / positives.sum(1).clamp(min=1)
    loss = case.settings.cross_domain_weight * costs[batch.rows_N].sum() / positives.any(1).sum()
    loss.backward()
    value = loss.detach().clone()
    dist.all_reduce(value, group=groups.data)
    return value, summed(head, groups)


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("wrong_way", [averaged_over_ranks, with_local_anchors])
def test_popular_conventions_give_the_right_value_and_a_wrong_gradient(wrong_way: Any, num_ranks: int) -> None:
    case = replace(named_cases(num_ranks)[0], options={"in_domain_weight": 0.0, "temperature": 0.5})
    value = reference.contrastive_loss(Head()(case.features_MH), case.labels, case.settings).item()
    expected = torch.cat([gradient.flatten() for gradient in in_one_process(case)])
    assert_exact([case], num_ranks)
    for ((loss, gradients),) in on_ranks([case], num_ranks, wrong_way):
        assert loss.item() == pytest.approx(value, rel=1e-8)
        found = torch.cat([gradient.flatten() for gradient in gradients])
        assert (found - expected).abs().max() > 0.05 * expected.abs().max()
        if wrong_way is averaged_over_ranks:
            torch.testing.assert_close(num_ranks * found, expected, rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_models.save_model(path, "tied", num_layers=2)
    return path


def tiny_config(folder: Path) -> Config:
    limits = {"max_prompt_tokens": 32, "max_response_tokens": 16}
    return tiny_models.config(folder, batch={"micro_batch_tokens": 64}, rollout=limits)


def score(policy: Policy) -> Scored:
    groups, layout = tiny_models.rollout_groups(num_prompts=6, num_samples=3), policy.groups.layout
    batch = make_batch(
        groups,
        num_data_ranks=layout.data,
        data_rank=policy.groups.data_rank,
        share_prompts=policy.shares_prompts,
    )
    return Scored(groups=groups, batch=batch, old=policy.score(batch), reference_logp_R=None)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_representation_that_is_not_finite_stops_every_rank_with_the_same_error(folder: Path, poison: float) -> None:
    def rank_main(config: Config) -> tuple[str, str, bool]:
        ranks = parallel.init(Layout(data=2), seed=0, timeout_seconds=SECONDS)
        policy = Policy(config, from_folder(folder), ranks)
        scored, objective = score(policy), Objective(config, policy, ranks)
        healthy = objective.contrast(scored, step=6)
        assert healthy is not None and scored.old.z_ND is not None
        if ranks.data_rank == 1:
            z_ND = scored.old.z_ND.clone()
            z_ND[2, 3] = poison
            scored = replace(scored, old=replace(scored.old, z_ND=z_ND))
        with pytest.raises(FloatingPointError) as caught:
            objective.contrast(scored, step=7)
        domain = config.domain_names[int(scored.batch.labels.domain_M[scored.batch.rank_rows[1][2]])]
        return str(caught.value), domain, bool(healthy.contrast.grad_z_MD.any())

    (first, domain, learned), second = run_ranks(2, rank_main, tiny_config(folder), timeout=3 * SECONDS)
    assert (first, domain, learned) == second
    assert learned and "step 7: " in first and "1 of 18 rollouts" in first
    assert f"data-parallel ranks [1], domains {domain})" in first


@pytest.mark.parametrize("stage", [0, 1])
def test_a_weight_that_is_not_finite_on_one_rank_of_a_pipeline_stops_all_with_the_same_error(
    folder: Path, stage: int
) -> None:
    layout = Layout(pipeline=2, data=2)

    def rank_main(config: Config) -> tuple[str, list[int]]:
        ranks = parallel.init(layout, seed=0, timeout_seconds=SECONDS)
        policy = Policy(config, from_folder(folder), ranks)
        if ranks.data_rank == 1 and ranks.is_first_stage == (stage == 0):
            unwrap(policy.chunks[0]).decoder.layers[0].mlp.linear_fc1.weight.data[3, 5] = torch.nan
        scored = score(policy)
        with pytest.raises(FloatingPointError) as caught:
            Objective(config, policy, ranks).contrast(scored, step=7)
        return str(caught.value), scored.batch.labels.domain_M[list(scored.batch.rank_rows[1])].tolist()

    config = tiny_config(folder)
    reports = run_ranks(4, rank_main, config, timeout=3 * SECONDS)
    (message, held), *_ = reports
    assert reports == [(message, held)] * 4
    assert f"step 7: representations of {len(held)} of 18 rollouts" in message
    domains = ", ".join(config.domain_names[number] for number in sorted(set(held)))
    assert f"data-parallel ranks [1], domains {domains})" in message
