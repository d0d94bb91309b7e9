"""Compute the metrics of a step, which metric_table.py describes, and the rows of the rollout dump.

Shape legend: megatron_mcpo.types.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_mcpo.algo.contrastive import Contrast
from megatron_mcpo.algo.policy_loss import kl_estimate
from megatron_mcpo.reporting.metric_table import SECTIONS
from megatron_mcpo.reporting.pair_metrics import pair_metrics
from megatron_mcpo.reporting.selection import COLUMNS, Selection, mean
from megatron_mcpo.types import RolloutGroup, RolloutLabels, Scores, TrainBatch

_DOMAIN = "<domain>"


@dataclass(frozen=True, kw_only=True)
class BatchReport:
    """Everything that one optimizer step reports of the groups it learned from.

    texts: of each group's completions, on the rank that logs; empty on the others
    stats_MK: see `rollout_stats`; K = len(COLUMNS)
    metrics: of the update; diagnosis: gradients of the terms, in the steps that measure them
    """

    groups: Sequence[RolloutGroup]
    advantages_M: Tensor
    stats_MK: Tensor
    z_MD: Tensor | None
    contrast: Contrast | None
    labels: RolloutLabels
    num_tokens: int
    metrics: Mapping[str, float]
    diagnosis: Mapping[str, float] = field(default_factory=dict)
    texts: Sequence[Sequence[str]] = ()


def rollout_stats(batch: TrainBatch, old: Scores, reference_logp_R: Tensor | None) -> Tensor:
    """Return COLUMNS of this rank's rollouts: [N, K] fp32; kl is 0 without a reference, an empty response has zeros."""
    logp_R = old.logp_R
    kl_R = torch.zeros_like(logp_R) if reference_logp_R is None else kl_estimate(logp_R, reference_logp_R)
    mismatch_R = (logp_R - batch.engine_logp_R.to(logp_R.device)).abs()
    rollout_R = batch.rollout_R.to(logp_R.device)
    zero_N = torch.zeros(len(batch), device=logp_R.device)
    sums = [zero_N.index_add(0, rollout_R, values_R) for values_R in (old.entropy_R, kl_R, mismatch_R)]
    return torch.stack([*sums, zero_N.scatter_reduce(0, rollout_R, mismatch_R, "amax")], dim=1)


def step_metrics(
    reports: Sequence[BatchReport], sampled: Sequence[RolloutGroup], domain_names: Sequence[str]
) -> dict[str, float]:
    """Return the metrics of a step, except those of its work (time, tokens, memory, resampling).

    Metrics of a domain that has no group in this step are left out.

    Args:
        reports: the optimizer steps of the step
        sampled: all groups; the reports hold those of them that were trained on
        domain_names: in the order of the prompts' domain numbers
    """
    trained = {id(group) for report in reports for group in report.groups}
    assert trained <= {id(group) for group in sampled}, "the reports hold other groups than those sampled"
    metrics = _mean_of([report.metrics for report in reports])
    metrics |= _computed(_select(reports, sampled, domain=None), name=None)
    for number, name in enumerate(domain_names):
        if any(group.prompt.domain == number for group in sampled):
            metrics |= _computed(_select(reports, sampled, domain=number), name=name)
    return metrics | _mean_of_known([{**_pair_metrics(report, domain_names), **report.diagnosis} for report in reports])


def rollout_rows(report: BatchReport, domain_names: Sequence[str], prompts: Sequence[str]) -> list[dict[str, Any]]:
    """Return one row per rollout of one optimizer step, for people to read.

    row: number of the rollout in this optimizer step, from 0; unique together with the file's `minibatch`
    group: number of its prompt in this optimizer step
    positives: `row` numbers of the rollout's first 64 cross-domain positives; empty where it is not an anchor, and
        where the contrastive terms are off
    num_positives, num_in_domain, num_negatives: number of its cross-domain positives, in-domain positives, and
        negatives; 0 where it is not an anchor of the term (negatives: of either term)
    source, index: identify the item across runs
    versions: of the weights that sampled it, each with its number of tokens, in order

    Args:
        report: of the optimizer step
        domain_names: in the order of the prompts' domain numbers
        prompts: the text of each group's prompt
    """
    rows: list[dict[str, Any]] = []
    contrast = report.contrast
    listed = contrast.listed_ML.where(contrast.valid_cross_domain_M[:, None], -1).tolist() if contrast else None
    counts = _pair_counts(contrast, len(report.labels))
    for number, (group, prompt, texts) in enumerate(zip(report.groups, prompts, report.texts, strict=True)):
        for sample, (outline, text) in enumerate(zip(group.outlines, texts, strict=True)):
            row = len(rows)
            rows.append(
                {
                    "row": row,
                    "group": number,
                    "domain": domain_names[group.prompt.domain],
                    "source": group.prompt.source,
                    "index": group.prompt.index,
                    "prompt": prompt,
                    "completion": text,
                    "stop_reason": outline.stop_reason.value,
                    "answer": group.prompt.entry.get("answer"),
                    "reward": group.rewards[sample],
                    "correct": group.correct[sample],
                    "advantage": float(report.advantages_M[row]),
                    "versions": [list(run) for run in outline.versions],
                    "positives": [column for column in listed[row] if column >= 0] if listed else [],
                    **{name: column[row] for name, column in counts.items()},
                }
            )
    return rows


