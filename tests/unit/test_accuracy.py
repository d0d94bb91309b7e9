"""avg@k, pass@k, maj@k against closed forms and brute force, intervals against simulated data, transfer by hand.

Not covered here: how responses become items (test_evaluate).
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest

from megatron_mcpo.data.domains import Domain
from megatron_mcpo.reporting.accuracy import (
    Item,
    accuracy_metrics,
    backward_transfer,
    bootstrap_means,
    domain_accuracies,
    interval,
    majority_is_correct,
    mean_and_worst,
    pass_at_k,
)
from megatron_mcpo.trainer.evaluation import left_out
from tests.support.scoring import group


def item(answers: str, right: str) -> Item:
    """One letter a response, a dot for one without an answer; those in `right` are correct."""
    return Item(correct=tuple(a in right for a in answers), answers=tuple(a.strip(".") for a in answers))


@pytest.mark.parametrize("num_samples", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_response(num_samples: int) -> None:
    for num_correct, k in itertools.product(range(num_samples + 1), range(1, num_samples + 1)):
        responses = [True] * num_correct + [False] * (num_samples - num_correct)
        subsets = list(itertools.combinations(responses, k))
        assert pass_at_k(num_samples, num_correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_pass_at_k_of_one_response_is_the_mean_and_of_all_whether_any_is_correct() -> None:
    assert [pass_at_k(5, c, 1) for c in range(6)] == pytest.approx([c / 5 for c in range(6)])
    assert [pass_at_k(5, c, 5) for c in range(6)] == [0, 1, 1, 1, 1, 1]
    assert pass_at_k(1000, 1, 500) == pytest.approx(0.5, rel=1e-12), "of numbers with 300 digits"


def test_pass_at_k_is_unbiased() -> None:
    """Its mean over samples of 6 responses, each correct with chance p, is that of 3 responses: 1 - (1 - p)^3."""
    p, n, k = 0.3, 6, 3
    mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
    assert mean == pytest.approx(1 - (1 - p) ** k, rel=1e-12)


@pytest.mark.parametrize(
    ("answers", "right", "expected"),
    [
        ("aab", "a", True),
        ("aab", "b", False),
        ("abc", "a", True),
        ("bac", "a", False),
        ("abba", "a", True),
        ("baab", "a", False),
        ("....a", "a", True),
        ("....", "a", False),
        (".bb.a", "a", False),
    ],
)
def test_the_most_frequent_answer_wins_and_of_equals_the_first(answers: str, right: str, expected: bool) -> None:
    assert majority_is_correct(item(answers, right)) is expected


def test_where_equal_answers_are_judged_differently_the_first_counts() -> None:
    assert majority_is_correct(Item(correct=(True, False), answers=("a", "a")))
    assert not majority_is_correct(Item(correct=(False, True), answers=("a", "a")))


def test_metrics_of_two_domains() -> None:
    found = accuracy_metrics({"sums": [item("aabc", "a"), item("xxyz", "y")], "logic": [item("nnnn", "n")]})
    assert list(found)[:4] == ["sums", "logic", "mean", "worst"]
    assert (found["sums"], found["logic"], found["mean"], found["worst"]) == (0.375, 1.0, 0.6875, 0.375)
    assert (found["items/sums"], found["items/logic"]) == (2, 1)
    assert found["pass_at_2/sums"] == pytest.approx((5 / 6 + 3 / 6) / 2)
    assert found["pass_at_2/mean"] == pytest.approx((found["pass_at_2/sums"] + 1) / 2)
    assert (found["pass_at_4/sums"], found["maj_at_4/sums"], found["maj_at_4/mean"]) == (1.0, 0.5, 0.75)
    for measure in ("accuracy", "pass_at_2", "pass_at_4", "maj_at_4"):
        for name in ("sums", "logic", "mean"):
            value = found[name] if measure == "accuracy" else found[f"{measure}/{name}"]
            assert found[f"{measure}_low/{name}"] <= value <= found[f"{measure}_high/{name}"]
    assert "pass_at_1/sums" not in found and "pass_at_3/sums" not in found
    assert domain_accuracies({"step": 3, **found}) == {"sums": 0.375, "logic": 1.0}


def test_of_one_response_there_is_nothing_but_accuracy() -> None:
    found = accuracy_metrics({"sums": [item("a", "a"), item("b", "a")]})
    assert found["sums"] == 0.5
    assert not [key for key in found if key.startswith(("pass_at", "maj_at"))]
    six = accuracy_metrics({"sums": [item("abcdef", "a")]})
    assert {key for key in six if key.endswith("/sums") and key.startswith("pass_at") and "_low" not in key} >= {
        "pass_at_2/sums", "pass_at_4/sums", "pass_at_6/sums",
    }  # fmt: skip


def test_a_domain_without_items_is_not_a_number_and_hides_no_other() -> None:
    found = accuracy_metrics({"sums": [item("a", "a")], "logic": []})
    assert found["sums"] == 1.0
    for key in ("logic", "mean", "worst", "accuracy_low/logic", "accuracy_high/mean"):
        assert math.isnan(found[key]), key
    values = mean_and_worst({"a": 0.5, "b": math.nan, "c": 0.1})
    assert math.isnan(values["mean"]) and math.isnan(values["worst"])


def test_bounds_depend_on_the_domain_alone_and_are_the_same_every_time() -> None:
    sums, logic = [item("a", "a"), item("b", "a"), item("b", "a")], [item("a", "a"), item("b", "a")]
    both, turned = (
        accuracy_metrics({"sums": sums, "logic": logic}),
        accuracy_metrics({"logic": logic, "sums": sums[::-1]}),
    )
    assert {key: turned[key] for key in both} == both
    assert accuracy_metrics({"sums": sums})["accuracy_high/sums"] == both["accuracy_high/sums"]


def test_resampled_means_are_those_of_drawing_items_one_by_one() -> None:
    """Mean and deviation of the bootstrap's distribution have closed forms: those of the items' mean."""
    values = [0.0, 0.25, 0.25, 1.0, 0.5, 0.75, 0.0, 0.0]
    means_B = bootstrap_means(values, seed=[7])
    assert means_B.mean() == pytest.approx(np.mean(values), abs=0.005)
    assert means_B.std() == pytest.approx(np.std(values) / math.sqrt(len(values)), rel=0.05)
    drawn = np.random.default_rng(1).choice(values, size=(10_000, len(values))).mean(axis=1)
    assert interval(means_B) == pytest.approx(interval(drawn), abs=0.03)


def coverage(draw: Sequence[np.ndarray], truth: float) -> float:
    """Share of the simulated sets of items whose interval holds the truth."""
    held = [interval(bootstrap_means(values.tolist(), seed=[number])) for number, values in enumerate(draw)]
    return sum(low <= truth <= high for low, high in held) / len(held)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """300 sets of 100 items of uneven difficulty with 4 responses each; 95 % of 300 has a deviation of 1.3 %."""
    generator = np.random.default_rng(0)
    chance = generator.beta(1.0, 2.0, size=(300, 100))
    sets = generator.binomial(4, chance) / 4
    assert 0.90 <= coverage(sets, truth=1 / 3) <= 0.985
    # Beside an interval that is half as wide, which the bounds above would not let pass.
    narrow = [values.mean() + 0.98 * values.std() / 10 * np.array([-1, 1]) for values in sets]
    assert sum(low <= 1 / 3 <= high for low, high in narrow) / 300 < 0.8


def test_backward_transfer() -> None:
    transfer = backward_transfer(
        {"sums": 0.5, "logic": 0.25, "code": 0.5, "new": 1.0, "lost": math.nan},
        {"sums": 0.25, "logic": 0.75, "code": 0.5, "old": 0.0, "lost": 0.5},
    )
    assert transfer.change == {"sums": 0.25, "logic": -0.5, "code": 0.0}
    assert transfer.mean == pytest.approx(-0.25 / 3)
    assert transfer.forgetting == pytest.approx(0.5 / 3)
    assert transfer.fell == ("logic",)
    assert math.isnan(backward_transfer({"a": 1.0}, {"b": 1.0}).mean)


def test_null_in_a_file_is_not_known() -> None:
    row = {"step": 2, "sums": 0.5, "logic": None, "mean": None, "worst": None, "items/sums": 4.0}
    found = domain_accuracies(row)
    assert found["sums"] == 0.5 and math.isnan(found["logic"]) and len(found) == 2


def test_items_that_could_not_be_verified_are_counted_in_a_line() -> None:
    held_out = (group("any").prompt,) * 4
    domains = [Domain(name=name, sources=(), held_out=held_out, notes=()) for name in ("algebra", "words")]
    assert left_out({"items/algebra": 4.0, "items/words": 4.0}, domains) == []
    assert left_out({"items/algebra": 4.0, "items/words": 1.0}, domains) == [
        "WARNING: the verifier failed on 3 of 8 held-out items, which the accuracies leave out (words 3)"
    ]
