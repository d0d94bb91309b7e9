"""The contrastive terms against others' programs: SupCon and NT-Xent of pytorch-metric-learning, CLIPO's formulas.

Value and gradient, in float64. Not covered: options that no other program has (test_contrastive holds those against a
dense reference of our own).
"""

from itertools import product

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.distances import DotProductSimilarity
from pytorch_metric_learning.losses import NTXentLoss, SupConLoss
from torch import Tensor
from torch.nn.functional import normalize

from megatron_mcpo.algo.contrastive import Contrast, contrastive, reward_penalty
from megatron_mcpo.config.schema import ContrastiveConfig
from megatron_mcpo.types import RolloutLabels

TIGHT = {"rtol": 1e-12, "atol": 1e-12}
PairsOf = list[list[int]]
"""Of every rollout the positions of its positives, or of its negatives."""


def pool(num: int, seed: int, *, right: float = 0.6) -> tuple[Tensor, RolloutLabels]:
    random = torch.Generator().manual_seed(seed)
    z = normalize(torch.randn(num, 6, generator=random, dtype=torch.float64), dim=1)
    domain = torch.randint(0, 3, (num,), generator=random)
    prompt = 10 * domain + torch.randint(0, 2, (num,), generator=random)
    return z, RolloutLabels(domain_M=domain, prompt_M=prompt, correct_M=torch.rand(num, generator=random) < right)


def evaluate(z: Tensor, labels: RolloutLabels, *, tile_elements: int = 40, **options: object) -> Contrast:
    return contrastive(z, labels, ContrastiveConfig.model_validate(options), tile_elements=tile_elements)


