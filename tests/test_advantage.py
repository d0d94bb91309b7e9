"""Group-relative advantages against closed forms and the standard library.

Not covered: how rewards come to be (rewards/) and how advantages are spread over tokens (mcore/).
"""

import math
import statistics
from typing import Literal, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mcpo.algo.advantage import group_advantages, signal
from megatron_mcpo.sections import AlgorithmConfig

Kind = Literal["grpo", "dr_grpo", "rloo", "per_domain"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def advantages_of(rewards: torch.Tensor, kind: Kind = "grpo", domains: list[int] | None = None) -> torch.Tensor:
    """All prompts are of one domain where none are named."""
    return group_advantages(rewards, torch.tensor(domains or [0] * len(rewards)), kind=kind)


def by_the_definition(rewards: list[list[float]], domains: list[int], kind: Kind) -> list[list[float]]:
    """In plain Python, a rollout at a time."""
    centred = [[r - statistics.fmean(group) for r in group] for group in rewards]
    found = []
    for group, centred_group, domain in zip(rewards, centred, domains, strict=True):
        of_domain = [c for row, d in zip(centred, domains, strict=True) if d == domain for c in row]
        divisor = {
            "grpo": statistics.stdev(group) + 1e-6,
            "dr_grpo": 1.0,
            "rloo": 1.0,
            "per_domain": math.sqrt(statistics.fmean([c * c for c in of_domain])) + 1e-6,
        }[kind]
        if kind == "rloo":
            others = [statistics.fmean([*group[:i], *group[i + 1 :]]) for i in range(len(group))]
            found.append([r - other for r, other in zip(group, others, strict=True)])
        else:
            found.append([c / divisor for c in centred_group])
    return found


def test_the_configuration_offers_these_kinds() -> None:
    assert get_args(AlgorithmConfig.model_fields["advantage"].annotation) == KINDS


def test_one_success_in_four_has_the_advantages_of_the_closed_form() -> None:
    # mean 1/4, sample standard deviation 1/2
    expected = torch.tensor([[1.5, -0.5, -0.5, -0.5]], dtype=torch.float64) / (1 + 2e-6)
    torch.testing.assert_close(advantages_of(torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64)), expected)


def test_one_success_in_four_without_the_deviation_and_with_the_others_mean() -> None:
    rewards = torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64)
    assert advantages_of(rewards, "dr_grpo").tolist() == [[0.75, -0.25, -0.25, -0.25]]
    torch.testing.assert_close(advantages_of(rewards, "rloo"), torch.tensor([[1.0, -1 / 3, -1 / 3, -1 / 3]]).double())


def test_per_domain_gives_the_domains_the_same_weight_whatever_the_scale_of_their_rewards() -> None:
    rewards = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.51, 0.5], [0.5, 0.5]], dtype=torch.float64)
    advantages = advantages_of(rewards, "per_domain", [0, 0, 7, 7])
    squares = advantages.square().mean(dim=1)
    torch.testing.assert_close(squares[:2].mean(), torch.tensor(1.0).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(squares[2:].mean(), torch.tensor(1.0).double(), rtol=1e-3, atol=0)
    torch.testing.assert_close(advantages[0, 0].item(), math.sqrt(2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_groups_do_not_see_each_other(kind: Kind) -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.5], [0.2, 0.9, 0.1]], dtype=torch.float64)
    together = advantages_of(rewards, kind)
    for row, group in zip(together, rewards, strict=True):
        torch.testing.assert_close(row, advantages_of(group[None], kind)[0])


def test_domains_do_not_see_each_other() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.5], [0.2, 0.9, 0.1], [0.3, 0.4, 0.4]], dtype=torch.float64)
    together = advantages_of(rewards, "per_domain", [4, 1, 4])
    torch.testing.assert_close(together[[0, 2]], advantages_of(rewards[[0, 2]], "per_domain"))
    torch.testing.assert_close(together[[1]], advantages_of(rewards[[1]], "per_domain"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 3, 7, 8, 11, 64])
@pytest.mark.parametrize("reward", [0.0, 0.1, 0.3, 0.7, 1.0])
def test_equal_rewards_give_exactly_zero_in_fp32(kind: Kind, size: int, reward: float) -> None:
    rewards = torch.full((3, size), reward, dtype=torch.float32)
    assert torch.equal(advantages_of(rewards, kind), torch.zeros_like(rewards))
    assert not signal(rewards).any()


@pytest.mark.parametrize("kind", KINDS)
def test_an_equal_group_stays_zero_beside_a_mixed_one(kind: Kind) -> None:
    rewards = torch.tensor([[0.1] * 7, [0.1] * 6 + [0.9]])
    advantages = advantages_of(rewards, kind)
    assert torch.equal(advantages[0], torch.zeros(7))
    assert advantages[1].ne(0).all()
    assert signal(rewards).tolist() == [False, True]


def test_one_different_reward_at_any_place_is_a_signal() -> None:
    rewards = torch.eye(4)
    assert signal(rewards).all()


@settings(deadline=None)
@given(st.data(), st.sampled_from(KINDS), st.integers(1, 5), st.integers(2, 8))
def test_any_groups_against_the_definition(data: st.DataObject, kind: Kind, num: int, size: int) -> None:
    reward = st.floats(0, 1).map(lambda r: round(r, 3))
    rewards = data.draw(st.lists(st.lists(reward, min_size=size, max_size=size), min_size=num, max_size=num))
    domains = data.draw(st.lists(st.integers(0, 2), min_size=num, max_size=num))
    found = advantages_of(torch.tensor(rewards, dtype=torch.float64), kind, domains)
    expected = torch.tensor(by_the_definition(rewards, domains, kind), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.sum(dim=1), torch.zeros(num).double(), rtol=0, atol=1e-9)
