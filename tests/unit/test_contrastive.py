"""Both contrastive terms and their gradient: closed forms, and every option against the dense reference with autograd.

Also the road of that gradient to the weights: representations recomputed micro-batch by micro-batch with the surrogate.
Not covered: independent implementations (test_oracles), gathering over ranks (test_global_contrast), Megatron's scaling
of losses (test_gradients).
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.contrastive import cost
from benchmarks.measure import memory
from megatron_mcpo.algo.contrastive import TILE_ELEMENTS, Contrast, contrastive, reward_penalty
from megatron_mcpo.algo.surrogate import surrogate
from megatron_mcpo.config.schema import ContrastiveConfig
from megatron_mcpo.types import RolloutLabels
from tests.support import reference

WEIGHTS = {"cross_domain_weight": 0.7, "in_domain_weight": 0.3}
Rollout = tuple[int, int, bool]
"""Domain, prompt, correctness."""


def labels_of(rollouts: list[Rollout]) -> RolloutLabels:
    return RolloutLabels(
        domain_M=torch.tensor([domain for domain, _, _ in rollouts], dtype=torch.int64),
        prompt_M=torch.tensor([prompt for _, prompt, _ in rollouts], dtype=torch.int64),
        correct_M=torch.tensor([correct for _, _, correct in rollouts], dtype=torch.bool),
    )


def unit_rows(num: int, dim: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(num, dim, generator=random, dtype=torch.float64), dim=1)


def grid_rows(num: int, seed: int) -> Tensor:
    """Many equal similarities, duplicates and zero rows among them, and no product that a computer would round."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (num, 3), generator=random).double() / 2


def evaluate(z: Tensor, rollouts: list[Rollout], *, tile_elements: int = TILE_ELEMENTS, **options: Any) -> Contrast:
    return contrastive(z, labels_of(rollouts), ContrastiveConfig(**{**WEIGHTS, **options}), tile_elements=tile_elements)


def assert_equals_reference(z: Tensor, rollouts: list[Rollout], tile_elements: int, **options: Any) -> None:
    """Values, gradient, anchors and everything that is counted, each from its definition."""
    labels, chosen = labels_of(rollouts), ContrastiveConfig(**{**WEIGHTS, **options})
    result = contrastive(z, labels, chosen, tile_elements=tile_elements)
    leaf = z.clone().requires_grad_()
    cross_domain, valid_cross_domain = reference.cross_domain_term(leaf, labels, chosen)
    in_domain, valid_in_domain = reference.in_domain_term(leaf, labels, chosen)
    (expected,) = torch.autograd.grad(0.7 * cross_domain + 0.3 * in_domain + 0.0 * leaf.sum(), leaf)
    assert result.loss_cross_domain == pytest.approx(cross_domain.item(), rel=1e-12, abs=1e-12)
    assert result.loss_in_domain == pytest.approx(in_domain.item(), rel=1e-12, abs=1e-12)
    torch.testing.assert_close(result.grad_z_MD, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(result.valid_cross_domain_M, valid_cross_domain)
    assert torch.equal(result.valid_in_domain_M, valid_in_domain)

    anchors = [bool(a or b) for a, b in zip(valid_cross_domain, valid_in_domain, strict=True)]
    positives = reference.cross_domain_positives(z, labels, chosen)
    against = reference.negatives(labels, chosen)
    domains = [domain for domain, _, _ in rollouts]
    for i in range(len(rollouts)):
        mine = positives[i].nonzero()[:, 0].tolist() if anchors[i] else []
        assert result.listed_ML[i].tolist() == (mine + [-1] * len(rollouts))[: result.listed_ML.shape[1]]
        assert result.positives_MK[i].tolist() == [
            sum(domains[j] == domain for j in mine) for domain in range(max(domains) + 1)
        ]
        assert result.positives_cross_domain_M[i] == len(mine)
        group = 0 if chosen.in_domain_scope == "domain" else 1
        same = sum(right and other[group] == rollouts[i][group] for *other, right in rollouts) - 1
        assert result.positives_in_domain_M[i] == (same if anchors[i] else 0)
        against_i = against[i].nonzero()[:, 0].tolist() if anchors[i] else []
        assert result.negatives_MK[i].tolist() == [
            sum(domains[j] == domain for j in against_i) for domain in range(max(domains) + 1)
        ]
        assert result.negatives_M[i] == len(against_i)
    assert result.anchors_cross_domain == sum(valid_cross_domain.tolist())
    assert result.anchors_in_domain == sum(valid_in_domain.tolist())


def with_own_prompts(rollouts: list[Rollout]) -> list[Rollout]:
    """Prompts are numbered over all domains."""
    return [(domain, 10 * domain + prompt, correct) for domain, prompt, correct in rollouts]


@settings(deadline=None, max_examples=250)
@given(
    rollouts=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.booleans()), max_size=14),
    transfer=st.sampled_from(["top_k", "threshold", "all"]),
    negatives=st.sampled_from(["pool", "domain", "prompt"]),
    denominator=st.sampled_from(["negatives", "all"]),
    in_domain_scope=st.sampled_from(["domain", "prompt"]),
    in_domain_loss=st.sampled_from(["infonce", "align"]),
    temperature=st.sampled_from([0.05, 0.1, 0.5, 2.0]),
    top_k=st.integers(1, 5),
    threshold=st.sampled_from([-1.0, 0.0, 0.25, 0.5]),
    rows=st.sampled_from([1, 3, 10**6]),
    grid=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_every_option_and_tile_against_the_reference(
    rollouts: list[Rollout], rows: int, grid: bool, seed: int, **options: Any
) -> None:
    z = grid_rows(len(rollouts), seed) if grid else unit_rows(len(rollouts), 6, seed)
    assert_equals_reference(z, with_own_prompts(rollouts), rows * max(1, len(rollouts)), **options)


