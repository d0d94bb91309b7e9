"""Every form of the policy term, its KL estimates and importance weights, against values worked out by hand.

And against the formulas once more in float64, a rollout at a time, differentiated by autograd; and against exact
expectations over a small distribution. Not covered: log-probs themselves and the scaling of the loss by Megatron's
schedule (mcore/).
"""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_mcpo.algo.policy_loss import PolicyLoss, kl_estimate, policy_loss, token_weights
from megatron_mcpo.config.schema import AlgorithmConfig

PLAIN: dict[str, Any] = {"clip_high": 0.28, "kl_weight": 0.0, "importance": "off"}


def loss_of(logp: Tensor, advantages: Tensor, *, options: dict[str, Any] | None = None, **changes: Any) -> PolicyLoss:
    """The loss with nothing else in play: on-policy engine, no KL, no cap, a mean over these tokens of one rollout."""
    num_tokens = changes.pop("num_tokens", max(1, len(logp)))
    values: dict[str, Any] = {
        "logp_R": logp,
        "old_logp_R": logp.detach(),
        "engine_logp_R": changes.get("old_logp_R", logp).detach(),
        "ref_logp_R": None,
        "advantages_R": advantages,
        "weights_R": torch.full_like(logp, 1 / num_tokens, requires_grad=False),
        "rollout_R": torch.zeros(len(logp), dtype=torch.int64),
        "num_tokens": num_tokens,
        "settings": AlgorithmConfig(**(PLAIN | (options or {}))),
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
        (+2.0, 1.25, -2.5, -2.5, 0.0),  # above 1 + clip_low, but clip-higher lets it pass
        (+2.0, 1.1, -2.2, -2.2, 0.0),
        (+2.0, 0.5, -1.0, -1.0, 0.0),  # drifted the wrong way: full pull back
        (-2.0, 1.5, 3.0, 3.0, 0.0),  # drifted the wrong way: full push down
        (-2.0, 0.9, 1.8, 1.8, 0.0),
        (-2.0, 0.5, 1.6, 0.0, 1.0),  # already much less likely: no further push down
        (0.0, 1.5, 0.0, 0.0, 0.0),
        (0.0, 0.5, 0.0, 0.0, 0.0),
    ],
)
@pytest.mark.parametrize("clip", ["ppo", "gspo"])
def test_clip_by_sign_of_advantage_and_side_of_ratio(
    clip: str, advantage: float, ratio: float, loss: float, grad: float, clipped: float
) -> None:
    """A rollout of one token is its own mean: gspo is ppo."""
    logp = leaf(-1.0)
    old = logp.detach() - math.log(ratio)
    result = loss_of(logp, torch.tensor([advantage]), old_logp_R=old, options={"clip": clip})
    assert result.loss.item() == pytest.approx(loss)
    assert gradient(logp, result.loss).item() == pytest.approx(grad)
    assert result.metrics["clip_fraction"].item() == clipped
    assert result.metrics["ratio"].item() == pytest.approx(ratio)


def test_clip_higher_differs_from_the_symmetric_clip_above_one_alone() -> None:
    logp = leaf(-1.0, -1.0, -1.0, -1.0)
    old = logp.detach() - torch.tensor([1.25, 1.25, 0.75, 0.75], dtype=torch.float64).log()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    symmetric = loss_of(logp, advantages, old_logp_R=old, options={"clip_high": 0.2})
    higher = loss_of(logp, advantages, old_logp_R=old, options={"clip_high": 0.28})
    torch.testing.assert_close(4 * gradient(logp, symmetric.loss), torch.tensor([0.0, 1.25, -0.75, 0.0]).double())
    torch.testing.assert_close(4 * gradient(logp, higher.loss), torch.tensor([-1.25, 1.25, -0.75, 0.0]).double())


