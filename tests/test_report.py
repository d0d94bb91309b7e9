"""The figures of a step and the rows of the rollout dump, of rollouts of very different lengths, against closed forms.

Not covered: gathering over real ranks (test_parallel.py) and the figures of the work done, which the trainer adds.
"""

import math
import re
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from megatron_mcpo import report
from megatron_mcpo.algo.advantage import group_advantages
from megatron_mcpo.algo.contrastive import contrastive
from megatron_mcpo.algo.policy_loss import policy_loss
from megatron_mcpo.batch import make_batch, rewards_of
from megatron_mcpo.report import COLUMNS, BatchReport, rollout_rows, rollout_stats, step_figures
from megatron_mcpo.types import Completion, Prompt, RolloutGroup, Scores, StopReason, TrainBatch

NAMES = ["red", "green", "blue"]
LOGP = -1.0


def group(domain: int, lengths: Sequence[int], rewards: Sequence[float], error: str | None = None) -> RolloutGroup:
    """A prompt of two tokens. The engine's log-probs: 0.5 off on the last token of every response, else exact."""
    completions = tuple(
        Completion(
            token_ids=(7,) * length,
            logprobs=(LOGP,) * (length - 1) + (LOGP - 0.5,) if length else (),
            stop_reason=StopReason.LENGTH if length > 50 else StopReason.STOP,
            version=3,
            text=f"{domain}:{length}",
        )
        for length in lengths
    )
    prompt = Prompt(domain=domain, source="made", index=len(lengths), token_ids=(1, 2), entry={"answer": "42"})
    return RolloutGroup(prompt=prompt, completions=completions, rewards=() if error else tuple(rewards), error=error)


def batch_of(groups: Sequence[RolloutGroup], *, data_rank: int = 0, num_data_ranks: int = 1) -> TrainBatch:
    return make_batch(
        groups,
        group_advantages(rewards_of(groups)),
        pass_threshold=1.0,
        num_data_ranks=num_data_ranks,
        data_rank=data_rank,
        share_prompts=False,
    )


def entropy_of(row: int) -> float:
    """A level for each rollout: a mean over rollouts and one over tokens differ."""
    return row + 0.25


def difference_of(row: int) -> float:
    """Reference minus policy."""
    return 0.1 * (row + 1)


def k3_of(row: int) -> float:
    return math.exp(difference_of(row)) - 1 - difference_of(row)


def stats_of(batch: TrainBatch) -> Tensor:
    """What `rollout_stats` says of a rank's rollouts, whose scores are constant over the tokens of each."""
    rows_R = batch.rows_N[batch.rollout_R].tolist()
    old = Scores(
        logp_R=torch.full((len(rows_R),), LOGP),
        entropy_R=torch.tensor([entropy_of(row) for row in rows_R]),
        z_ND=None,
        version=3,
    )
    return rollout_stats(batch, old, torch.tensor([LOGP + difference_of(row) for row in rows_R]))


def report_of(
    groups: Sequence[RolloutGroup], *, metrics: dict[str, float] | None = None, num_data_ranks: int = 1
) -> BatchReport:
    """A report as the trainer makes it; representations are random."""
    shares = [batch_of(groups, data_rank=rank, num_data_ranks=num_data_ranks) for rank in range(num_data_ranks)]
    keys = shares[0].keys
    stats_MK = torch.zeros(len(keys), len(COLUMNS))
    for share in shares:
        stats_MK[share.rows_N] = stats_of(share)
    z_MD = normalize(torch.randn(len(keys), 4, generator=torch.Generator().manual_seed(0)), dim=1)
    return BatchReport(
        groups=groups,
        advantages_PG=group_advantages(rewards_of(groups)),
        stats_MK=stats_MK,
        z_MD=z_MD,
        contrast=contrastive(z_MD, keys, share_weight=1.0, consolidate_weight=1.0, temperature=0.1, top_k=1),
        num_tokens=shares[0].num_tokens,
        metrics=metrics or {},
    )


# A step of two minibatches: red and green in the first, red in the second; a second green group failed, blue is absent.
FIRST = [group(0, [1, 100], [1.0, 0.0]), group(1, [10, 0], [1.0, 0.0])]
SECOND = [group(0, [3, 1000], [1.0, 1.0])]
FAILED = group(1, [400, 500], [], error="timeout")
COLLECTED = [FIRST[0], FAILED, SECOND[0], FIRST[1]]
# (row in its minibatch, length)
RED = [(0, 1), (1, 100), (0, 3), (1, 1000)]
GREEN = [(2, 10), (3, 0)]


