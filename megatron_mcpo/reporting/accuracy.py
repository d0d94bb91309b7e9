"""Measure held-out accuracy from verified responses: avg@k, pass@k, maj@k, intervals, and transfer between runs.

metric_table.EVALUATION describes the metrics. Shapes: I items of a domain, B resamples. Imports no torch.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.95
NUM_RESAMPLES = 10_000
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Item:
    """The k verified responses to a held-out item, in the order they were sampled in.

    answers: what each response answers, "" where it gives no answer; equal answers count as the same in a vote
    """

    correct: tuple[bool, ...]
    answers: tuple[str, ...]


def accuracy_metrics(items: Mapping[str, Sequence[Item]]) -> dict[str, float]:
    """Return the metrics of `metric_table.EVALUATION` from the items of every domain; all have the same k."""
    counts = {len(item.correct) for of_domain in items.values() for item in of_domain}
    assert items and len(counts) <= 1, f"items with different numbers of responses: {sorted(counts)}"
    k = max(counts, default=1)
    measures = {"accuracy": {name: [share(item.correct) for item in of] for name, of in items.items()}}
    for few in _fewer(k):
        measures[f"pass_at_{few}"] = {
            name: [pass_at_k(len(item.correct), sum(item.correct), few) for item in of] for name, of in items.items()
        }
    if k > 1:
        measures[f"maj_at_{k}"] = {
            name: [float(majority_is_correct(item)) for item in of] for name, of in items.items()
        }
    accuracies = {name: mean(values) for name, values in measures["accuracy"].items()}
    found = {**accuracies, **mean_and_worst(accuracies)}
    found |= {f"items/{name}": float(len(of)) for name, of in items.items()}
    for measure, values in measures.items():
        found |= _with_bounds(measure, values)
    return found


def share(correct: Sequence[bool]) -> float:
    """Return avg@k of one item."""
    return sum(correct) / len(correct)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return the unbiased chance that at least one of k responses is correct: 1 - C(n - c, k) / C(n, k).

    Of the n responses to an item c are correct; 1 <= k <= n (Chen et al. 2021, arXiv 2107.03374, equation 1).
    """
    assert 1 <= k <= num_samples and 0 <= num_correct <= num_samples, (num_samples, num_correct, k)
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def majority_is_correct(item: Item) -> bool:
    """Return maj@k of one item: whether its most frequent answer is correct (Wang et al. 2022, arXiv 2203.11171).

    Responses without an answer do not vote; without any vote the item is incorrect. A tie goes to the answer that was
    sampled first. If a verifier judges equal answers differently, the first of them counts.
    """
    votes = Counter(answer for answer in item.answers if answer)
    if not votes:
        return False
    # Counter keeps the order of first appearance, and max takes the first of equals.
    winner = max(votes, key=votes.__getitem__)
    return item.correct[item.answers.index(winner)]


def bootstrap_means(values_I: Sequence[float], seed: Iterable[int]) -> np.ndarray:
    """Return the means of NUM_RESAMPLES resamples of the items, drawn with replacement (Efron 1979): [B] float64.

    The number of times that a resample has each VALUE is multinomial, so no array of B x I is needed. NaN without
    items.
    """
    if not len(values_I):
        return np.full(NUM_RESAMPLES, np.nan)
    levels, counts = np.unique(np.asarray(values_I, dtype=np.float64), return_counts=True)
    generator = np.random.default_rng([_SEED, *seed])
    drawn = generator.multinomial(len(values_I), counts / len(values_I), size=NUM_RESAMPLES)
    means: np.ndarray = drawn @ levels / len(values_I)
    return means


def interval(means_B: np.ndarray) -> tuple[float, float]:
    """Return the percentile interval at LEVEL; NaN if a mean is NaN.

    If all items are correct, or all incorrect, the interval has no width and means nothing.
    """
    low, high = np.quantile(means_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mean_and_worst(accuracies: Mapping[str, float]) -> dict[str, float]:
    """Return the mean over domains, each counting the same, and the lowest; NaN if one of them is NaN."""
    values = list(accuracies.values())
    worst = math.nan if any(math.isnan(value) for value in values) else min(values)
    return {"mean": mean(values), "worst": worst}


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """The changes of accuracy from a baseline, over the domains that both know.

    change: by domain, now - baseline
    mean: backward transfer, the mean of these: R_T,i - R_i,i of Lopez-Paz & Ranzato (2017, arXiv 1706.08840, equation
        3), with the baseline's accuracy in the place of R_i,i and all domains counted, since none was learned last
    forgetting: mean over domains of what each of them fell by, a domain that rose counting as 0
    fell: the domains that did, in order
    """

    change: dict[str, float]
    mean: float
    forgetting: float
    fell: tuple[str, ...]


def backward_transfer(now: Mapping[str, float], baseline: Mapping[str, float]) -> Transfer:
    """Compare accuracies by domain, NaN if not known. Without a domain that both know, the means are NaN."""
    change = {name: now[name] - baseline[name] for name in now if name in baseline}
    change = {name: value for name, value in change.items() if not math.isnan(value)}
    return Transfer(
        change=change,
        mean=mean(list(change.values())),
        forgetting=mean([max(0.0, -value) for value in change.values()]),
        fell=tuple(name for name, value in change.items() if value < 0),
    )


def domain_accuracies(row: Mapping[str, Any]) -> dict[str, float]:
    """Return avg@k by domain from a line of eval.jsonl, where null is NaN."""
    return {
        key: math.nan if value is None else float(value)
        for key, value in row.items()
        if "/" not in key and key not in ("step", "mean", "worst")
    }


def _fewer(k: int) -> list[int]:
    """Return the K of pass_at_K: powers of two below k, and k."""
    return [2**power for power in range(1, k.bit_length()) if 2**power < k] + ([k] if k > 1 else [])


def _with_bounds(measure: str, values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return a measure by domain, and their mean, with interval bounds; accuracy itself is computed before."""
    # A domain's bounds depend on its own items alone, not on what other domains there are.
    resampled = {name: bootstrap_means(of_domain, seed=name.encode()) for name, of_domain in values.items()}
    means = {name: mean(of_domain) for name, of_domain in values.items()}
    resampled["mean"], means["mean"] = np.mean(list(resampled.values()), axis=0), mean(list(means.values()))
    found = {}
    for name, means_B in resampled.items():
        low, high = interval(means_B)
        if measure != "accuracy":
            found[f"{measure}/{name}"] = means[name]
        found |= {f"{measure}_low/{name}": low, f"{measure}_high/{name}": high}
    return found


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean, NaN without a value."""
    return math.fsum(values) / len(values) if values else math.nan