def _pair_counts(contrast: Contrast | None, num_rollouts: int) -> dict[str, list[int]]:
    """Return the counts that `rollout_rows` gives of every rollout."""
    if contrast is None:
        return {f"num_{name}": [0] * num_rollouts for name in ("positives", "in_domain", "negatives")}
    return {
        "num_positives": (contrast.positives_cross_domain_M * contrast.valid_cross_domain_M).tolist(),
        "num_in_domain": (contrast.positives_in_domain_M * contrast.valid_in_domain_M).tolist(),
        "num_negatives": contrast.negatives_M.tolist(),
    }


def _computed(rollouts: Selection, *, name: str | None) -> dict[str, float]:
    """Compute the metrics of a domain, or without a name those of the whole step; those that are None are left out."""
    rows = [(key, row.compute) for section in SECTIONS for row in section.metrics for key in row.keys if row.compute]
    found = {
        key.replace(_DOMAIN, name or ""): compute(rollouts)
        for key, compute in rows
        if (_DOMAIN in key) == (name is not None)
    }
    return {key: value for key, value in found.items() if value is not None}


def _select(reports: Sequence[BatchReport], sampled: Sequence[RolloutGroup], *, domain: int | None) -> Selection:
    """Select the rollouts of a domain, or those of all domains."""
    rows_of = [_rows_of(report.groups, domain) for report in reports]
    stats = [r.stats_MK.cpu()[rows] for r, rows in zip(reports, rows_of, strict=True)]
    trained = [g for r in reports for g in r.groups if domain is None or g.prompt.domain == domain]
    pairs = [(r.contrast, rows) for r, rows in zip(reports, rows_of, strict=True) if r.contrast]
    cross_domain = [(c.positives_cross_domain_M * c.valid_cross_domain_M).cpu()[rows] for c, rows in pairs]
    in_domain = [(c.positives_in_domain_M * c.valid_in_domain_M).cpu()[rows] for c, rows in pairs]
    return Selection(
        sampled=[g for g in sampled if domain is None or g.prompt.domain == domain],
        stats_MK=torch.cat([torch.zeros(0, len(COLUMNS)), *stats]),
        num_tokens=sum(outline.num_tokens for g in trained for outline in g.outlines),
        cross_domain_M=torch.cat(cross_domain) if pairs else None,
        in_domain_M=torch.cat(in_domain) if pairs else None,
        num_updates=len(pairs),
    )


def _pair_metrics(report: BatchReport, domain_names: Sequence[str]) -> dict[str, float]:
    """Return the metrics of one optimizer step's pairs; none where the contrastive terms are off."""
    if report.z_MD is None or report.contrast is None:
        return {}
    return pair_metrics(report.z_MD, report.labels.to(report.z_MD.device), report.contrast, domain_names)


def _rows_of(groups: Sequence[RolloutGroup], domain: int | None) -> Tensor:
    """Return the positions of a domain's rollouts among those of these groups."""
    domains = torch.tensor([g.prompt.domain for g in groups for _ in g.outlines], dtype=torch.int64)
    return torch.arange(len(domains)) if domain is None else (domains == domain).nonzero().squeeze(1)


def _mean_of(dicts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of every key, NaN where one value is."""
    return {key: mean([values[key] for values in dicts]) for key in dicts[0]} if dicts else {}


def _mean_of_known(dicts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return means over the values that are not NaN; a metric without such a value is left out."""
    known: dict[str, list[float]] = {}
    for key, value in (item for values in dicts for item in values.items()):
        if not math.isnan(value):
            known.setdefault(key, []).append(value)
    return {key: mean(values) for key, values in known.items()}
