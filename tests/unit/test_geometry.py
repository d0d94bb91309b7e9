"""Similarity by domain, alignment and uniformity against loops over pairs, on random and on degenerate rollouts.

Not covered: what the figures are called and when they are left out (test_report.py).
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from megatron_mcpo.algo.geometry import alignment, domain_similarity, uniformity
from megatron_mcpo.types import RolloutLabels

Rollout = tuple[int, bool]
"""Domain, correctness."""

rollouts = st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=12)


def labels_of(rollouts: list[Rollout]) -> RolloutLabels:
    return RolloutLabels(
        domain_M=torch.tensor([domain for domain, _ in rollouts], dtype=torch.int64),
        prompt_M=torch.arange(len(rollouts)),
        correct_M=torch.tensor([correct for _, correct in rollouts], dtype=torch.bool),
    )


def unit_rows(num: int, dim: int = 3, seed: int = 0) -> Tensor:
    """fp32, as the head makes them."""
    return normalize(torch.randn(num, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


@settings(deadline=None, max_examples=60)
@given(rollouts, st.integers(0, 10_000))
def test_similarity_by_domain_is_the_mean_over_pairs_of_correct_rollouts(found: list[Rollout], seed: int) -> None:
    z = unit_rows(len(found), seed=seed)
    similarity = domain_similarity(z, labels_of(found), num_domains=5)
    assert similarity.shape == (5, 5) and similarity.dtype == torch.float64
    right = [(i, domain) for i, (domain, correct) in enumerate(found) if correct]
    for a in range(5):
        for b in range(5):
            pairs = [(i, j) for i, d in right if d == a for j, other in right if other == b and j != i]
            expected = mean([(z[i].double() @ z[j].double()).item() for i, j in pairs])
            assert similarity[a, b].item() == pytest.approx(expected, abs=1e-12, nan_ok=True), (a, b)


@settings(deadline=None, max_examples=60)
@given(rollouts, st.integers(0, 10_000))
def test_alignment_is_the_mean_squared_distance_within_domains(found: list[Rollout], seed: int) -> None:
    z = unit_rows(len(found), seed=seed)
    pairs = [
        (i, j)
        for i, (domain, correct) in enumerate(found)
        for j, (other, also) in enumerate(found)
        if i != j and domain == other and correct and also
    ]
    expected = mean([(z[i].double() - z[j].double()).square().sum().item() for i, j in pairs])
    assert alignment(z, labels_of(found)) == pytest.approx(expected, abs=1e-12, nan_ok=True)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 12), st.integers(1, 4), st.integers(0, 10_000))
def test_uniformity_is_the_log_of_the_mean_potential_over_all_pairs(num: int, dim: int, seed: int) -> None:
    z = unit_rows(num, dim, seed).double()
    potentials = [math.exp(-2 * (z[i] - z[j]).square().sum().item()) for i in range(num) for j in range(num) if i != j]
    expected = math.log(mean(potentials)) if potentials else math.nan
    assert uniformity(z.float()) == pytest.approx(expected, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("seed", range(20))
def test_a_lone_correct_rollout_is_no_pair_whatever_the_rounding(seed: int) -> None:
    """The sum of its squares and the product of its sum with itself may differ in the last digit."""
    labels = labels_of([(0, True), (1, True), (1, False)])
    z = unit_rows(3, dim=97, seed=seed)
    assert domain_similarity(z, labels, num_domains=2).isnan().tolist() == [[True, False], [False, True]]
    assert math.isnan(alignment(z, labels))


@pytest.mark.parametrize("seed", range(10))
def test_coinciding_rollouts(seed: int) -> None:
    """Hold the similarity against the row's own square, which fp32 leaves some 1e-7 beside 1 (in fp64 97 * eps)."""
    z = unit_rows(1, dim=97, seed=seed).expand(6, -1)
    labels = labels_of([(0, True)] * 3 + [(1, True)] * 3)
    square = z[0].double().square().sum()
    torch.testing.assert_close(domain_similarity(z, labels, num_domains=2), square.expand(2, 2), rtol=1e-13, atol=0)
    assert 0 <= alignment(z, labels) < 1e-6
    assert uniformity(z) == pytest.approx(0.0, abs=1e-5)


def test_opposite_rollouts() -> None:
    z = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert domain_similarity(z, labels_of([(0, True), (1, True)]), num_domains=2)[0, 1].item() == -1.0
    assert alignment(z, labels_of([(0, True), (0, True)])) == 4.0
    assert uniformity(z) == pytest.approx(-8.0)


def test_spread_rollouts_have_the_values_that_the_docstrings_name() -> None:
    """Chance in many dimensions: distance^2 = 2."""
    z = unit_rows(400, dim=512)
    assert alignment(z, labels_of([(0, True)] * 400)) == pytest.approx(2.0, abs=0.02)
    assert uniformity(z) == pytest.approx(-4.0, abs=0.05)


def test_empty_responses_are_zero_vectors_and_still_finite() -> None:
    z = torch.zeros(3, 4)
    labels = labels_of([(0, True), (0, True), (1, True)])
    assert domain_similarity(z, labels, num_domains=2)[0].tolist() == [0.0, 0.0]
    assert alignment(z, labels) == uniformity(z) == 0.0


@pytest.mark.parametrize(("num", "every"), [(2048, 1), (2049, 2), (5000, 3)])
def test_uniformity_of_many_rollouts_looks_at_every_nth(num: int, every: int) -> None:
    z = unit_rows(num, dim=2)
    others = torch.ones(num, dtype=torch.bool)
    others[::every] = False
    assert uniformity(z) == uniformity(z.masked_fill(others[:, None], 9.0))
    assert uniformity(z) != uniformity(z.index_fill(0, torch.tensor([0]), 9.0))
