"""The metrics of a step and the rows of the rollout dump, of rollouts of very different lengths, against closed forms.

Not covered: gathering over real ranks (test_parallel.py) and the metrics of its work, which the trainer adds.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from megatron_mcpo.algo.advantage import group_advantages
from megatron_mcpo.algo.contrastive import contrastive
from megatron_mcpo.algo.policy_loss import policy_loss
from megatron_mcpo.config.schema import AlgorithmConfig, ContrastiveConfig
from megatron_mcpo.data.batch import make_batch, rewards_of
from megatron_mcpo.reporting.accuracy import Item, accuracy_metrics
from megatron_mcpo.reporting.metric_table import EVALUATION, SECTIONS
from megatron_mcpo.reporting.selection import COLUMNS
from megatron_mcpo.reporting.step_metrics import BatchReport, rollout_rows, rollout_stats, step_metrics
from megatron_mcpo.types import Completion, Prompt, RolloutGroup, Scores, StopReason, TrainBatch

NAMES = ["red", "green", "blue"]
LOGP = -1.0
SETTINGS = ContrastiveConfig(top_k=2)


def group(domain: int, lengths: Sequence[int], rewards: Sequence[float], error: str | None = None) -> RolloutGroup:
    """A prompt of two tokens. The engine's log-probs: 0.5 off on the last token of every response, else exact."""
    completions = tuple(
        Completion(
            token_ids=(7,) * length,
            logprobs=(LOGP,) * (length - 1) + (LOGP - 0.5,) if length else (),
            stop_reason=StopReason.LENGTH if length > 50 else StopReason.STOP,
            versions=(3,) * length,
            text=f"{domain}:{length}",
        )
        for length in lengths
    )
    prompt = Prompt(domain=domain, source="made", index=len(lengths), token_ids=(1, 2), entry={"answer": "42"})
    return RolloutGroup(
        prompt=prompt,
        completions=completions,
        rewards=() if error else tuple(rewards),
        correct=() if error else tuple(reward == 1.0 for reward in rewards),
        error=error,
        timed_out=error == "timeout",
    )


