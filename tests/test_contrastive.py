"""Both contrastive terms and their gradient against closed forms and loops that follow the formula term by term.

Also the road of that gradient to the weights: representations recomputed micro-batch by micro-batch with the surrogate.
Not covered: gathering over ranks and Megatron's scaling of losses (the distributed tests have a real model).
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from megatron_mcpo.algo.contrastive import Contrast, contrastive
from megatron_mcpo.algo.surrogate import surrogate
from megatron_mcpo.sections import ContrastiveConfig
from megatron_mcpo.types import Keys

WEIGHTS = {"share_weight": 0.7, "consolidate_weight": 0.3}
Rollout = tuple[int, int, bool]
"""Domain, prompt, correctness."""


def keys_of(rollouts: list[Rollout]) -> Keys:
    return Keys(
        domain_M=torch.tensor([domain for domain, _, _ in rollouts], dtype=torch.int64),
        prompt_M=torch.tensor([prompt for _, prompt, _ in rollouts], dtype=torch.int64),
        correct_M=torch.tensor([correct for _, _, correct in rollouts], dtype=torch.bool),
    )


def unit_rows(num: int, dim: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(num, dim, generator=random, dtype=torch.float64), dim=1)


def evaluate(z: Tensor, rollouts: list[Rollout], **options: Any) -> Contrast:
    return contrastive(z, keys_of(rollouts), ContrastiveConfig(**{**WEIGHTS, **options}))


def term_by_loops(z: Tensor, positives: list[list[int]], wrong: list[int], temperature: float) -> tuple[Tensor, int]:
    losses = []
    for i, chosen in enumerate(positives):
        if not chosen or not wrong:
            continue
        against = torch.stack([torch.exp(z[i] @ z[n] / temperature) for n in wrong]).sum()
        logs = [torch.log(p / (p + against)) for p in (torch.exp(z[i] @ z[j] / temperature) for j in chosen)]
        losses.append(-torch.stack(logs).sum() / len(chosen))
    if not losses:
        return z.sum() * 0, 0
    return torch.stack(losses).sum() / len(losses), len(losses)


def terms_by_loops(
    z: Tensor, rollouts: list[Rollout], temperature: float, top_k: int
) -> tuple[tuple[Tensor, int], tuple[Tensor, int]]:
    """L_share and L_cons with their numbers of anchors, from the formulas, in plain Python."""
    right = [i for i, (_, _, correct) in enumerate(rollouts) if correct]
    wrong = [i for i, (_, _, correct) in enumerate(rollouts) if not correct]
    domain = [d for d, _, _ in rollouts]
    share: list[list[int]] = [[] for _ in rollouts]
    consolidate: list[list[int]] = [[] for _ in rollouts]
    for i in right:
        for other in sorted(set(domain) - {domain[i]}):
            candidates = [j for j in right if domain[j] == other]
            share[i] += sorted(candidates, key=lambda j: (-(z[i] @ z[j]).item(), j))[:top_k]
        consolidate[i] = [j for j in right if j != i and domain[j] == domain[i]]
    return term_by_loops(z, share, wrong, temperature), term_by_loops(z, consolidate, wrong, temperature)


def test_one_pair_across_domains_has_the_closed_form() -> None:
    # Two correct rollouts at cosine 0.6, one wrong one orthogonal to the first and at 0.8 to the second.
    z = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], dtype=torch.float64)
    result = evaluate(z, [(0, 0, True), (1, 1, True), (0, 0, False)], temperature=0.5)
    first, second = math.log1p(math.exp((0.0 - 0.6) / 0.5)), math.log1p(math.exp((0.8 - 0.6) / 0.5))
    assert result.loss_share == pytest.approx((first + second) / 2, rel=1e-14)
    assert result.loss_consolidate == 0.0
    assert (result.anchors_share, result.anchors_consolidate) == (2, 0)
    assert result.listed_ML[:, 0].tolist() == [1, 0, -1] and result.positives_MK.tolist() == [[0, 1], [1, 0], [0, 0]]
    # d log(1 + e^x) = sigmoid(x) dx with x = (s_in - s_ij) / tau, averaged over two anchors, times the weight.
    a = 0.7 / 2 / 0.5 / (1 + math.exp((0.6 - 0.0) / 0.5))
    b = 0.7 / 2 / 0.5 / (1 + math.exp((0.6 - 0.8) / 0.5))
    expected = torch.stack([a * (z[2] - z[1]) - b * z[1], b * (z[2] - z[0]) - a * z[0], a * z[0] + b * z[1]])
    torch.testing.assert_close(result.grad_z_MD, expected, rtol=1e-13, atol=1e-15)


def test_consolidation_of_one_domain_averages_over_positives_and_anchors() -> None:
    # All similarities are 1 or 0: three equal correct rollouts, two wrong ones orthogonal to them.
    z = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 2, dtype=torch.float64)
    result = evaluate(z, [(0, 0, True)] * 3 + [(0, 1, False), (1, 2, False)], temperature=1.0)
    assert result.loss_consolidate == pytest.approx(math.log1p(2 / math.e), rel=1e-14)
    assert (result.loss_share, result.anchors_share, result.anchors_consolidate) == (0.0, 0, 3)
    assert result.positives_consolidate_M.tolist() == [2, 2, 2, 0, 0]
    assert result.positives_share_M.tolist() == [0] * 5


def test_a_positive_competes_with_negatives_only_not_with_other_positives() -> None:
    z = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    result = evaluate(z, [(0, 0, True), (1, 1, True), (2, 2, True), (0, 3, False)], temperature=1.0)
    one, zero = math.log1p(math.exp(-1)), math.log(2)
    assert result.loss_share == pytest.approx(((one + zero) / 2 + (one + zero) / 2 + zero) / 3, rel=1e-14)


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.booleans()), max_size=12),
    st.sampled_from([0.05, 0.1, 0.5, 2.0]),
    st.integers(1, 5),
    st.integers(0, 10_000),
)
def test_random_pools_against_the_formula(rollouts: list[Rollout], temperature: float, top_k: int, seed: int) -> None:
    z = unit_rows(len(rollouts), 6, seed)
    result = evaluate(z, rollouts, temperature=temperature, top_k=top_k)
    leaf = z.clone().requires_grad_()
    (share, anchors_share), (consolidate, anchors_consolidate) = terms_by_loops(leaf, rollouts, temperature, top_k)
    (expected,) = torch.autograd.grad(0.7 * share + 0.3 * consolidate, leaf)

    assert result.loss_share == pytest.approx(share.item(), rel=1e-12, abs=1e-12)
    assert result.loss_consolidate == pytest.approx(consolidate.item(), rel=1e-12, abs=1e-12)
    assert (result.anchors_share, result.anchors_consolidate) == (anchors_share, anchors_consolidate)
    assert result.grad_z_MD.isfinite().all()
    torch.testing.assert_close(result.grad_z_MD, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "rollouts",
    [
        pytest.param([], id="nothing"),
        pytest.param([(0, 0, True)], id="a single rollout"),
        pytest.param([(0, 0, False), (1, 1, False), (0, 0, False)], id="none correct"),
        pytest.param([(0, 0, True), (1, 1, True), (0, 0, True)], id="no negatives"),
        pytest.param([(0, 0, True), (1, 1, False), (2, 2, False)], id="one correct rollout"),
    ],
)
def test_without_a_valid_anchor_everything_is_exactly_zero(rollouts: list[Rollout]) -> None:
    result = evaluate(unit_rows(len(rollouts), 4).float(), rollouts)
    assert (result.loss_share, result.loss_consolidate) == (0.0, 0.0)
    assert (result.anchors_share, result.anchors_consolidate) == (0, 0)
    assert torch.equal(result.grad_z_MD, torch.zeros(len(rollouts), 4))


def test_one_domain_only_consolidates() -> None:
    result = evaluate(unit_rows(4, 4), [(0, 0, True), (0, 1, True), (0, 0, False), (0, 1, False)])
    assert (result.anchors_share, result.anchors_consolidate) == (0, 2)
    assert result.loss_share == 0.0 < result.loss_consolidate


def test_duplicates_of_one_vector_cost_log_two() -> None:
    rollouts = [(0, 0, True), (1, 1, True), (1, 1, True), (0, 0, False)]
    result = evaluate(torch.tensor([[0.6, 0.8]] * 4, dtype=torch.float64), rollouts)
    assert result.loss_share == pytest.approx(math.log(2))
    assert result.loss_consolidate == pytest.approx(math.log(2))
    assert result.grad_z_MD.isfinite().all()


@pytest.mark.parametrize("temperature", [0.1, 0.01, 1e-3])
def test_opposite_vectors_at_small_temperatures_do_not_overflow_in_fp32(temperature: float) -> None:
    # The positive is as far away as can be and a negative coincides with the anchor. That negative alone counts, so
    # L(0) = (z0 z2 - z0 z1) / tau and L(1) = (z1 z3 - z1 z0) / tau.
    # The first rollout is in both and gets (z2 - 2 z1) / tau.
    z = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    far = evaluate(z, [(0, 0, True), (1, 1, True), (0, 0, False), (1, 1, False)], temperature=temperature)
    assert far.loss_share == pytest.approx(2 / temperature, rel=1e-5)
    torch.testing.assert_close(far.grad_z_MD[0], 0.7 / 2 / temperature * torch.tensor([3.0, 0.0]))
    near = evaluate(z, [(0, 0, True), (0, 1, False), (1, 1, True), (1, 0, False)], temperature=temperature)
    assert near.loss_share == pytest.approx(2 * math.exp(-2 / temperature), rel=1e-4)
    assert near.grad_z_MD.isfinite().all()


def test_weights_scale_the_gradient_and_not_the_reported_losses() -> None:
    rollouts = [(0, 0, True), (0, 1, True), (1, 2, True), (1, 2, False)]
    z, keys = unit_rows(4, 5), keys_of(rollouts)

    def at(share_weight: float, consolidate_weight: float) -> Contrast:
        return contrastive(z, keys, ContrastiveConfig(share_weight=share_weight, consolidate_weight=consolidate_weight))

    share, consolidate, both = at(1.0, 0.0), at(0.0, 1.0), at(2.0, 3.0)
    assert share.loss_share == consolidate.loss_share == both.loss_share > 0
    torch.testing.assert_close(both.grad_z_MD, 2 * share.grad_z_MD + 3 * consolidate.grad_z_MD)


def test_gradient_is_taken_without_the_callers_graph_or_grad_mode() -> None:
    rollouts = [(0, 0, True), (1, 1, True), (1, 1, False)]
    z = unit_rows(3, 4)
    plain = evaluate(z, rollouts).grad_z_MD
    with torch.no_grad():
        assert torch.equal(evaluate(z, rollouts).grad_z_MD, plain)
    leaf = z.clone().requires_grad_()
    assert not evaluate(leaf * 1.0, rollouts).grad_z_MD.requires_grad
    assert leaf.grad is None


@pytest.mark.parametrize("sizes", [[12], [3, 2, 7], [5, 0, 1, 6], [1] * 12])
def test_two_passes_give_the_gradient_of_one_whatever_the_micro_batches(sizes: list[int]) -> None:
    torch.manual_seed(3)
    inputs = torch.randn(12, 7, dtype=torch.float64)
    rollouts = [(i % 3, i // 2, i % 5 != 0 and i % 4 != 1) for i in range(12)]
    head = torch.nn.Sequential(torch.nn.Linear(7, 9), torch.nn.Tanh(), torch.nn.Linear(9, 5)).double()
    parameters = list(head.parameters())

    z = normalize(head(inputs), dim=1)
    (share, _), (consolidate, _) = terms_by_loops(z, rollouts, 0.1, 2)
    one_pass = torch.autograd.grad(0.7 * share + 0.3 * consolidate, parameters)

    with torch.no_grad():
        gathered = torch.cat([normalize(head(piece), dim=1) for piece in inputs.split(sizes)])
    grad_z = evaluate(gathered, rollouts, top_k=2).grad_z_MD
    two_pass = [torch.zeros_like(parameter) for parameter in parameters]
    for piece, grad in zip(inputs.split(sizes), grad_z.split(sizes), strict=True):
        part = torch.autograd.grad(surrogate(normalize(head(piece), dim=1), grad), parameters)
        two_pass = [total + new for total, new in zip(two_pass, part, strict=True)]
    for ours, expected in zip(two_pass, one_pass, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
        assert expected.abs().max() > 1e-3


def test_surrogate_of_no_rollouts_is_a_zero_that_is_connected() -> None:
    weight = torch.tensor(3.0, requires_grad=True)
    value = surrogate(torch.zeros(0, 4) * weight, torch.zeros(0, 4))
    assert value.item() == 0.0
    assert torch.autograd.grad(value, weight)[0].item() == 0.0