def test_gspo_clips_a_rollout_by_the_geometric_mean_of_its_ratios() -> None:
    """Ratios 2 and 0.5 make 1, which nothing clips; 2 and 1 make sqrt(2), which is clipped for both tokens."""
    logp = leaf(-1.0, -1.0, -1.0, -1.0)
    old = logp.detach() - torch.tensor([2.0, 0.5, 2.0, 1.0], dtype=torch.float64).log()
    changes: dict[str, Any] = {"old_logp_R": old, "rollout_R": torch.tensor([3, 3, 8, 8])}
    result = loss_of(logp, torch.ones(4), **changes, options={"clip": "gspo"})
    assert 4 * result.loss.item() == pytest.approx(-(1 + 1 + 1.28 + 1.28))
    # d/dlogp_t of both tokens' weight times the mean's ratio: each token has half of either.
    torch.testing.assert_close(4 * gradient(logp, result.loss), torch.tensor([-1.0, -1.0, 0.0, 0.0]).double())
    assert result.metrics["clip_fraction"].item() == 0.5
    assert result.metrics["ratio"].item() == pytest.approx((2 * 1 + 2 * math.sqrt(2)) / 4)
    by_token = loss_of(logp, torch.ones(4), **changes)
    assert 4 * by_token.loss.item() == pytest.approx(-(1.28 + 0.5 + 1.28 + 1))


def test_cispo_weights_every_token_with_its_clipped_ratio() -> None:
    logp = leaf(-1.0, -2.0, -3.0, -4.0)
    old = logp.detach() - torch.tensor([1.5, 1.1, 0.5, 1.5], dtype=torch.float64).log()
    advantages = torch.tensor([1.0, 1.0, -1.0, -2.0], dtype=torch.float64)
    result = loss_of(logp, advantages, old_logp_R=old, options={"clip": "cispo"})
    expected = -torch.tensor([1.28, 1.1, 0.8 * -1.0, 1.28 * -2.0], dtype=torch.float64)
    torch.testing.assert_close(4 * gradient(logp, result.loss), expected)
    assert 4 * result.loss.item() == pytest.approx((expected * logp.detach()).sum().item())
    assert result.metrics["clip_fraction"].item() == 0.75
    assert result.metrics["ratio"].item() == pytest.approx(4.6 / 4)


@pytest.mark.parametrize("clip", ["ppo", "gspo", "cispo"])
def test_on_policy_gradient_is_that_of_reinforce(clip: str) -> None:
    logp = leaf(-0.3, -2.0, -5.0)
    advantages = torch.full((3,), 1.5, dtype=torch.float64)
    result = loss_of(logp, advantages, options={"clip": clip})
    reinforce = gradient(logp, -(advantages * logp).sum() / 3)
    torch.testing.assert_close(gradient(logp, result.loss), reinforce)
    assert result.metrics["ratio"].item() == 1.0
    assert result.metrics["clip_fraction"].item() == 0.0


def test_truncated_importance_scales_the_policy_term_up_to_its_cap_but_not_the_kl() -> None:
    logp = leaf(-1.0, -1.0, -1.0)
    engine = logp.detach() - torch.tensor([0.1, 1.5, 9.0], dtype=torch.float64).log()
    arguments = {"engine_logp_R": engine, "ref_logp_R": logp.detach() + 0.3}
    result = loss_of(logp, torch.ones(3), options={"importance": "truncate", "kl_weight": 0.5}, **arguments)
    assert result.metrics["loss/policy"].item() == pytest.approx(-(0.1 + 1.5 + 2.0) / 3)
    assert result.metrics["importance/weight"].item() == pytest.approx((0.1 + 1.5 + 2.0) / 3)
    assert result.metrics["importance/capped"].item() == pytest.approx(1 / 3)
    k3_slope = 1 - math.exp(0.3)
    expected = torch.tensor([-0.1 + 0.5 * k3_slope, -1.5 + 0.5 * k3_slope, -2.0 + 0.5 * k3_slope]).double() / 3
    torch.testing.assert_close(gradient(logp, result.loss), expected)


