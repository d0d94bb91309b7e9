"""How evenly tokens are divided over experts, in cases that can be worked out by hand."""

import math

import pytest
import torch

from megatron_mcpo.reporting.expert_load import expert_load


@pytest.mark.parametrize(
    ("load", "most", "entropy", "unused"),
    [
        ([[5, 5, 5, 5]], 1.0, 1.0, 0.0),
        ([[8, 8, 0, 0]], 2.0, 0.5, 0.5),
        ([[9, 0, 0, 0], [3, 3, 3, 3]], 2.5, 0.5, 0.375),
        ([[0, 0, 0, 0]], 0.0, 0.0, 1.0),
    ],
)
def test_load(load: list[list[int]], most: float, entropy: float, unused: float) -> None:
    found = expert_load(torch.tensor(load))
    assert found["moe/load_max_over_mean"] == pytest.approx(most)
    assert found["moe/load_entropy"] == pytest.approx(entropy)
    assert found["moe/unused_experts"] == pytest.approx(unused)


def test_entropy_of_uneven_shares() -> None:
    found = expert_load(torch.tensor([[3, 1]]))
    assert found["moe/load_entropy"] == pytest.approx(-(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)))