@pytest.fixture
def figures() -> dict[str, float]:
    reports = [
        report_of(FIRST, metrics={"update/applied": 1.0, "grad_norm": 2.0}),
        report_of(SECOND, metrics={"update/applied": 0.0, "grad_norm": math.nan}),
    ]
    return step_figures(reports, COLLECTED, NAMES)


@pytest.mark.parametrize(
    ("suffix", "difference", "rollouts"),
    [
        ("", "engine/logprob_diff_mean", RED + GREEN),
        ("/red", "engine/logprob_diff/red", RED),
        ("/green", "engine/logprob_diff/green", GREEN),
    ],
)
def test_entropy_kl_and_engine_difference_are_means_over_tokens(
    figures: dict[str, float], suffix: str, difference: str, rollouts: list[tuple[int, int]]
) -> None:
    tokens = sum(length for _, length in rollouts)
    assert figures[f"entropy{suffix}"] == pytest.approx(sum(n * entropy_of(i) for i, n in rollouts) / tokens)
    assert figures[f"kl{suffix}"] == pytest.approx(sum(n * k3_of(i) for i, n in rollouts) / tokens, rel=1e-4)
    assert figures[difference] == pytest.approx(0.5 * sum(n > 0 for _, n in rollouts) / tokens)


def test_figures_of_rollouts_and_groups_leave_failed_groups_out_but_count_them(figures: dict[str, float]) -> None:
    expected = {
        "engine/logprob_diff_max": 0.5,
        "response_tokens": 1114 / 6,
        "response_tokens/red": 1104 / 4,
        "response_tokens/green": 5.0,
        "truncated": 2 / 6,
        "truncated/red": 0.5,
        "signal": 2 / 3,
        "signal/red": 0.5,
        "signal/green": 1.0,
        "reward/red": 0.75,
        "reward/green": 0.5,
        "reward/mean": 0.625,
        "groups/errors": 1.0,
        "errors/red": 0.0,
        "errors/green": 1.0,
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected)


def test_figures_of_updates_are_means_over_them_and_not_finite_where_one_is_not(figures: dict[str, float]) -> None:
    assert figures["update/applied"] == 0.5
    assert math.isnan(figures["grad_norm"])


def test_anchors_of_a_domain_are_a_mean_over_minibatches(figures: dict[str, float]) -> None:
    # The first has a right rollout of red and one of green, each the other's positive; the second is all right.
    expected = {
        "contrast/positives_share": 1.0,
        "contrast/positives_consolidate": 0.0,
        "contrast/anchors/red": 0.5,
        "contrast/anchors/green": 0.5,
        "contrast/positives/red": 1.0,
    }
    assert {name: figures[name] for name in expected} == expected


def test_without_a_wrong_rollout_there_are_no_anchors() -> None:
    right = [group(0, [1, 2], [1.0, 1.0]), group(1, [3, 4], [1.0, 1.0])]
    made = report_of(right)
    assert made.contrast is not None and made.contrast.share_MM.any(), "there are positives"
    found = step_figures([made], right, NAMES)
    for name in ("positives_share", "positives_consolidate", "anchors/red", "positives/red"):
        assert found[f"contrast/{name}"] == 0.0, name


def test_a_domain_that_is_absent_has_no_figure(figures: dict[str, float]) -> None:
    assert not [name for name in figures if "blue" in name]
    assert "reward/red" in figures


def test_every_figure_is_described_at_the_head_of_the_file(figures: dict[str, float]) -> None:
    described = set(re.findall(r"[a-z_0-9/]+(?:<domain>)?", report.__doc__ or ""))
    starred = set(re.findall(r"^  ([a-z_]+) \*", report.__doc__ or "", flags=re.MULTILINE))
    described |= {f"{name}/<domain>" for name in starred}
    names = {re.sub("/(red|green)$", "/<domain>", name) for name in figures}
    assert names <= described, names - described
    assert starred <= names


def test_the_figures_are_the_same_for_any_number_of_ranks(figures: dict[str, float]) -> None:
    divided = [report_of(FIRST, num_data_ranks=3), report_of(SECOND, num_data_ranks=3)]
    again = step_figures(divided, COLLECTED, NAMES)
    for name, value in again.items():
        assert value == pytest.approx(figures[name], rel=1e-6), name


