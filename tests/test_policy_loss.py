"""The clipped policy term, importance weights and k3, against values and gradients worked out by hand.

Not covered: log-probs themselves and the scaling of the loss by Megatron's schedule (mcore/).
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_mcpo.algo.policy_loss import PolicyLoss, policy_loss


def loss_of(logp: Tensor, advantages: Tensor, **changes: Any) -> PolicyLoss:
    """The loss with nothing else in play: on-policy engine, no KL, no cap, a mean over these tokens."""
    values: dict[str, Any] = {
        "logp_R": logp,
        "old_logp_R": logp.detach(),
        "engine_logp_R": changes.get("old_logp_R", logp).detach(),
        "ref_logp_R": None,
        "advantages_R": advantages,
        "clip_low": 0.2,
        "clip_high": 0.28,
        "kl_weight": 0.0,
        "importance_cap": None,
        "num_tokens": max(1, len(logp)),
    }
    return policy_loss(**(values | changes))


def gradient(logp: Tensor, loss: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logp)[0]


def leaf(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "grad", "clipped"),
    [
        (+2.0, 1.5, -2.56, 0.0, 1.0),  # already much likelier: no further push up
        (+2.0, 1.1, -2.2, -2.2, 0.0),
        (+2.0, 0.5, -1.0, -1.0, 0.0),  # drifted the wrong way: full pull back
        (-2.0, 1.5, 3.0, 3.0, 0.0),  # drifted the wrong way: full push down
        (-2.0, 0.9, 1.8, 1.8, 0.0),
        (-2.0, 0.5, 1.6, 0.0, 1.0),  # already much less likely: no further push down
        (0.0, 1.5, 0.0, 0.0, 0.0),
        (0.0, 0.5, 0.0, 0.0, 0.0),
    ],
)
def test_clip_by_sign_of_advantage_and_side_of_ratio(
    advantage: float, ratio: float, loss: float, grad: float, clipped: float
) -> None:
    logp = leaf(-1.0)
    result = loss_of(logp, torch.tensor([advantage]), old_logp_R=logp.detach() - math.log(ratio))
    assert result.loss.item() == pytest.approx(loss)
    assert gradient(logp, result.loss).item() == pytest.approx(grad)
    assert result.metrics["clip_fraction"].item() == clipped
    assert result.metrics["ratio"].item() == pytest.approx(ratio)


def test_on_policy_gradient_is_that_of_reinforce() -> None:
    logp = leaf(-0.3, -2.0, -5.0)
    advantages = torch.tensor([1.5, -0.5, -0.5], dtype=torch.float64)
    result = loss_of(logp, advantages)
    reinforce = gradient(logp, -(advantages * logp).sum() / 3)
    torch.testing.assert_close(gradient(logp, result.loss), reinforce)
    assert result.metrics["ratio"].item() == 1.0


def test_importance_weight_scales_the_policy_term_up_to_its_cap_but_not_the_kl() -> None:
    logp = leaf(-1.0, -1.0, -1.0)
    engine = logp.detach() - torch.tensor([0.5, 1.5, 9.0], dtype=torch.float64).log()
    arguments = {"engine_logp_R": engine, "ref_logp_R": logp.detach() + 0.3, "kl_weight": 0.5}
    result = loss_of(logp, torch.ones(3), importance_cap=2.0, **arguments)
    assert result.metrics["loss/policy"].item() == pytest.approx(-(0.5 + 1.5 + 2.0) / 3)
    assert result.metrics["importance/weight"].item() == pytest.approx((0.5 + 1.5 + 2.0) / 3)
    assert result.metrics["importance/capped"].item() == pytest.approx(1 / 3)
    k3_slope = 1 - math.exp(0.3)
    expected = torch.tensor([-0.5 + 0.5 * k3_slope, -1.5 + 0.5 * k3_slope, -2.0 + 0.5 * k3_slope]).double() / 3
    torch.testing.assert_close(gradient(logp, result.loss), expected)

    without = loss_of(logp, torch.ones(3), importance_cap=None, **arguments)
    assert without.metrics["loss/policy"].item() == pytest.approx(-1.0)
    assert without.metrics["importance/weight"].item() == 1.0
    assert without.metrics["importance/capped"].item() == 0.0


def test_loss_is_policy_plus_weighted_kl_over_the_global_count() -> None:
    logp = leaf(-1.0, -2.0)
    ref = torch.tensor([-1.5, -1.0], dtype=torch.float64)
    result = loss_of(logp, torch.tensor([1.0, -2.0]), ref_logp_R=ref, kl_weight=0.25, num_tokens=10)
    k3 = (math.exp(-0.5) + 0.5 - 1) + (math.exp(1.0) - 1.0 - 1)
    assert result.metrics["loss/kl"].item() == pytest.approx(0.25 * k3 / 10)
    assert result.metrics["loss/policy"].item() == pytest.approx((-1.0 + 2.0) / 10)
    assert result.loss.item() == pytest.approx((1.0 + 0.25 * k3) / 10)


@settings(deadline=None)
@given(st.floats(-60, 0), st.floats(-60, 0))
def test_k3_is_not_negative_and_has_its_analytic_gradient(logp_value: float, ref_value: float) -> None:
    logp = leaf(logp_value)
    ref = torch.tensor([ref_value], dtype=torch.float64)
    result = loss_of(logp, torch.zeros(1), ref_logp_R=ref, kl_weight=1.0)
    difference = ref_value - logp_value
    assert result.loss.item() >= -1e-15
    slope = 1 - math.exp(difference) if difference <= 20 else 0.0
    assert gradient(logp, result.loss).item() == pytest.approx(slope, rel=1e-12, abs=1e-12)


def test_k3_of_close_models_keeps_its_digits_in_fp32() -> None:
    logp = leaf(-1.0, dtype=torch.float32)
    ref = logp.detach() + 2.0**-12
    result = loss_of(logp, torch.zeros(1), ref_logp_R=ref, kl_weight=1.0)
    assert result.loss.item() == pytest.approx(2.0**-25, rel=1e-3)


@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("shift", [200.0, -200.0])
def test_absurd_differences_stay_finite_in_fp32(advantage: float, shift: float) -> None:
    logp = leaf(-250.0, dtype=torch.float32)
    far = logp.detach() + shift
    result = loss_of(
        logp, torch.tensor([advantage]), old_logp_R=far, engine_logp_R=far - shift, ref_logp_R=far, kl_weight=1.0,
        importance_cap=2.0,
    )  # fmt: skip
    assert result.loss.isfinite()
    assert gradient(logp, result.loss).isfinite().all()
    assert all(value.isfinite() for value in result.metrics.values())


def test_a_token_far_likelier_than_in_the_reference_keeps_its_kl_gradient() -> None:
    logp = leaf(-0.1, dtype=torch.float32)
    result = loss_of(logp, torch.zeros(1), ref_logp_R=logp.detach() - 90.0, kl_weight=1.0)
    assert gradient(logp, result.loss).item() == 1.0


def test_no_tokens_give_a_zero_that_is_connected() -> None:
    weight = torch.tensor(3.0, requires_grad=True)
    logp = torch.zeros(0) * weight
    result = loss_of(logp, torch.zeros(0), ref_logp_R=torch.zeros(0), kl_weight=1.0, importance_cap=2.0, num_tokens=7)
    assert result.loss.item() == 0.0
    assert torch.autograd.grad(result.loss, weight)[0].item() == 0.0
    assert all(value.item() == 0.0 and not value.requires_grad for value in result.metrics.values())


def test_only_the_policy_receives_a_gradient() -> None:
    logp, old, engine, ref = leaf(-1.0), leaf(-1.1), leaf(-1.2), leaf(-1.3)
    result = loss_of(
        logp, torch.ones(1), old_logp_R=old, engine_logp_R=engine, ref_logp_R=ref, kl_weight=1.0, importance_cap=2.0
    )
    result.loss.backward()
    assert logp.grad is not None
    assert old.grad is engine.grad is ref.grad is None


def random_tokens(seed: int, num: int) -> dict[str, Any]:
    """Log-probs around each other, so that some tokens are clipped and some weights capped."""
    random = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(num, generator=random, dtype=torch.float64)
    near = [logp + 0.5 * torch.randn(num, generator=random, dtype=torch.float64) for _ in range(3)]
    advantages = torch.randn(num, generator=random, dtype=torch.float64)
    return dict(
        zip(
            ("logp_R", "old_logp_R", "engine_logp_R", "ref_logp_R", "advantages_R"),
            (logp.requires_grad_(), *near, advantages),
            strict=True,
        )
    )


CONSTANTS: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28, "kl_weight": 0.3, "importance_cap": 1.5}


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.lists(st.integers(0, 5), min_size=1, max_size=5))
def test_any_division_into_micro_batches_adds_up_to_the_whole(seed: int, sizes: list[int]) -> None:
    tokens = random_tokens(seed, sum(sizes))
    count = max(1, sum(sizes))
    whole = policy_loss(**tokens, **CONSTANTS, num_tokens=count)
    parts = []
    start = 0
    for size in sizes:
        piece = {name: values[start : start + size] for name, values in tokens.items()}
        parts.append(policy_loss(**piece, **CONSTANTS, num_tokens=count))
        start += size
    total = torch.stack([part.loss for part in parts]).sum()
    torch.testing.assert_close(total, whole.loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        gradient(tokens["logp_R"], total), gradient(tokens["logp_R"], whole.loss), rtol=1e-12, atol=1e-14
    )
    for name, value in whole.metrics.items():
        summed = torch.stack([part.metrics[name] for part in parts]).sum()
        torch.testing.assert_close(summed, value, rtol=1e-5, atol=1e-7)


def test_gradient_against_finite_differences() -> None:
    tokens = random_tokens(0, 12)
    logp = tokens.pop("logp_R")
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(logp_R=x, **tokens, **CONSTANTS, num_tokens=12).loss, (logp,), atol=1e-7
    )


def test_a_kl_weight_without_a_reference_is_a_mistake_of_ours() -> None:
    with pytest.raises(AssertionError, match="reference"):
        loss_of(leaf(-1.0), torch.ones(1), kl_weight=0.1)
