"""Who is compared with whom, against loops written from the definition of C(i), S(i), M(i) and the rivals.

Not covered: ties that only differ by rounding of the similarities (every rank rounds alike, being handed the same z).
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_mcpo.algo.pairing import Pairing, members
from megatron_mcpo.config.schema import ContrastiveConfig
from megatron_mcpo.types import RolloutLabels


def labels_of(domains: list[int], correct: list[int], prompts: list[int] | None = None) -> RolloutLabels:
    return RolloutLabels(
        domain_M=torch.tensor(domains, dtype=torch.int64),
        prompt_M=torch.tensor(prompts or list(range(len(domains))), dtype=torch.int64),
        correct_M=torch.tensor(correct, dtype=torch.bool),
    )


def angles(*degrees: float) -> Tensor:
    """Unit vectors in the plane: similarity is the cosine of the angle between them.

    Equal angles have equal vectors to the last bit: each number is computed by itself. torch's cosine of several
    numbers may be another function at the end of a tensor than in its middle, and a tie would be none.
    """
    radians = [math.radians(angle) for angle in degrees]
    return torch.tensor([[math.cos(angle), math.sin(angle)] for angle in radians], dtype=torch.float64)


def pairs_of(
    z: Tensor, labels: RolloutLabels, **options: Any
) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """C(i), S(i) and the rivals of every rollout; those of a wrong rollout are empty."""
    anchors = labels.correct_M.nonzero()[:, 0]
    pairs = Pairing(labels, ContrastiveConfig(**options)).find(z[anchors] @ z.T, anchors)
    found: tuple[list[list[int]], ...] = tuple([[] for _ in labels.domain_M] for _ in range(3))
    for rows, mask in zip(found, (pairs.cross_domain_AM, pairs.in_domain_AM, pairs.rivals_AM), strict=True):
        for anchor, row in zip(anchors.tolist(), mask, strict=True):
            rows[anchor] = row.nonzero()[:, 0].tolist()
    return found[0], found[1], found[2]


def test_each_other_domain_lends_its_most_similar_correct_rollouts() -> None:
    #            anchor        domain 1          domain 2, all farther away    wrong, nearest of all
    z = angles(0.0, 10.0, 30.0, 20.0, 100.0, 120.0, 110.0, 1.0)
    labels = labels_of([0, 1, 1, 1, 2, 2, 2, 1], [1, 1, 1, 1, 1, 1, 1, 0])
    cross_domain, _, _ = pairs_of(z, labels, top_k=2)
    assert cross_domain[0] == [1, 3, 4, 6]
    assert pairs_of(z, labels, top_k=1)[0][0] == [1, 4]
    assert pairs_of(z, labels, top_k=9)[0][0] == [1, 2, 3, 4, 5, 6]


def test_threshold_and_all_take_from_the_whole_pool_of_other_domains() -> None:
    z = angles(0.0, 10.0, 30.0, 80.0, 60.0, 5.0)
    z[4] = torch.tensor([0.5, math.sqrt(0.75)])  # cos 60 to the last bit, which no library's cosine promises
    labels = labels_of([0, 1, 1, 1, 2, 0], [1, 1, 1, 1, 1, 1])
    assert pairs_of(z, labels, transfer="threshold", threshold=0.5)[0][0] == [1, 2, 4], "cos 60 is just enough"
    assert pairs_of(z, labels, transfer="threshold", threshold=math.nextafter(0.5, 1.0))[0][0] == [1, 2]
    assert pairs_of(z, labels, transfer="all")[0][0] == [1, 2, 3, 4]


def test_sharing_need_not_be_mutual() -> None:
    z = angles(0.0, 50.0, 10.0)
    assert pairs_of(z, labels_of([0, 0, 1], [1, 1, 1]), top_k=1)[0] == [[2], [2], [0]]


def test_ties_go_to_the_first_in_step_order() -> None:
    z = torch.tensor([[1.0, 0.0]] * 40)
    labels = labels_of([0] * 20 + [1] * 20, [1] * 40)
    assert pairs_of(z, labels, top_k=3)[0] == [[20, 21, 22]] * 20 + [[0, 1, 2]] * 20


def test_a_tie_at_the_last_place_leaves_the_nearer_ones_alone() -> None:
    z = angles(0.0, 40.0, 40.0, 10.0, 40.0)
    assert pairs_of(z, labels_of([0, 1, 1, 1, 1], [1] * 5), top_k=2)[0][0] == [1, 3]


def test_positives_and_negatives_of_pool_domain_and_prompt() -> None:
    labels = labels_of([0, 0, 0, 1, 0, 0, 1], [1, 1, 1, 1, 0, 0, 0], prompts=[0, 0, 1, 2, 0, 1, 2])
    z = angles(*range(7))
    assert pairs_of(z, labels)[1] == [[1, 2], [0, 2], [0, 1], [], [], [], []]
    assert pairs_of(z, labels, in_domain_scope="prompt")[1] == [[1], [0], [], [], [], [], []]
    assert pairs_of(z, labels)[2][:4] == [[4, 5, 6]] * 4
    assert pairs_of(z, labels, negatives="domain")[2][:4] == [[4, 5], [4, 5], [4, 5], [6]]
    assert pairs_of(z, labels, negatives="prompt")[2][:4] == [[4], [4], [5], [6]]


def test_rivals_may_be_all_others_of_the_pool_the_domain_or_the_prompt() -> None:
    labels = labels_of([0, 0, 0, 1, 0], [1, 1, 1, 1, 0], prompts=[0, 0, 1, 2, 0])
    z = angles(*range(5))

    def rivals(scope: str) -> list[list[int]]:
        return pairs_of(z, labels, negatives=scope, denominator="all")[2][:4]

    assert rivals("pool") == [[1, 2, 3, 4], [0, 2, 3, 4], [0, 1, 3, 4], [0, 1, 2, 4]]
    assert rivals("domain") == [[1, 2, 4], [0, 2, 4], [0, 1, 4], []]
    assert rivals("prompt") == [[1, 4], [0, 4], [], []]


def test_an_empty_step_has_no_pairs() -> None:
    assert pairs_of(torch.zeros(0, 3), labels_of([], [])) == ([], [], [])


def test_members_are_counted_by_group() -> None:
    counts = members(torch.tensor([7, 3, 7, 7]), torch.tensor([True, True, False, True]))
    assert counts.tolist() == [2, 1, 2, 2]


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.booleans()), max_size=14),
    st.integers(1, 5),
    st.sampled_from(["pool", "domain", "prompt"]),
    st.sampled_from(["domain", "prompt"]),
    st.sampled_from(["negatives", "all"]),
    st.integers(0, 10_000),
)
def test_random_pools_against_the_definition(
    rollouts: list[tuple[int, int, bool]], top_k: int, negatives: str, in_domain_scope: str, denominator: str, seed: int
) -> None:
    domains = [domain for domain, _, _ in rollouts]
    prompts = [10 * domain + prompt for domain, prompt, _ in rollouts]
    right = [i for i, (_, _, correct) in enumerate(rollouts) if correct]
    random = torch.Generator().manual_seed(seed)
    z = torch.nn.functional.normalize(torch.randn(len(rollouts), 5, generator=random, dtype=torch.float64), dim=1)
    labels = labels_of(domains, [int(i in right) for i in range(len(rollouts))], prompts)
    options = {"negatives": negatives, "in_domain_scope": in_domain_scope, "denominator": denominator}
    found = pairs_of(z, labels, top_k=top_k, **options)
    group = {"pool": [0] * len(rollouts), "domain": domains, "prompt": prompts}
    for i in range(len(rollouts)):
        cross_domain: list[int] = []
        for other in set(domains) - {domains[i]}:
            candidates = [j for j in right if domains[j] == other]
            cross_domain += sorted(candidates, key=lambda j: (-(z[i] @ z[j]).item(), j))[:top_k]
        same = [j for j in right if j != i and group[in_domain_scope][j] == group[in_domain_scope][i]]
        scope = [j for j in range(len(rollouts)) if j != i and group[negatives][j] == group[negatives][i]]
        rivals = scope if denominator == "all" else [j for j in scope if j not in right]
        expected = (sorted(cross_domain), same, rivals) if i in right else ([], [], [])
        assert (found[0][i], found[1][i], found[2][i]) == expected


@pytest.mark.parametrize("transfer", ["top_k", "threshold", "all"])
def test_wrong_rollouts_are_never_positives(transfer: str) -> None:
    labels = labels_of([0, 1, 1, 0], [1, 0, 1, 0])
    cross_domain, in_domain, _ = pairs_of(torch.ones(4, 1), labels, transfer=transfer)
    assert cross_domain == [[2], [], [0], []] and in_domain == [[], [], [], []]