RIGHT, WRONG = True, False
NAMED: dict[str, list[Rollout]] = {
    "nothing": [],
    "a single rollout": [(0, 0, RIGHT)],
    "one domain": [(0, 0, RIGHT), (0, 1, RIGHT), (0, 0, WRONG), (0, 1, WRONG), (0, 1, RIGHT)],
    "one prompt a domain": [(d, d, (d + i) % 3 > 0) for d in range(3) for i in range(3)],
    "none correct": [(0, 0, WRONG), (1, 1, WRONG), (0, 0, WRONG)],
    "none incorrect": [(d, d, RIGHT) for d in range(3) for _ in range(2)],
    "one correct": [(0, 0, RIGHT), (1, 1, WRONG), (2, 2, WRONG)],
    "wrong ones of other prompts and domains only": [(0, 0, RIGHT), (0, 0, RIGHT), (1, 1, RIGHT), (2, 2, WRONG)],
    "a domain without a correct one": [(0, 0, RIGHT), (0, 0, WRONG), (2, 1, RIGHT), (2, 1, WRONG), (1, 2, WRONG)],
}


@pytest.mark.parametrize("transfer", [("top_k", 0.0), ("threshold", -1.0), ("threshold", 0.99), ("all", 0.0)])
@pytest.mark.parametrize("loss", ["infonce", "align"])
@pytest.mark.parametrize("denominator", ["negatives", "all"])
@pytest.mark.parametrize("negatives", ["pool", "domain", "prompt"])
@pytest.mark.parametrize("name", NAMED)
def test_named_pools_against_the_reference(
    name: str, negatives: str, denominator: str, loss: str, transfer: tuple[str, float]
) -> None:
    rollouts = NAMED[name]
    options: dict[str, Any] = {"negatives": negatives, "denominator": denominator}
    options |= {"in_domain_loss": loss, "transfer": transfer[0], "threshold": transfer[1]}
    kinds = [unit_rows(len(rollouts), 4), torch.zeros(len(rollouts), 4).double()]
    kinds.append(torch.tensor([[0.6, 0.8]] * len(rollouts), dtype=torch.float64).view(-1, 2))
    for z in kinds:
        # No domain has more than top_k right ones: nothing is chosen among equal rows, whose products may round apart.
        for in_domain_scope in ("domain", "prompt"):
            assert_equals_reference(z, rollouts, 2 * len(rollouts), in_domain_scope=in_domain_scope, **options)