def test_the_kl_is_the_one_that_the_loss_has() -> None:
    """At the weights that sampled the batch; far from the reference too, where the loss limits the exponent."""
    batch = batch_of(FIRST)
    logp_R = torch.full((batch.num_response_tokens,), LOGP)
    ref_logp_R = torch.linspace(-3.0, 30.0, len(logp_R))
    old = Scores(logp_R=logp_R, entropy_R=torch.zeros_like(logp_R), z_ND=None, version=0)
    term = policy_loss(
        logp_R=logp_R,
        old_logp_R=logp_R,
        engine_logp_R=batch.engine_logp_R,
        ref_logp_R=ref_logp_R,
        advantages_R=torch.zeros_like(logp_R),
        clip_low=0.2,
        clip_high=0.2,
        kl_weight=0.25,
        importance_cap=None,
        num_tokens=batch.num_response_tokens,
    )
    total = rollout_stats(batch, old, ref_logp_R)[:, 1].sum().item()
    assert 0.25 * total / batch.num_response_tokens == pytest.approx(term.metrics["loss/kl"].item(), rel=1e-5)
    assert not rollout_stats(batch, old, None)[:, 1].any(), "no reference, no KL"


def test_a_difference_that_is_not_a_number_is_not_hidden() -> None:
    broken = report_of(FIRST)
    broken.stats_MK[1] = math.nan
    found = step_figures([broken], FIRST, NAMES)
    for name in ("entropy", "kl", "engine/logprob_diff_mean", "engine/logprob_diff_max", "entropy/red"):
        assert math.isnan(found[name]), name
    assert math.isfinite(found["entropy/green"])


def test_a_domain_of_empty_responses_has_no_token_means() -> None:
    groups = [group(0, [4, 2], [1.0, 0.0]), group(1, [0, 0], [0.0, 0.0])]
    found = step_figures([report_of(groups)], groups, NAMES)
    assert math.isnan(found["entropy/green"])
    assert found["response_tokens/green"] == 0.0
    assert found["entropy"] == found["entropy/red"] == pytest.approx((4 * entropy_of(0) + 2 * entropy_of(1)) / 6)


def test_a_step_whose_groups_all_failed_has_figures_without_values() -> None:
    found = step_figures([], [FAILED], NAMES)
    assert found["groups/errors"] == found["errors/green"] == 1.0
    for name in ("reward/mean", "reward/green", "entropy", "kl/green", "engine/logprob_diff_max", "signal"):
        assert math.isnan(found[name]), name


def test_rollouts_that_no_report_holds_are_a_mistake_of_ours() -> None:
    with pytest.raises(AssertionError, match="other rollouts"):
        step_figures([report_of(FIRST)], COLLECTED, NAMES)


def test_positives_are_rows_of_the_same_minibatch() -> None:
    """Correct ones of other domains, for each correct rollout; in every minibatch rows count from 0."""
    for groups in (
        [group(2, [5, 6], [1.0, 0.0]), group(0, [1, 2], [1.0, 1.0])],
        [group(1, [9, 8], [0.0, 1.0]), group(2, [3, 4], [1.0, 0.0]), group(0, [7, 1], [0.0, 1.0])],
    ):
        rows = rollout_rows(report_of(groups), NAMES, prompts=[f"prompt {number}" for number in range(len(groups))])
        assert [row["row"] for row in rows] == list(range(2 * len(groups)))
        for row in rows:
            others = {other["domain"] for other in rows if other["reward"] == 1.0} - {row["domain"]}
            positives = [rows[number] for number in row["positives"]]
            assert all(positive["reward"] == 1.0 for positive in positives)
            assert [p["domain"] for p in positives].count(row["domain"]) == 0
            assert {p["domain"] for p in positives} == (others if row["reward"] == 1.0 else set())


def test_a_row_says_what_was_asked_answered_and_learned() -> None:
    rows = rollout_rows(report_of(FIRST), NAMES, prompts=["red?", "green?"])
    assert rows[2] == {
        "row": 2,
        "domain": "green",
        "source": "made",
        "index": 2,
        "prompt": "green?",
        "completion": "1:10",
        "stop_reason": "stop",
        "answer": "42",
        "reward": 1.0,
        "advantage": pytest.approx(math.sqrt(0.5), rel=1e-4),
        "version": 3,
        "positives": [0],
    }
    assert rows[1]["stop_reason"] == "length"
