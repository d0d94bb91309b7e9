"""The ranking across domains, against loops over all pairs; and its chance level."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_mcpo.algo.pairing import used
from megatron_mcpo.algo.ranking import cross_domain_ranking
from megatron_mcpo.config.schema import ContrastiveConfig
from megatron_mcpo.types import RolloutLabels


def labels_of(rollouts: list[tuple[int, int, bool]]) -> RolloutLabels:
    domains, prompts, correct = zip(*rollouts, strict=True) if rollouts else ((), (), ())
    return RolloutLabels(
        domain_M=torch.tensor(domains, dtype=torch.int64),
        prompt_M=torch.tensor(prompts, dtype=torch.int64) + 10 * torch.tensor(domains, dtype=torch.int64),
        correct_M=torch.tensor(correct, dtype=torch.bool),
    )


def share(z: Tensor, i: int, positives: list[int], negatives: list[int]) -> float:
    """Count pairs one by one."""
    wins = [
        1.0 if z[i] @ z[j] > z[i] @ z[n] else 0.5 if z[i] @ z[j] == z[i] @ z[n] else 0.0
        for j, n in product(positives, negatives)
    ]
    return sum(wins) / len(wins) if wins else float("nan")


@settings(deadline=None, max_examples=100)
@given(
    rollouts=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.booleans()), max_size=12),
    seed=st.integers(0, 1000),
    rows=st.sampled_from([1, 10**6]),
)
def test_it_counts_every_pair(rollouts: list[tuple[int, int, bool]], seed: int, rows: int) -> None:
    random = torch.Generator().manual_seed(seed)
    z = torch.randint(-1, 2, (len(rollouts), 3), generator=random).double()  # with many ties
    labels = labels_of(rollouts)
    found = cross_domain_ranking(z, labels, torch.ones_like(labels.correct_M), tile_elements=rows)
    domains, prompts = labels.domain_M.tolist(), labels.prompt_M.tolist()
    right = [i for i, (*_, correct) in enumerate(rollouts) if correct]
    wrong = [i for i, (*_, correct) in enumerate(rollouts) if not correct]
    for i in range(len(rollouts)):
        positives = [j for j in right if domains[j] != domains[i]] if i in right else []
        cases = {
            "auc_M": wrong,
            "auc_other_domains_M": [n for n in wrong if domains[n] != domains[i]],
            "auc_own_prompt_M": [n for n in wrong if prompts[n] == prompts[i]],
        }
        for name, negatives in cases.items():
            expected = share(z, i, positives, negatives)
            assert getattr(found, name)[i].item() == pytest.approx(expected, nan_ok=True), name


def test_random_representations_are_at_the_chance_level() -> None:
    random = torch.Generator().manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(2000, 64, generator=random), dim=1)
    rollouts = [(i % 4, i // 100, bool(torch.rand((), generator=random) < 0.4)) for i in range(2000)]
    labels = labels_of(rollouts)
    found = cross_domain_ranking(z, labels, torch.ones_like(labels.correct_M))
    assert found.auc_M.nanmean().item() == pytest.approx(0.5, abs=0.01)
    assert found.auc_own_prompt_M.nanmean().item() == pytest.approx(0.5, abs=0.02)


def test_with_centred_representations_only_prompts_with_both_outcomes_count() -> None:
    rollouts = [(0, 0, True), (0, 0, False), (1, 0, True), (1, 0, False), (1, 1, True), (1, 1, True), (0, 1, False)]
    z = torch.nn.functional.normalize(torch.randn(7, 4, generator=torch.Generator().manual_seed(1)), dim=1).double()
    labels = labels_of(rollouts)
    found = cross_domain_ranking(z, labels, used(labels, ContrastiveConfig(center="prompt")))
    assert found.auc_M[0].item() == pytest.approx(share(z, 0, [2], [1, 3]))
    assert found.auc_M.isnan().tolist() == [False, True, False, True, True, True, True]