@pytest.mark.parametrize("name", ["nothing", "a single rollout", "none correct", "one correct"])
def test_without_a_valid_anchor_everything_is_exactly_zero(name: str) -> None:
    z = unit_rows(len(NAMED[name]), 4).float()
    result = evaluate(z, NAMED[name])
    assert (result.loss_cross_domain, result.loss_in_domain) == (0.0, 0.0)
    assert (result.anchors_cross_domain, result.anchors_in_domain) == (0, 0)
    assert torch.equal(result.grad_z_MD, torch.zeros_like(z))


def test_one_pair_across_domains_has_the_closed_form() -> None:
    # Two correct rollouts at cosine 0.6, one wrong one orthogonal to the first and at 0.8 to the second.
    z = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], dtype=torch.float64)
    result = evaluate(z, [(0, 0, True), (1, 1, True), (0, 0, False)], temperature=0.5)
    first, second = math.log1p(math.exp((0.0 - 0.6) / 0.5)), math.log1p(math.exp((0.8 - 0.6) / 0.5))
    assert result.loss_cross_domain == pytest.approx((first + second) / 2, rel=1e-14)
    assert result.loss_in_domain == 0.0
    assert (result.anchors_cross_domain, result.anchors_in_domain) == (2, 0)
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
    assert result.loss_in_domain == pytest.approx(math.log1p(2 / math.e), rel=1e-14)
    assert (result.loss_cross_domain, result.anchors_cross_domain, result.anchors_in_domain) == (0.0, 0, 3)
    assert result.positives_in_domain_M.tolist() == [2, 2, 2, 0, 0]
    assert result.positives_cross_domain_M.tolist() == [0] * 5


def test_alignment_is_the_mean_distance_and_needs_no_negatives() -> None:
    z = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], dtype=torch.float64)
    result = evaluate(z, [(0, 0, True)] * 3, in_domain_loss="align", temperature=0.3)
    costs = torch.tensor([(0.4 + 1.0) / 2, (0.4 + 0.2) / 2, (1.0 + 0.2) / 2], dtype=torch.float64)
    torch.testing.assert_close(result.loss_in_domain_M, costs)
    assert result.loss_in_domain == pytest.approx(costs.mean().item())
    # Every similarity is in two anchors' means of two: the weight 0.3 by 3 anchors, twice a half.
    torch.testing.assert_close(result.grad_z_MD, -0.3 / 3 * (z.sum(dim=0) - z))


def test_a_positive_competes_with_negatives_only_not_with_other_positives() -> None:
    z = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    result = evaluate(z, [(0, 0, True), (1, 1, True), (2, 2, True), (0, 3, False)], temperature=1.0)
    one, zero = math.log1p(math.exp(-1)), math.log(2)
    assert result.loss_cross_domain == pytest.approx(((one + zero) / 2 + (one + zero) / 2 + zero) / 3, rel=1e-14)


def test_a_positive_outside_of_the_rivals_scope_joins_them_in_its_own_denominator() -> None:
    # All similarities are 0 or 1. The first three are right and equal, of two prompts and two domains; the last is
    # wrong, of the first's prompt. Only the first two have a rival there: the wrong one, and each other.
    z = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]], dtype=torch.float64)
    rollouts = [(0, 0, True), (0, 0, True), (1, 1, True), (0, 0, False)]
    result = evaluate(z, rollouts, temperature=1.0, negatives="prompt", denominator="all")
    within, beside = math.log((math.e + 1) / math.e), math.log((2 * math.e + 1) / math.e)
    assert result.loss_in_domain_M.tolist() == pytest.approx([within, within, 0, 0], rel=1e-14)
    assert result.loss_cross_domain_M.tolist() == pytest.approx([beside, beside, 0, 0], rel=1e-14)
    assert result.negatives_MK.tolist() == [[1, 0], [1, 0], [0, 0], [0, 0]]


@pytest.mark.parametrize("denominator", ["negatives", "all"])
def test_without_a_rival_besides_its_positives_a_rollout_is_no_anchor(denominator: str) -> None:
    # The prompt of the first domain is all right; in the second domain's, one wrong rollout is enough.
    rollouts = [(0, 0, True)] * 3 + [(1, 1, True)] * 2 + [(1, 1, False)]
    options = {
        "negatives": "prompt",
        "in_domain_scope": "prompt",
        "denominator": denominator,
        "cross_domain_weight": 0.0,
    }
    result = evaluate(unit_rows(6, 4), rollouts, **options)
    assert result.valid_in_domain_M.tolist() == [False] * 3 + [True] * 2 + [False]
    assert not result.loss_in_domain_M[:3].any() and not result.grad_z_MD[:3].any()