def batch_of(groups: Sequence[RolloutGroup], *, data_rank: int = 0, num_data_ranks: int = 1) -> TrainBatch:
    return make_batch(
        groups,
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
    groups: Sequence[RolloutGroup],
    *,
    metrics: dict[str, float] | None = None,
    num_data_ranks: int = 1,
    contrastive_terms: ContrastiveConfig = SETTINGS,
    seed: int = 0,
) -> BatchReport:
    """A report as the trainer makes it; representations are random."""
    shares = [batch_of(groups, data_rank=rank, num_data_ranks=num_data_ranks) for rank in range(num_data_ranks)]
    labels = shares[0].labels
    stats_MK = torch.zeros(len(labels), len(COLUMNS))
    for share in shares:
        stats_MK[share.rows_N] = stats_of(share)
    z_MD = normalize(torch.randn(len(labels), 4, generator=torch.Generator().manual_seed(seed)), dim=1)
    return BatchReport(
        groups=groups,
        texts=[[completion.text for completion in group.completions] for group in groups],
        advantages_M=group_advantages(rewards_of(groups), labels.prompt_M, labels.domain_M),
        stats_MK=stats_MK,
        z_MD=z_MD if contrastive_terms.enabled else None,
        contrast=contrastive(z_MD, labels, contrastive_terms) if contrastive_terms.enabled else None,
        labels=labels,
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
def metrics() -> dict[str, float]:
    reports = [
        report_of(FIRST, metrics={"update/applied": 1.0, "grad_norm": 2.0}),
        report_of(SECOND, metrics={"update/applied": 0.0, "grad_norm": math.nan}),
    ]
    return step_metrics(reports, COLLECTED, NAMES)


@pytest.mark.parametrize(
    ("suffix", "difference", "rollouts"),
    [
        ("", "engine/logprob_diff_mean", RED + GREEN),
        ("/red", "engine/logprob_diff/red", RED),
        ("/green", "engine/logprob_diff/green", GREEN),
    ],
)
def test_entropy_kl_and_engine_difference_are_means_over_tokens(
    metrics: dict[str, float], suffix: str, difference: str, rollouts: list[tuple[int, int]]
) -> None:
    tokens = sum(length for _, length in rollouts)
    assert metrics[f"entropy{suffix}"] == pytest.approx(sum(n * entropy_of(i) for i, n in rollouts) / tokens)
    assert metrics[f"kl{suffix}"] == pytest.approx(sum(n * k3_of(i) for i, n in rollouts) / tokens, rel=1e-4)
    assert metrics[difference] == pytest.approx(0.5 * sum(n > 0 for _, n in rollouts) / tokens)


def test_metrics_of_rollouts_and_groups_leave_failed_groups_out_but_count_them(metrics: dict[str, float]) -> None:
    expected = {
        "engine/logprob_diff_max": 0.5,
        "response_tokens": 1114 / 6,
        "response_tokens/red": 1104 / 4,
        "response_tokens/green": 5.0,
        "truncated": 2 / 6,
        "truncated/red": 0.5,
        "nonzero_advantage": 2 / 3,
        "nonzero_advantage/red": 0.5,
        "nonzero_advantage/green": 1.0,
        "reward/red": 0.75,
        "reward/green": 0.5,
        "reward/mean": 0.625,
        "groups/errors": 1.0,
        "errors/red": 0.0,
        "errors/green": 1.0,
        "timeouts/red": 0.0,
        "timeouts/green": 1.0,
        "reward_std/red": 0.25,
        "reward_std/green": 0.5,
        "pass_rate/red": 0.75,
        "all_right/red": 0.5,
        "all_wrong/red": 0.0,
        "all_right/green": 0.0,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


def test_what_passed_is_not_read_from_the_rewards() -> None:
    """A penalty left a right answer with less than a wrong one got for its form."""
    penalized = replace(group(0, [1, 2], [0.1, 0.2]), correct=(True, False))
    wrong = replace(group(0, [3, 4], [0.2, 0.0]), correct=(False, False))
    broken = replace(group(1, [1, 1], [], error="KeyError"), timed_out=False)
    found = step_metrics([report_of([penalized, wrong])], [penalized, wrong, broken], NAMES)
    assert found["pass_rate/red"] == 0.25
    assert (found["all_right/red"], found["all_wrong/red"]) == (0.0, 0.5)
    assert found["reward_std/red"] == pytest.approx((0.05 + 0.1) / 2)
    assert (found["errors/green"], found["timeouts/green"]) == (1.0, 0.0)


def test_metrics_of_updates_are_means_over_them_and_not_finite_where_one_is_not(metrics: dict[str, float]) -> None:
    assert metrics["update/applied"] == 0.5
    assert math.isnan(metrics["grad_norm"])


def test_anchors_of_a_domain_are_a_mean_over_minibatches(metrics: dict[str, float]) -> None:
    # The first has a right rollout of red and one of green, each the other's positive; the second is all right.
    expected = {
        "contrast/positives_cross_domain": 1.0,
        "contrast/positives_in_domain": 0.0,
        "contrast/anchors/red": 0.5,
        "contrast/anchors/green": 0.5,
        "contrast/positives/red": 1.0,
    }
    assert {name: metrics[name] for name in expected} == expected


def test_gains_and_rankings_are_means_over_anchors_by_domain() -> None:
    """Of a step in which red has an in-domain pair; the figures of each rollout are those of algo/."""
    report = report_of([group(0, [1, 2, 3], [1.0, 1.0, 0.0]), group(1, [1, 2], [1.0, 0.0])])
    found = step_metrics([report], report.groups, NAMES)
    contrast = report.contrast
    assert contrast is not None and report.z_MD is not None
    chance = math.log(1 + 2)  # two incorrect rollouts
    red = [chance - contrast.loss_cross_domain_M[i].item() for i in (0, 1)]
    green = chance - contrast.loss_cross_domain_M[3].item()
    assert found["contrast/gain_cross_domain/red"] == pytest.approx(sum(red) / 2)
    assert found["contrast/gain_cross_domain/green"] == pytest.approx(green)
    assert found["contrast/gain_cross_domain"] == pytest.approx((sum(red) + green) / 3)
    assert found["contrast/gain_in_domain"] == found["contrast/gain_in_domain/red"]
    assert found["contrast/gain_in_domain"] == pytest.approx(chance - contrast.loss_in_domain)
    assert "contrast/gain_in_domain/green" not in found, "green has one correct rollout"
    similarity = (report.z_MD @ report.z_MD.T).tolist()
    wins = [similarity[3][j] > similarity[3][n] for j in (0, 1) for n in (2, 4)]
    assert found["contrast/auc_cross_domain/green"] == pytest.approx(sum(wins) / 4)
    own = [similarity[3][j] > similarity[3][4] for j in (0, 1)]
    assert found["contrast/auc_own_prompt/green"] == pytest.approx(sum(own) / 2)


def test_without_a_wrong_rollout_there_are_no_anchors() -> None:
    right = [group(0, [1, 2], [1.0, 1.0]), group(1, [3, 4], [1.0, 1.0])]
    made = report_of(right)
    found = step_metrics([made], right, NAMES)
    for name in ("positives_cross_domain", "positives_in_domain", "anchors/red", "positives/red"):
        assert found[f"contrast/{name}"] == 0.0, name
    left_out = ["contrast/negatives", "contrast/positives/red/green", "contrast/positives/green/red"]
    left_out += [f"contrast/negatives/{a}/{b}" for a in ("red", "green") for b in ("red", "green")]
    assert found.keys().isdisjoint(left_out)
    assert "contrast/similarity/red/red" in found, "what is similar is known without an anchor"


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def pair_metrics_by_loops(made: BatchReport, groups: Sequence[RolloutGroup], options: ContrastiveConfig) -> dict:
    """What one optimizer step has to say of pairs, from the definitions; NaN where there is none."""
    rows = [(g.prompt.domain, number, r == 1.0) for number, g in enumerate(groups) for r in g.rewards]
    assert made.z_MD is not None
    z = made.z_MD.double()
    right = [i for i, (_, _, correct) in enumerate(rows) if correct]
    domains = sorted({domain for domain, _, _ in rows})

    def similarity(i: int, j: int) -> float:
        return (z[i] @ z[j]).item()

    def against(i: int, *, of: Sequence[int] = range(3)) -> int:
        column = {"pool": None, "domain": 0, "prompt": 1}[options.negatives]
        wrong = [row for row in rows if not row[2] and row[0] in of]
        return sum(column is None or row[column] == rows[i][column] for row in wrong)

    def lent(i: int, other: int) -> int:
        return min(options.top_k, sum(rows[j][0] == other for j in right)) if other != rows[i][0] else 0

    sharing = [i for i in right if against(i) and any(lent(i, d) for d in domains)]
    pulled = [i for i in right if against(i) and any(j != i and rows[j][0] == rows[i][0] for j in right)]
    same = [(i, j) for i in right for j in right if i != j and rows[i][0] == rows[j][0]]
    every = [(i, j) for i in range(len(rows)) for j in range(len(rows)) if i != j]
    anchors = sorted({*sharing, *pulled})
    metrics = {
        "contrast/negatives": mean([against(i) for i in anchors]),
        "contrast/alignment": mean([2 - 2 * similarity(i, j) for i, j in same]),
        "contrast/uniformity": math.log(mean([math.exp(4 * similarity(i, j) - 4) for i, j in every])),
    }
    for a in domains:
        for b in domains:
            names = f"{NAMES[a]}/{NAMES[b]}"
            metrics[f"contrast/negatives/{names}"] = mean([against(i, of=[b]) for i in anchors if rows[i][0] == a])
            if a != b:
                metrics[f"contrast/positives/{names}"] = mean([lent(i, b) for i in sharing if rows[i][0] == a])
            if a <= b:
                pairs = [(i, j) for i in right for j in right if i != j and (rows[i][0], rows[j][0]) == (a, b)]
                metrics[f"contrast/similarity/{names}"] = mean([similarity(i, j) for i, j in pairs])
    return metrics


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 2), st.lists(st.booleans(), min_size=3, max_size=3)), min_size=1, max_size=4),
        min_size=1,
        max_size=2,
    ),
    st.sampled_from(["pool", "domain", "prompt"]),
    st.integers(0, 1000),
)
def test_metrics_of_pairs_are_what_loops_find_in_the_mean_over_minibatches(
    minibatches: list[list[tuple[int, list[bool]]]], negatives: Literal["pool", "domain", "prompt"], seed: int
) -> None:
    options = ContrastiveConfig(top_k=2, negatives=negatives)
    parts = [[group(d, [1, 2, 3], [float(r) for r in right]) for d, right in part] for part in minibatches]
    reports = [report_of(part, contrastive_terms=options, seed=seed + i) for i, part in enumerate(parts)]
    found = step_metrics(reports, [g for part in parts for g in part], NAMES)
    loops = [pair_metrics_by_loops(made, part, options) for made, part in zip(reports, parts, strict=True)]
    expected = {
        name: mean(known)
        for name in {name for metrics in loops for name in metrics}
        if (known := [metrics[name] for metrics in loops if name in metrics and not math.isnan(metrics[name])])
    }
    kinds = ["negatives", "alignment", "uniformity"]
    kinds += [f"{of_domains}/[a-z]+/[a-z]+" for of_domains in ("negatives", "positives", "similarity")]
    of_pairs = {name: v for name, v in found.items() if re.fullmatch(f"contrast/({'|'.join(kinds)})", name)}
    assert of_pairs == pytest.approx(expected, abs=1e-5)