def as_indices(positives: PairsOf, negatives: PairsOf) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pairs the way that library wants them: anchors and their positives, anchors and their negatives."""
    flat = []
    for pairs in (positives, negatives):
        flat += [torch.tensor([i for i, chosen in enumerate(pairs) for _ in chosen], dtype=torch.int64)]
        flat += [torch.tensor([j for chosen in pairs for j in chosen], dtype=torch.int64)]
    return flat[0], flat[1], flat[2], flat[3]


def assert_same(value: float, gradient: Tensor, expected: Tensor, z: Tensor) -> None:
    assert expected > 0
    assert value == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, z)[0], **TIGHT)


@settings(deadline=None, max_examples=30)
@given(st.integers(4, 16), st.sampled_from([0.07, 0.1, 0.5]), st.integers(0, 10_000))
def test_consolidation_over_all_others_is_supcon_with_domains_as_labels(num: int, tau: float, seed: int) -> None:
    z, labels = pool(num, seed)
    options = {"temperature": tau, "denominator": "all", "cross_domain_weight": 0.0, "in_domain_weight": 1.0}
    ours = evaluate(z, labels, **options)
    assume(ours.anchors_in_domain)
    # A wrong rollout is nobody's positive: it gets a label of its own, and the loss leaves it out as an anchor.
    labels = torch.where(labels.correct_M, labels.domain_M, 100 + torch.arange(num))
    assume(len(labels.unique()) > 1)  # without any negative pair that library returns 0
    leaf = z.clone().requires_grad_()
    theirs = SupConLoss(temperature=tau, distance=DotProductSimilarity(normalize_embeddings=False))(leaf, labels)
    assert_same(ours.loss_in_domain, ours.grad_z_MD, theirs, leaf)


@settings(deadline=None, max_examples=30)
@given(st.integers(4, 16), st.sampled_from([0.07, 0.1, 0.5]), st.integers(0, 10_000))
def test_sharing_over_all_others_is_supcon_with_pairs_across_domains(num: int, tau: float, seed: int) -> None:
    z, labels = pool(num, seed)
    options = {"temperature": tau, "denominator": "all", "transfer": "all"}
    ours = evaluate(z, labels, cross_domain_weight=1.0, in_domain_weight=0.0, **options)
    assume(ours.anchors_cross_domain)
    domain, right = labels.domain_M.tolist(), labels.correct_M.tolist()
    positives = [[j for j in range(num) if right[i] and right[j] and domain[j] != domain[i]] for i in range(num)]
    negatives = [[j for j in range(num) if j != i and j not in positives[i]] for i in range(num)]
    assume(all(negatives[i] for i in range(num) if positives[i]))  # ours has no anchor without one, theirs has
    leaf = z.clone().requires_grad_()
    loss = SupConLoss(temperature=tau, distance=DotProductSimilarity(normalize_embeddings=False))
    theirs = loss(leaf, indices_tuple=as_indices(positives, negatives))
    assert_same(ours.loss_cross_domain, ours.grad_z_MD, theirs, leaf)


@pytest.mark.parametrize("tau", [0.1, 0.5])
@pytest.mark.parametrize("items", [2, 7])
def test_two_views_of_every_item_are_nt_xent(items: int, tau: float) -> None:
    z, _ = pool(2 * items, seed=items)
    item = torch.arange(items).repeat(2)  # first all first views, then all second ones
    labels = RolloutLabels(
        domain_M=torch.zeros_like(item), prompt_M=item, correct_M=torch.ones_like(item, dtype=torch.bool)
    )
    options = {"temperature": tau, "denominator": "all", "in_domain_scope": "prompt"}
    ours = evaluate(z, labels, cross_domain_weight=0.0, in_domain_weight=1.0, **options)
    leaf = z.clone().requires_grad_()
    theirs = NTXentLoss(temperature=tau, distance=DotProductSimilarity(normalize_embeddings=False))(leaf, item)
    assert_same(ours.loss_in_domain, ours.grad_z_MD, theirs, leaf)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("negatives", ["pool", "domain", "prompt"])
def test_the_default_form_is_nt_xent_of_chosen_pairs(negatives: str, top_k: int) -> None:
    # Three right and two wrong ones a prompt, a prompt a domain: every anchor has as many positives, so that the mean
    # over all pairs, which NT-Xent takes, is the mean over anchors.
    z, _ = pool(15, seed=top_k)
    domain = torch.arange(3).repeat_interleave(5)
    labels = RolloutLabels(
        domain_M=domain, prompt_M=domain, correct_M=torch.tensor([True, True, False, True, False] * 3)
    )
    right = labels.correct_M.nonzero()[:, 0].tolist()
    similarity = (z @ z.T).tolist()
    positives: PairsOf = [[] for _ in range(15)]
    rivals: PairsOf = [[] for _ in range(15)]
    for i in right:
        for other in {0, 1, 2} - {int(domain[i])}:
            abroad = [j for j in right if domain[j] == other]
            positives[i] += sorted(abroad, key=lambda j: -similarity[i][j])[:top_k]
        rivals[i] = [j for j in range(15) if j not in right and (negatives == "pool" or domain[j] == domain[i])]
    ours = evaluate(z, labels, cross_domain_weight=1.0, in_domain_weight=0.0, negatives=negatives, top_k=top_k)
    leaf = z.clone().requires_grad_()
    loss = NTXentLoss(temperature=0.1, distance=DotProductSimilarity(normalize_embeddings=False))
    assert_same(ours.loss_cross_domain, ours.grad_z_MD, loss(leaf, indices_tuple=as_indices(positives, rivals)), leaf)


CLIPO = {"mode": "reward", "in_domain_scope": "prompt", "negatives": "prompt", "cross_domain_weight": 0.0}
TAU, WEIGHT = 0.05, 0.2  # of the authors' program


def clipo_losses(z: Tensor, labels: RolloutLabels, tau: float, denominator: str) -> dict[int, Tensor]:
    """Of every right rollout with right ones, P, and wrong ones, N, of its prompt beside it: the mean over p in P of
    -log(e^s_p / (e^s_p + sum_{n in N} e^s_n)) in the paper and -log(e^s_p / sum_{n in P and N} e^s_n) in the program.
    """
    losses = {}
    for i in labels.correct_M.nonzero()[:, 0].tolist():
        beside = [j for j in range(len(labels)) if j != i and labels.prompt_M[j] == labels.prompt_M[i]]
        right, wrong = ([j for j in beside if bool(labels.correct_M[j]) is kind] for kind in (True, False))
        if right and wrong:
            rivals = {p: [p, *wrong] if denominator == "negatives" else beside for p in right}
            costs = [-(z[i] @ z[p] / tau) + (z[rivals[p]] @ z[i] / tau).exp().sum().log() for p in right]
            losses[i] = torch.stack(costs).mean()
    return losses


@pytest.mark.parametrize("denominator", ["negatives", "all"])
@settings(deadline=None, max_examples=30)
@given(st.integers(4, 16), st.sampled_from([TAU, 0.5]), st.sampled_from([0.02, WEIGHT]), st.integers(0, 10_000))
def test_clipos_reward_and_the_loss_of_its_head(
    denominator: str, num: int, tau: float, weight: float, seed: int
) -> None:
    z, labels = pool(num, seed)
    options = CLIPO | {"temperature": tau, "in_domain_weight": weight, "denominator": denominator}
    ours = evaluate(z, labels, **options)
    leaf = z.clone().requires_grad_()
    losses = clipo_losses(leaf, labels, tau, denominator)
    assert ours.valid_in_domain_M.nonzero()[:, 0].tolist() == list(losses)
    expected = torch.zeros(num, dtype=torch.float64)
    for i, loss in losses.items():
        expected[i] = max(-weight * loss.item(), -0.5)
    torch.testing.assert_close(reward_penalty(ours, ContrastiveConfig.model_validate(options)), expected, **TIGHT)
    assume(losses)
    mean = torch.stack(list(losses.values())).mean()
    assert ours.loss_in_domain == pytest.approx(mean.item(), rel=1e-12)
    torch.testing.assert_close(ours.grad_z_MD, torch.autograd.grad(weight * mean, leaf)[0], **TIGHT)


def three_prompts() -> tuple[Tensor, RolloutLabels]:
    """Three right ones and a wrong one; two right and two wrong ones; all right, which CLIPO leaves out."""
    z, _ = pool(12, seed=3)
    prompt = torch.arange(3).repeat_interleave(4)
    right = [[True, False, True, True], [True, False, False, True], [True] * 4]
    return z, RolloutLabels(domain_M=prompt % 2, prompt_M=prompt, correct_M=torch.tensor(right).flatten())


def test_clipos_program_with_all_positives_is_supcon_in_each_prompt() -> None:
    z, labels = three_prompts()
    ours = evaluate(z, labels, temperature=TAU, in_domain_weight=1.0, denominator="all", **CLIPO)
    right, prompt = labels.correct_M.tolist(), labels.prompt_M.tolist()
    beside = [[j for j in range(12) if right[i] and j != i and prompt[j] == prompt[i] < 2] for i in range(12)]
    positives = [[j for j in others if right[j]] for others in beside]
    negatives = [[j for j in others if not right[j]] for others in beside]
    leaf = z.clone().requires_grad_()
    loss = SupConLoss(temperature=TAU, distance=DotProductSimilarity(normalize_embeddings=False))
    theirs = loss(leaf, indices_tuple=as_indices(positives, negatives))
    assert ours.valid_in_domain_M.nonzero()[:, 0].tolist() == [i for i in range(12) if positives[i]]
    assert_same(ours.loss_in_domain, ours.grad_z_MD, theirs, leaf)


def test_clipos_program_draws_one_positive_and_ours_is_its_expectation() -> None:
    z, labels = three_prompts()
    ours = evaluate(z, labels, temperature=TAU, in_domain_weight=1.0, denominator="all", **CLIPO)
    leaf = z.clone().requires_grad_()
    same = labels.prompt_M[:, None] == labels.prompt_M
    log_share = (leaf @ leaf.T / TAU).masked_fill(~same | torch.eye(12).bool(), -torch.inf).log_softmax(dim=1)
    drawable = {0: (2, 3), 2: (0, 3), 3: (0, 2), 4: (7,), 7: (4,)}
    draws = [dict(zip(drawable, drawn, strict=True)) for drawn in product(*drawable.values())]
    losses = [-torch.stack([log_share[i, j] for i, j in draw.items()]).mean() for draw in draws]
    assert len(draws) == 8 and max(losses) > 1.1 * min(losses), "the draw matters"
    assert_same(ours.loss_in_domain, ours.grad_z_MD, torch.stack(losses).mean(), leaf)