def test_positives_are_counted_by_their_own_domain_and_listed_by_their_anchor() -> None:
    # One anchor in domain 0, two in 1, three in 2: every row and column has a sum of its own.
    rollouts = [(0, 0, True), (1, 1, True), (1, 1, True), (2, 2, True), (2, 2, True), (2, 2, True), (0, 0, False)]
    result = evaluate(unit_rows(7, 5), rollouts, transfer="all")
    assert result.positives_MK.tolist() == [[0, 2, 3], [1, 0, 3], [1, 0, 3], *[[1, 2, 0]] * 3, [0, 0, 0]]
    assert result.positives_cross_domain_M.tolist() == [5, 4, 4, 3, 3, 3, 0]
    assert result.listed_ML[:, :5].tolist() == [
        [1, 2, 3, 4, 5], *[[0, 3, 4, 5, -1]] * 2, *[[0, 1, 2, -1, -1]] * 3, [-1] * 5,
    ]  # fmt: skip


def test_the_first_64_positives_are_listed_and_all_are_counted() -> None:
    rollouts = [(0, 0, True)] * 3 + [(1, 1, i != 7) for i in range(80)]
    result = evaluate(unit_rows(83, 5), rollouts, transfer="all", tile_elements=2 * 83)
    assert result.listed_ML.shape == (83, 64)
    for anchor in range(3):
        assert result.listed_ML[anchor].tolist() == [*range(3, 10), *range(11, 68)]
    assert result.positives_MK[0].tolist() == [0, 79] and result.listed_ML[3].tolist() == [0, 1, 2] + [-1] * 61


def test_duplicates_of_one_vector_cost_log_two() -> None:
    rollouts = [(0, 0, True), (1, 1, True), (1, 1, True), (0, 0, False)]
    result = evaluate(torch.tensor([[0.6, 0.8]] * 4, dtype=torch.float64), rollouts)
    assert result.loss_cross_domain == pytest.approx(math.log(2))
    assert result.loss_in_domain == pytest.approx(math.log(2))
    assert result.grad_z_MD.isfinite().all()


@pytest.mark.parametrize("temperature", [0.1, 0.01, 1e-3])
def test_opposite_vectors_at_small_temperatures_do_not_overflow_in_fp32(temperature: float) -> None:
    # The positive is as far away as can be and a negative coincides with the anchor. That negative alone counts, so
    # L(0) = (z0 z2 - z0 z1) / tau and L(1) = (z1 z3 - z1 z0) / tau.
    # The first rollout is in both and gets (z2 - 2 z1) / tau.
    z = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    far = evaluate(z, [(0, 0, True), (1, 1, True), (0, 0, False), (1, 1, False)], temperature=temperature)
    assert far.loss_cross_domain == pytest.approx(2 / temperature, rel=1e-5)
    torch.testing.assert_close(far.grad_z_MD[0], 0.7 / 2 / temperature * torch.tensor([3.0, 0.0]))
    near = evaluate(z, [(0, 0, True), (0, 1, False), (1, 1, True), (1, 0, False)], temperature=temperature)
    assert near.loss_cross_domain == pytest.approx(2 * math.exp(-2 / temperature), rel=1e-4)
    assert near.grad_z_MD.isfinite().all()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.booleans()), min_size=1, max_size=12),
    st.sampled_from([1e-30, 1e-6, 1e-3, 1e3, 1e30]),
    st.sampled_from(["pool", "domain", "prompt"]),
    st.sampled_from(["negatives", "all"]),
    st.sampled_from(["infonce", "align"]),
    st.integers(0, 10_000),
)
@example([(0, 0, True), (0, 0, True), (1, 1, True)], 1e-30, "pool", "negatives", "align", 0)
@example([(0, 0, True), (0, 1, True), (1, 1, True)], 1e-30, "prompt", "all", "align", 0)
def test_extreme_temperatures_stay_finite_in_fp32(
    rollouts: list[Rollout], temperature: float, negatives: str, denominator: str, loss: str, seed: int
) -> None:
    z = torch.cat([unit_rows(len(rollouts), 4, seed), grid_rows(len(rollouts), seed).new_zeros(1, 4)]).float()
    z = z[torch.randint(0, len(z), (len(rollouts),), generator=torch.Generator().manual_seed(seed))]
    options: dict[str, Any] = {"negatives": negatives, "denominator": denominator}
    options |= {"in_domain_loss": loss, "temperature": temperature}
    result = evaluate(z, with_own_prompts(rollouts), **options)
    assert result.grad_z_MD.isfinite().all()
    assert result.loss_cross_domain_M.isfinite().all() and result.loss_in_domain_M.isfinite().all()
    assert reward_penalty(result, ContrastiveConfig(**WEIGHTS, **options)).isfinite().all()