def test_gradients_of_the_terms_are_means_over_the_updates_like_all_metrics_of_theirs() -> None:
    reports = [
        report_of(part, metrics={"gradient/cos_cross_domain": value}) for part, value in ((FIRST, 0.5), (SECOND, -0.25))
    ]
    assert step_metrics(reports, COLLECTED, NAMES)["gradient/cos_cross_domain"] == 0.125


def test_without_contrastive_terms_there_is_no_metric_of_pairs() -> None:
    off = ContrastiveConfig(cross_domain_weight=0.0, in_domain_weight=0.0)
    made = report_of(FIRST, contrastive_terms=off)
    assert not [name for name in step_metrics([made], FIRST, NAMES) if name.startswith("contrast/")]
    assert [row["positives"] for row in rollout_rows(made, NAMES, prompts=["", ""])] == [[]] * 4


def test_a_domain_that_is_absent_has_no_metric(metrics: dict[str, float]) -> None:
    assert not [name for name in metrics if "blue" in name]
    assert "reward/red" in metrics


def test_the_table_describes_what_a_step_and_an_evaluation_have(metrics: dict[str, float]) -> None:
    rows = [row for section in SECTIONS for row in section.metrics]
    keys = [key for row in rows for key in row.keys]
    assert len(keys) == len(set(keys)), "described twice"
    assert all(row.meaning.endswith(".") for row in [*rows, *EVALUATION.metrics])
    found = {re.sub("/(red|green)$", "/<domain>", re.sub("/(red|green)/(red|green)$", "/<a>/<b>", m)) for m in metrics}
    assert found <= set(keys), found - set(keys)
    no_anchor = {"contrast/gain_in_domain/<domain>"}
    assert {key for key in keys if "<" in key} - no_anchor <= found, "described, but not there"
    items = {name: [Item(correct=(True, False), answers=("a", "b"))] for name in ("red", "green")}
    evaluated = {re.sub("(red|green)$", "<domain>", key) for key in accuracy_metrics(items)}
    described = {re.sub("<k>|<K>", "2", key) for row in EVALUATION.metrics for key in row.keys}
    probe = {key for key in described if key.startswith("contrast/probe_")}  # held against a run's in test_probe
    assert evaluated == described - probe