def test_masked_importance_drops_what_lies_outside_floor_and_cap() -> None:
    logp = leaf(-1.0, -1.0, -1.0, -1.0)
    engine = logp.detach() - torch.tensor([0.4, 0.6, 1.9, 2.1], dtype=torch.float64).log()
    result = loss_of(logp, torch.ones(4), options={"importance": "mask"}, engine_logp_R=engine)
    torch.testing.assert_close(4 * gradient(logp, result.loss), torch.tensor([0.0, -0.6, -1.9, 0.0]).double())
    assert result.metrics["importance/weight"].item() == pytest.approx(2.5 / 4)
    assert result.metrics["importance/capped"].item() == 0.5
    wide = loss_of(
        logp,
        torch.ones(4),
        options={"importance": "mask", "importance_floor": 0.1, "importance_cap": 5.0},
        engine_logp_R=engine,
    )
    assert wide.metrics["importance/weight"].item() == pytest.approx(5.0 / 4)


def test_rejection_drops_a_rollout_whose_mean_log_prob_has_moved() -> None:
    """Rollout 4: weights 3 and 1 / 3, whose mean log is 0; rollout 6: 1.2 and 1.2, which is more than e^0.1 = 1.105."""
    logp = leaf(-1.0, -1.0, -1.0, -1.0)
    engine = logp.detach() - torch.tensor([3.0, 1 / 3, 1.2, 1.2], dtype=torch.float64).log()
    changes: dict[str, Any] = {"engine_logp_R": engine, "rollout_R": torch.tensor([4, 4, 6, 6])}
    result = loss_of(logp, torch.ones(4), options={"importance": "reject"}, **changes)
    torch.testing.assert_close(4 * gradient(logp, result.loss), torch.tensor([-2.0, -1 / 3, 0.0, 0.0]).double())
    assert result.metrics["importance/capped"].item() == 0.75
    assert result.metrics["importance/square"].item() == pytest.approx((4 + 1 / 9) / 4)
    wide = loss_of(logp, torch.ones(4), options={"importance": "reject", "rejection_limit": 0.2}, **changes)
    assert wide.metrics["importance/capped"].item() == 0.25
    assert wide.metrics["importance/weight"].item() == pytest.approx((2 + 1 / 3 + 2.4) / 4)


def test_without_importance_every_weight_is_one() -> None:
    logp = leaf(-1.0, -1.0)
    result = loss_of(logp, torch.ones(2), options={"importance": "off"}, engine_logp_R=logp.detach() - 3.0)
    assert result.metrics["loss/policy"].item() == -1.0
    assert result.metrics["importance/weight"].item() == 1.0
    assert result.metrics["importance/capped"].item() == 0.0


def test_loss_is_policy_plus_weighted_kl_over_the_global_count() -> None:
    logp = leaf(-1.0, -2.0)
    ref = torch.tensor([-1.5, -1.0], dtype=torch.float64)
    result = loss_of(logp, torch.tensor([1.0, -2.0]), ref_logp_R=ref, num_tokens=10, options={"kl_weight": 0.25})
    k3 = (math.exp(-0.5) + 0.5 - 1) + (math.exp(1.0) - 1.0 - 1)
    assert result.metrics["loss/kl"].item() == pytest.approx(0.25 * k3 / 10)
    assert result.metrics["loss/policy"].item() == pytest.approx((-1.0 + 2.0) / 10)
    assert result.loss.item() == pytest.approx((1.0 + 0.25 * k3) / 10)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("k2", [0.125, 0.5, 0.0]),
        ("k3", [math.exp(-0.5) - 1 + 0.5, math.exp(1.0) - 2, 0.0]),
    ],
)
def test_kl_estimates_by_hand(kind: Literal["k2", "k3"], values: list[float]) -> None:
    """Of tokens that are likelier, less likely and as likely as in the reference."""
    found = kl_estimate(torch.tensor([-1.0, -2.0, -3.0]).double(), torch.tensor([-1.5, -1.0, -3.0]).double(), kind)
    assert found.tolist() == pytest.approx(values)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), min_size=2, max_size=6))