def test_memory_is_that_of_a_tile_not_of_all_pairs() -> None:
    rollouts = [(i % 3, i // 8, i % 2 > 0) for i in range(4096)]
    z = unit_rows(4096, 8).float()
    evaluate(z[:64], rollouts[:64])
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of what follows
    evaluate(z, rollouts, tile_elements=2**20)
    assert memory("VmHWM") - before < 4096 * 4096 * 4 / 2, "half of one matrix of all pairs"


def test_what_is_measured_of_the_terms_has_its_names() -> None:
    for impl in ("naive", "tiled"):
        row = cost(impl, 128, "top_k")
        assert {"n", "d", "impl", "seconds", "peak_extra_bytes", "ratio_to_floor"} <= row.keys()
        assert row["seconds"] > 0 and row["ratio_to_floor"] > 0


def test_weights_scale_the_gradient_and_not_the_reported_losses() -> None:
    rollouts = [(0, 0, True), (0, 1, True), (1, 2, True), (1, 2, False)]
    z, labels = unit_rows(4, 5), labels_of(rollouts)

    def at(cross_domain_weight: float, in_domain_weight: float) -> Contrast:
        return contrastive(
            z, labels, ContrastiveConfig(cross_domain_weight=cross_domain_weight, in_domain_weight=in_domain_weight)
        )

    cross_domain, in_domain, both = at(1.0, 0.0), at(0.0, 1.0), at(2.0, 3.0)
    assert cross_domain.loss_cross_domain == in_domain.loss_cross_domain == both.loss_cross_domain > 0
    torch.testing.assert_close(both.grad_z_MD, 2 * cross_domain.grad_z_MD + 3 * in_domain.grad_z_MD)


def test_a_terms_value_is_the_mean_of_its_anchors() -> None:
    rollouts = [(0, 0, True), (0, 1, True), (1, 2, True), (1, 2, False), (1, 3, False)]
    result = evaluate(unit_rows(5, 5), rollouts)
    assert result.loss_cross_domain == pytest.approx(result.loss_cross_domain_M[:3].mean().item())
    assert result.loss_in_domain == pytest.approx(result.loss_in_domain_M[:2].mean().item())
    assert result.loss_cross_domain_M[3:].tolist() == [0, 0] and result.loss_in_domain_M[2:].tolist() == [0, 0, 0]


def test_the_penalty_of_a_reward_is_the_weighted_terms_and_at_most_a_half() -> None:
    rollouts = [(0, 0, True), (0, 1, True), (1, 2, True), (1, 2, False)]
    z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    chosen = ContrastiveConfig(cross_domain_weight=0.2, in_domain_weight=0.4, temperature=1.0)
    penalty = reward_penalty(contrastive(z, labels_of(rollouts), chosen), chosen)
    cross_domain, in_domain = math.log1p(math.exp(2)), math.log(2)
    assert 0.2 * cross_domain + 0.4 * in_domain > 0.5
    assert penalty.tolist() == pytest.approx([-0.5, -0.5, -0.2 * math.log(2), 0.0])


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
    loss = reference.contrastive_loss(
        normalize(head(inputs), dim=1), labels_of(rollouts), ContrastiveConfig(**WEIGHTS, top_k=2)
    )
    one_pass = torch.autograd.grad(loss, parameters)

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
