"""Group-relative advantages against closed forms and the standard library.

Not covered: how rewards come to be (rewards/) and how advantages are spread over tokens (mcore/).
"""

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mcpo.algo.advantage import group_advantages, signal


def test_one_success_in_four_has_the_advantages_of_the_closed_form() -> None:
    # mean 1/4, sample standard deviation 1/2
    expected = torch.tensor([[1.5, -0.5, -0.5, -0.5]], dtype=torch.float64) / (1 + 2e-6)
    torch.testing.assert_close(group_advantages(torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64)), expected)


def test_groups_do_not_see_each_other() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.5], [0.2, 0.9, 0.1]], dtype=torch.float64)
    together = group_advantages(rewards)
    for row, group in zip(together, rewards, strict=True):
        torch.testing.assert_close(row, group_advantages(group[None])[0])


@pytest.mark.parametrize("size", [2, 3, 7, 8, 11, 64])
@pytest.mark.parametrize("reward", [0.0, 0.1, 0.3, 0.7, 1.0])
def test_equal_rewards_give_exactly_zero_in_fp32(size: int, reward: float) -> None:
    rewards = torch.full((3, size), reward, dtype=torch.float32)
    assert torch.equal(group_advantages(rewards), torch.zeros_like(rewards))
    assert not signal(rewards).any()


def test_an_equal_group_stays_zero_beside_a_mixed_one() -> None:
    rewards = torch.tensor([[0.1] * 7, [0.1] * 6 + [0.9]])
    advantages = group_advantages(rewards)
    assert torch.equal(advantages[0], torch.zeros(7))
    assert advantages[1].ne(0).all()
    assert signal(rewards).tolist() == [False, True]


def test_one_different_reward_at_any_place_is_a_signal() -> None:
    rewards = torch.eye(4)
    assert signal(rewards).all()


@settings(deadline=None)
@given(st.lists(st.floats(0, 1).map(lambda r: round(r, 3)), min_size=2, max_size=16))
def test_any_group_against_the_standard_library(rewards: list[float]) -> None:
    advantages = group_advantages(torch.tensor([rewards], dtype=torch.float64))[0].tolist()
    mean, deviation = statistics.fmean(rewards), statistics.stdev(rewards)
    for advantage, reward in zip(advantages, rewards, strict=True):
        assert advantage == pytest.approx((reward - mean) / (deviation + 1e-6), abs=1e-9)