def test_expected_kl_estimates_and_their_gradients_over_a_distribution(logits: list[tuple[float, float]]) -> None:
    """Exactly, by summing over all tokens. What the gradient of a sampled estimate is on average is weighted with the
    probabilities that sampled it, which carry no gradient themselves."""
    own, other = torch.tensor(logits, dtype=torch.float64).T
    own.requires_grad_()
    logp, ref = own.log_softmax(0), other.log_softmax(0)
    probability = logp.detach().exp()
    forward, backward = (logp.exp() * (logp - ref)).sum(), (ref.exp() * (ref - logp)).sum()
    of_forward, of_backward = (torch.autograd.grad(kl, own, retain_graph=True)[0] for kl in (forward, backward))

    def mean_gradient(kind: Literal["k2", "k3"]) -> Tensor:
        return gradient(own, (probability * kl_estimate(own.log_softmax(0), ref, kind)).sum())

    close: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close(mean_gradient("k2"), of_forward, **close)
    torch.testing.assert_close(mean_gradient("k3"), of_backward, **close)
    # The values of k2 are biased, those of k3 are not.
    torch.testing.assert_close((probability * kl_estimate(logp, ref, "k3")).sum(), forward, **close)


@settings(deadline=None)
@given(st.floats(-60, 0), st.floats(-60, 0))
def test_k3_is_not_negative_and_has_its_analytic_gradient(logp_value: float, ref_value: float) -> None:
    logp = leaf(logp_value)
    ref = torch.tensor([ref_value], dtype=torch.float64)
    result = loss_of(logp, torch.zeros(1), ref_logp_R=ref, options={"kl_weight": 1.0})
    difference = ref_value - logp_value
    assert result.loss.item() >= -1e-15
    slope = 1 - math.exp(difference) if difference <= 20 else 0.0
    assert gradient(logp, result.loss).item() == pytest.approx(slope, rel=1e-12, abs=1e-12)


def test_k3_of_close_models_keeps_its_digits_in_fp32() -> None:
    logp = leaf(-1.0, dtype=torch.float32)
    ref = logp.detach() + 2.0**-12
    result = loss_of(logp, torch.zeros(1), ref_logp_R=ref, options={"kl_weight": 1.0})
    assert result.loss.item() == pytest.approx(2.0**-25, rel=1e-3)


CLIPS = get_args(AlgorithmConfig.model_fields["clip"].annotation)
AGGREGATIONS = get_args(AlgorithmConfig.model_fields["aggregation"].annotation)
ESTIMATORS = get_args(AlgorithmConfig.model_fields["kl_estimator"].annotation)
IMPORTANCES = get_args(AlgorithmConfig.model_fields["importance"].annotation)


@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("shift", [200.0, -200.0])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_absurd_differences_stay_finite_in_fp32(
    advantage: float, shift: float, clip: str, importance: str, estimator: str
) -> None:
    logp = leaf(-250.0, -250.0, dtype=torch.float32)
    far = logp.detach() + shift
    options = {"clip": clip, "importance": importance, "kl_estimator": estimator, "kl_weight": 1.0}
    result = loss_of(
        logp, torch.full((2,), advantage), old_logp_R=far, engine_logp_R=far - shift, ref_logp_R=far, options=options
    )
    assert result.loss.isfinite()
    assert gradient(logp, result.loss).isfinite().all()
    assert all(value.isfinite() for value in result.metrics.values())


def test_a_token_far_likelier_than_in_the_reference_keeps_its_kl_gradient() -> None:
    logp = leaf(-0.1, dtype=torch.float32)
    result = loss_of(logp, torch.zeros(1), ref_logp_R=logp.detach() - 90.0, options={"kl_weight": 1.0})
    assert gradient(logp, result.loss).item() == 1.0


@pytest.mark.parametrize("clip", CLIPS)
def test_no_tokens_give_a_zero_that_is_connected(clip: str) -> None:
    weight = torch.tensor(3.0, requires_grad=True)
    logp = torch.zeros(0) * weight
    options = {"clip": clip, "importance": "truncate", "kl_weight": 1.0}
    result = loss_of(logp, torch.zeros(0), ref_logp_R=torch.zeros(0), num_tokens=7, options=options)
    assert result.loss.item() == 0.0
    assert torch.autograd.grad(result.loss, weight)[0].item() == 0.0
    assert all(value.item() == 0.0 and not value.requires_grad for value in result.metrics.values())


def test_only_the_policy_receives_a_gradient() -> None:
    logp, old, engine, ref = leaf(-1.0), leaf(-1.1), leaf(-1.2), leaf(-1.3)
    options = {"importance": "truncate", "kl_weight": 1.0}
    result = loss_of(logp, torch.ones(1), old_logp_R=old, engine_logp_R=engine, ref_logp_R=ref, options=options)
    result.loss.backward()
    assert logp.grad is not None
    assert old.grad is engine.grad is ref.grad is None