def test_the_metrics_are_the_same_for_any_number_of_ranks(metrics: dict[str, float]) -> None:
    divided = [report_of(FIRST, num_data_ranks=3), report_of(SECOND, num_data_ranks=3)]
    again = step_metrics(divided, COLLECTED, NAMES)
    for name, value in again.items():
        assert value == pytest.approx(metrics[name], rel=1e-6), name


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
        weights_R=torch.full_like(logp_R, 1 / batch.num_response_tokens),
        rollout_R=batch.rollout_R,
        num_tokens=batch.num_response_tokens,
        settings=AlgorithmConfig(kl_weight=0.25),
    )
    total = rollout_stats(batch, old, ref_logp_R)[:, 1].sum().item()
    assert 0.25 * total / batch.num_response_tokens == pytest.approx(term.metrics["loss/kl"].item(), rel=1e-5)
    assert not rollout_stats(batch, old, None)[:, 1].any(), "no reference, no KL"


def test_a_difference_that_is_not_a_number_is_not_hidden() -> None:
    broken = report_of(FIRST)
    broken.stats_MK[1] = math.nan
    found = step_metrics([broken], FIRST, NAMES)
    for name in ("entropy", "kl", "engine/logprob_diff_mean", "engine/logprob_diff_max", "entropy/red"):
        assert math.isnan(found[name]), name
    assert math.isfinite(found["entropy/green"])


