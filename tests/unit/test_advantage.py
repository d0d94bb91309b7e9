"""Group-relative advantages against closed forms and their definitions.

Not covered: how rewards come to be (rewards/) and how advantages are spread over tokens (mcore/).
"""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mcpo.algo.advantage import ESTIMATORS, group_advantages, has_nonzero_advantage
from megatron_mcpo.config.schema import AdvantageKind
from tests.support import reference

KINDS = tuple(ESTIMATORS)


def groups_of(rewards: Sequence[Sequence[float]]) -> torch.Tensor:
    """Return the number of each reward's group."""
    return torch.tensor([number for number, group in enumerate(rewards) for _ in group])


def flat(rewards: Sequence[Sequence[float]], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor([reward for group in rewards for reward in group], dtype=dtype)


def advantages_of(
    rewards: Sequence[Sequence[float]],
    kind: AdvantageKind = "grpo",
    domains: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float64,
) -> list[torch.Tensor]:
    """Return a tensor per prompt; all prompts are of one domain where none are named."""
    prompt_M = groups_of(rewards)
    domain_M = torch.tensor(domains or [0] * len(rewards))[prompt_M]
    advantages_M = group_advantages(flat(rewards, dtype), prompt_M, domain_M, kind=kind)
    return list(advantages_M.split([len(group) for group in rewards]))


def test_one_success_in_four_has_the_advantages_of_the_closed_form() -> None:
    # mean 1/4, sample standard deviation 1/2
    expected = torch.tensor([1.5, -0.5, -0.5, -0.5], dtype=torch.float64) / (1 + 2e-6)
    torch.testing.assert_close(advantages_of([[1.0, 0, 0, 0]])[0], expected)


def test_one_success_in_four_without_the_deviation_and_with_the_others_mean() -> None:
    rewards = [[1.0, 0, 0, 0]]
    assert advantages_of(rewards, "dr_grpo")[0].tolist() == [0.75, -0.25, -0.25, -0.25]
    torch.testing.assert_close(advantages_of(rewards, "rloo")[0], torch.tensor([1.0, -1 / 3, -1 / 3, -1 / 3]).double())


def test_per_domain_gives_the_domains_the_same_weight_whatever_the_scale_of_their_rewards() -> None:
    rewards = [[1.0, 0.0], [0.5, 0.5], [0.51, 0.5], [0.5, 0.5]]
    advantages = torch.stack(advantages_of(rewards, "per_domain", [0, 0, 7, 7]))
    squares = advantages.square().mean(dim=1)
    torch.testing.assert_close(squares[:2].mean(), torch.tensor(1.0).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(squares[2:].mean(), torch.tensor(1.0).double(), rtol=1e-3, atol=0)
    torch.testing.assert_close(advantages[0, 0].item(), math.sqrt(2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_groups_do_not_see_each_other(kind: AdvantageKind) -> None:
    rewards = [[1.0, 0.0, 0.5], [0.2, 0.9, 0.1, 0.3]]
    for found, group in zip(advantages_of(rewards, kind), rewards, strict=True):
        torch.testing.assert_close(found, advantages_of([group], kind)[0])


def test_domains_do_not_see_each_other() -> None:
    rewards = [[1.0, 0.0, 0.5], [0.2, 0.9], [0.3, 0.4, 0.4]]
    together = advantages_of(rewards, "per_domain", [4, 1, 4])
    torch.testing.assert_close([together[0], together[2]], advantages_of([rewards[0], rewards[2]], "per_domain"))
    torch.testing.assert_close(together[1], advantages_of([rewards[1]], "per_domain")[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 3, 7, 8, 11, 64])
@pytest.mark.parametrize("reward", [0.0, 0.1, 0.3, 0.7, 1.0])
def test_equal_rewards_give_exactly_zero_in_fp32(kind: AdvantageKind, size: int, reward: float) -> None:
    rewards = [[reward] * size] * 3
    assert all(torch.equal(found, torch.zeros(size)) for found in advantages_of(rewards, kind, dtype=torch.float32))
    assert not has_nonzero_advantage(flat(rewards), groups_of(rewards)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_an_equal_group_stays_zero_beside_a_mixed_one(kind: AdvantageKind) -> None:
    rewards = [[0.1] * 7, [0.1] * 6 + [0.9]]
    equal, mixed = advantages_of(rewards, kind, dtype=torch.float32)
    assert torch.equal(equal, torch.zeros(7))
    assert mixed.ne(0).all()
    assert has_nonzero_advantage(flat(rewards), groups_of(rewards)).tolist() == [False] * 7 + [True] * 7


def test_one_different_reward_at_any_place_is_enough() -> None:
    rewards = torch.eye(4).tolist()
    assert has_nonzero_advantage(flat(rewards), groups_of(rewards)).all()


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises(AssertionError, match="a group of one"):
        advantages_of([[1.0, 0.0], [1.0]])


@settings(deadline=None)
@given(st.data(), st.sampled_from(KINDS), st.integers(1, 5))
def test_any_groups_against_the_definition(data: st.DataObject, kind: AdvantageKind, num: int) -> None:
    reward = st.floats(0, 1).map(lambda r: round(r, 3))
    group = st.lists(reward, min_size=2, max_size=8)
    rewards = data.draw(st.lists(group, min_size=num, max_size=num))
    domains = data.draw(st.lists(st.integers(0, 2), min_size=num, max_size=num))
    expected = reference.advantages([torch.tensor(group, dtype=torch.float64) for group in rewards], domains, kind)
    found_M = torch.cat(advantages_of(rewards, kind, domains))
    torch.testing.assert_close(found_M, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    for found in advantages_of(rewards, kind, domains):
        torch.testing.assert_close(found.sum(), torch.tensor(0.0).double(), rtol=0, atol=1e-9)