def test_a_kl_weight_without_a_reference_is_a_mistake_of_ours() -> None:
    with pytest.raises(AssertionError, match="reference"):
        loss_of(leaf(-1.0), torch.ones(1), options={"kl_weight": 0.1})


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token_mean", [1 / 10] * 4),
        ("seq_mean_token_mean", [1 / 6 / 3] * 3 + [1 / 6]),
        ("dr_grpo", [1 / (6 * 16)] * 4),
    ],
)
def test_token_weights_of_one_rank_of_several(aggregation: Any, expected: list[float]) -> None:
    """Rollouts of 3, 0 and 1 tokens here, of a step of 6 rollouts and 10 tokens."""
    weights = token_weights(
        torch.tensor([3, 0, 1]), aggregation=aggregation, num_tokens=10, num_rollouts=6, max_response_tokens=16
    )
    torch.testing.assert_close(weights, torch.tensor(expected))


@dataclass(frozen=True)
class Step:
    """Rollouts of a whole step; log-probs lie around each other, so that clips and caps are hit."""

    lengths: list[int]
    tokens: dict[str, Tensor]
    settings: AlgorithmConfig
    max_response_tokens: int = 9

    @property
    def num_tokens(self) -> int:
        return max(1, sum(self.lengths))

    @property
    def rollout_R(self) -> Tensor:
        return torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))

    def share(self, rollouts: list[int]) -> PolicyLoss:
        """What a micro-batch of these rollouts adds to the step; it numbers rollouts by itself."""
        lengths = torch.tensor([self.lengths[i] for i in rollouts], dtype=torch.int64)
        where = torch.cat([(self.rollout_R == i).nonzero()[:, 0] for i in rollouts])
        return policy_loss(
            **{name: values[where] for name, values in self.tokens.items()},
            weights_R=token_weights(
                lengths,
                aggregation=self.settings.aggregation,
                num_tokens=self.num_tokens,
                num_rollouts=len(self.lengths),
                max_response_tokens=self.max_response_tokens,
            ),
            rollout_R=torch.arange(len(rollouts)).repeat_interleave(lengths),
            num_tokens=self.num_tokens,
            settings=self.settings,
        )


def random_step(seed: int, lengths: list[int], **options: Any) -> Step:
    random = torch.Generator().manual_seed(seed)
    num = sum(lengths)
    logp = -3 * torch.rand(num, generator=random, dtype=torch.float64)
    near = [logp + 0.5 * torch.randn(num, generator=random, dtype=torch.float64) for _ in range(3)]
    advantages = torch.randn(len(lengths), generator=random, dtype=torch.float64)
    names = ("logp_R", "old_logp_R", "engine_logp_R", "ref_logp_R")
    tokens = dict(zip(names, (logp.requires_grad_(), *near), strict=True))
    tokens["advantages_R"] = advantages.repeat_interleave(torch.tensor(lengths))
    chosen = {"clip_high": 0.28, "kl_weight": 0.3, "importance_cap": 1.5} | options
    return Step(lengths=lengths, tokens=tokens, settings=AlgorithmConfig(**chosen))