def test_a_domain_of_empty_responses_has_no_token_means() -> None:
    groups = [group(0, [4, 2], [1.0, 0.0]), group(1, [0, 0], [0.0, 0.0])]
    found = step_metrics([report_of(groups)], groups, NAMES)
    assert math.isnan(found["entropy/green"])
    assert found["response_tokens/green"] == 0.0
    assert found["entropy"] == found["entropy/red"] == pytest.approx((4 * entropy_of(0) + 2 * entropy_of(1)) / 6)


def test_replaced_groups_count_in_what_was_sampled_not_in_what_was_trained_on() -> None:
    """Else a domain that is mastered, or whose verifier fails, would look as if it were not."""
    easy = group(0, [7, 7], [1.0, 1.0])
    found = step_metrics([report_of(FIRST)], [*FIRST, easy, FAILED], NAMES)
    without = step_metrics([report_of(FIRST)], FIRST, NAMES)
    assert found["errors/green"] == found["groups/errors"] == 1.0
    assert (found["pass_rate/red"], found["reward/red"], found["all_right/red"]) == (0.75, 0.75, 0.5)
    assert (without["pass_rate/red"], without["all_right/red"]) == (0.5, 0.0)
    for name in ("entropy", "kl/red", "engine/logprob_diff_mean", "engine/logprob_diff/red"):
        assert found[name] == without[name]


def test_a_step_whose_groups_all_failed_has_metrics_without_values() -> None:
    found = step_metrics([], [FAILED], NAMES)
    assert found["groups/errors"] == found["errors/green"] == 1.0
    for name in ("reward/mean", "reward/green", "entropy", "kl/green", "engine/logprob_diff_max", "nonzero_advantage"):
        assert math.isnan(found[name]), name


def test_groups_that_were_not_sampled_are_a_mistake_of_ours() -> None:
    with pytest.raises(AssertionError, match="other groups"):
        step_metrics([report_of(SECOND)], FIRST, NAMES)


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
        "group": 1,
        "domain": "green",
        "source": "made",
        "index": 2,
        "prompt": "green?",
        "completion": "1:10",
        "stop_reason": "stop",
        "answer": "42",
        "reward": 1.0,
        "correct": True,
        "advantage": pytest.approx(math.sqrt(0.5), rel=1e-4),
        "versions": [[3, 10]],
        "positives": [0],
        "num_positives": 1,
        "num_in_domain": 0,
        "num_negatives": 2,
    }
    assert [rows[1][name] for name in ("correct", "num_positives", "num_negatives")] == [False, 0, 0]
    assert rows[1]["stop_reason"] == "length"
