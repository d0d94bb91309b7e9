"""Who is compared with whom, against loops written from the definition of C(i), S(i) and M(i).

Not covered: ties that only differ by rounding of the similarities (every rank rounds alike, being handed the same z).
"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_mcpo.algo.pairing import find_pairs
from megatron_mcpo.types import Keys


def keys_of(domains: list[int], correct: list[int], prompts: list[int] | None = None) -> Keys:
    return Keys(
        domain_M=torch.tensor(domains, dtype=torch.int64),
        prompt_M=torch.tensor(prompts or list(range(len(domains))), dtype=torch.int64),
        correct_M=torch.tensor(correct, dtype=torch.bool),
    )


def angles(*degrees: float) -> Tensor:
    """Unit vectors in the plane: similarity is the cosine of the angle between them."""
    radians = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=1)


def rows(mask: Tensor) -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in mask]


def test_each_other_domain_lends_its_most_similar_correct_rollouts() -> None:
    #            anchor        domain 1          domain 2, all farther away    wrong, nearest of all
    z = angles(0.0, 10.0, 30.0, 20.0, 100.0, 120.0, 110.0, 1.0)
    keys = keys_of([0, 1, 1, 1, 2, 2, 2, 1], [1, 1, 1, 1, 1, 1, 1, 0])
    pairs = find_pairs(z, keys, top_k=2)
    assert rows(pairs.share_MM)[0] == [1, 3, 4, 6]
    assert rows(pairs.share_MM)[7] == []
    assert rows(find_pairs(z, keys, top_k=1).share_MM)[0] == [1, 4]
    assert rows(find_pairs(z, keys, top_k=9).share_MM)[0] == [1, 2, 3, 4, 5, 6]


def test_sharing_need_not_be_mutual() -> None:
    z = angles(0.0, 50.0, 10.0)
    pairs = find_pairs(z, keys_of([0, 0, 1], [1, 1, 1]), top_k=1)
    assert rows(pairs.share_MM) == [[2], [2], [0]]


def test_ties_go_to_the_first_in_step_order() -> None:
    z = torch.tensor([[1.0, 0.0]] * 40)
    keys = keys_of([0] * 20 + [1] * 20, [1] * 40)
    pairs = find_pairs(z, keys, top_k=3)
    assert rows(pairs.share_MM) == [[20, 21, 22]] * 20 + [[0, 1, 2]] * 20


def test_in_domain_positives_and_negatives_of_the_pool() -> None:
    keys = keys_of([0, 0, 1, 0, 1], [1, 1, 1, 0, 0], prompts=[0, 0, 1, 0, 1])
    pairs = find_pairs(angles(0, 1, 2, 3, 4), keys, top_k=4)
    assert rows(pairs.consolidate_MM) == [[1], [0], [], [], []]
    assert pairs.negatives_M.tolist() == [False, False, False, True, True]


def test_the_choice_carries_no_gradient() -> None:
    z = angles(0, 10, 20).requires_grad_()
    pairs = find_pairs(z, keys_of([0, 1, 1], [1, 1, 0]), top_k=1)
    assert not pairs.share_MM.requires_grad


def test_an_empty_step_has_no_pairs() -> None:
    pairs = find_pairs(torch.zeros(0, 3), keys_of([], []), top_k=4)
    assert pairs.share_MM.shape == pairs.consolidate_MM.shape == (0, 0)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.booleans()), max_size=14),
    st.integers(1, 5),
    st.integers(0, 10_000),
)
def test_random_pools_against_the_definition(rollouts: list[tuple[int, int, bool]], top_k: int, seed: int) -> None:
    domains = [domain for domain, _, _ in rollouts]
    correct = [right for _, _, right in rollouts]
    random = torch.Generator().manual_seed(seed)
    z = torch.nn.functional.normalize(torch.randn(len(rollouts), 5, generator=random, dtype=torch.float64), dim=1)
    pairs = find_pairs(z, keys_of(domains, [int(c) for c in correct]), top_k=top_k)
    for i in range(len(rollouts)):
        share: list[int] = []
        for other in set(domains) - {domains[i]}:
            candidates = [j for j in range(len(rollouts)) if domains[j] == other and correct[j]]
            share += sorted(candidates, key=lambda j: (-(z[i] @ z[j]).item(), j))[:top_k]
        same = [j for j in range(len(rollouts)) if j != i and correct[j] and domains[j] == domains[i]]
        assert rows(pairs.share_MM)[i] == (sorted(share) if correct[i] else [])
        assert rows(pairs.consolidate_MM)[i] == (same if correct[i] else [])
    assert pairs.negatives_M.tolist() == [not c for c in correct]