def by_the_formulas(step: Step) -> Tensor:
    """The whole step's loss, a rollout at a time, from the papers' formulas."""
    s = step.settings
    total = torch.zeros((), dtype=torch.float64)
    for number, length in enumerate(step.lengths):
        mine = {name: values[step.rollout_R == number] for name, values in step.tokens.items()}
        logp, old, advantage = mine["logp_R"], mine["old_logp_R"], mine["advantages_R"]
        ratio = torch.exp(logp - old)
        if s.clip == "gspo" and length:
            ratio = ratio.prod() ** (1 / length) * torch.ones(length)
        clipped = torch.clip(ratio, 1 - s.clip_low, 1 + s.clip_high)
        objective = torch.min(ratio * advantage, clipped * advantage)
        if s.clip == "cispo":
            objective = clipped.detach() * advantage * logp
        weight = torch.exp(old - mine["engine_logp_R"])
        if s.importance == "truncate":
            weight = weight.clip(max=s.importance_cap)
        elif s.importance == "mask":
            weight = weight * (weight <= s.importance_cap) * (weight >= s.importance_floor)
        elif s.importance == "reject":
            mean = weight.prod() ** (1 / max(1, length))
            kept = math.exp(-s.rejection_limit) <= mean <= math.exp(s.rejection_limit)
            weight = weight.clip(max=s.importance_cap) * kept
        else:
            weight = torch.ones(length)
        inverse = torch.exp(mine["ref_logp_R"] - logp)
        kl = {"k2": inverse.log() ** 2 / 2, "k3": inverse - 1 - inverse.log()}[s.kl_estimator]
        summed = (-weight * objective + s.kl_weight * kl).sum()
        divisor = {
            "token_mean": step.num_tokens,
            "seq_mean_token_mean": len(step.lengths) * max(1, length),
            "dr_grpo": len(step.lengths) * step.max_response_tokens,
        }[s.aggregation]
        total = total + summed / divisor
    return total


settings_of_all_kinds = st.fixed_dictionaries(
    {
        "clip": st.sampled_from(CLIPS),
        "clip_high": st.sampled_from([0.2, 0.28, 1.0]),
        "aggregation": st.sampled_from(AGGREGATIONS),
        "kl_estimator": st.sampled_from(ESTIMATORS),
        "importance": st.sampled_from(IMPORTANCES),
    }
)
lengths_of_rollouts = st.lists(st.integers(0, 6), min_size=1, max_size=7)


def assert_close(found: Tensor, expected: Tensor) -> None:
    """But for the rounding of the token weights, which are fp32; everything else is computed in float64."""
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("clip", CLIPS)
def test_every_combination_against_the_formulas(clip: str, aggregation: str, estimator: str, importance: str) -> None:
    options = {"clip": clip, "aggregation": aggregation, "kl_estimator": estimator, "importance": importance}
    step = random_step(1, [4, 1, 0, 6, 3], **options)
    loss, expected = step.share([0, 1, 2, 3, 4]).loss, by_the_formulas(step)
    assert_close(loss.double(), expected)
    logp = step.tokens["logp_R"]
    assert_close(gradient(logp, loss), gradient(logp, expected))


@settings(deadline=None, max_examples=80)
@given(st.data(), settings_of_all_kinds, lengths_of_rollouts, st.integers(0, 10_000))
def test_any_division_over_micro_batches_and_ranks_adds_up_to_the_whole(
    data: st.DataObject, options: dict[str, Any], lengths: list[int], seed: int
) -> None:
    """In any order: a rank holds some rollouts of each prompt, a micro-batch some of these."""
    step = random_step(seed, lengths, **options)
    numbers = data.draw(st.permutations(range(len(lengths))))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(lengths)), max_size=3)))
    bounds = [0, *cuts, len(lengths)]
    parts = [step.share(list(numbers[a:b])) for a, b in itertools.pairwise(bounds) if b > a]
    whole = step.share(list(range(len(lengths))))
    total = torch.stack([part.loss for part in parts]).sum()
    torch.testing.assert_close(total, whole.loss, rtol=1e-12, atol=1e-14)
    logp = step.tokens["logp_R"]
    torch.testing.assert_close(gradient(logp, total), gradient(logp, whole.loss), rtol=1e-12, atol=1e-14)
    assert_close(total.double(), by_the_formulas(step))
    for name, value in whole.metrics.items():
        summed = torch.stack([part.metrics[name] for part in parts]).sum()
        torch.testing.assert_close(summed, value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("clip", ["ppo", "gspo"])
def test_gradient_against_finite_differences(clip: str) -> None:
    """cispo's is none of its value's: the clipped ratio is held fast."""
    step = random_step(0, [5, 7], clip=clip)

    def loss(logp: Tensor) -> Tensor:
        return replace(step, tokens={**step.tokens, "logp_R": logp}).share([0, 1]).loss

    assert torch.autograd.gradcheck(loss, (step.tokens["logp_R"],), atol=1e-7)
