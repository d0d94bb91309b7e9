"""What a step tells: the figures of metrics.jsonl, the rows of the rollout dump. Shape legend: megatron_mcpo.types.

Of all rollouts that were sampled, also of those that dynamic sampling then replaced. Those with * are also there as
NAME/<domain>. Groups whose verifier failed count as errors and nowhere else; a mean over nothing is NaN.
  reward/<domain>            mean over rollouts
  reward/mean                mean over the domains of the step, each counting the same; NaN when one is
  reward_std/<domain>        standard deviation of the rewards within a group (over G): mean over groups
  pass_rate/<domain>         share of rollouts whose answer passed, whatever form and length cost them
  all_right/<domain>, all_wrong/<domain>   share of groups of whose rollouts all passed, and none
  nonzero_advantage *                 share of groups whose rewards differ
  response_tokens *          mean over rollouts
  truncated *                share of rollouts that reached the response limit
  groups/errors              groups whose verifier failed; errors/<domain> by domain; timeouts/<domain> those of them
                             whose verifier took too long

Of the rollouts that were trained on, at the weights that sampled them.
  entropy *                  of the policy, in nats: mean over response tokens
  kl *                       k3 estimate of KL(policy || reference), in nats: mean over response tokens; 0 without one
  engine/logprob_diff_mean   |policy - engine| of the sampled token, in nats: mean over response tokens;
                             engine/logprob_diff/<domain> by domain
  engine/logprob_diff_max    the largest of these

Of the optimizer steps: means over them, where a step has several.
  loss/policy, loss/kl, clip_fraction, ratio, importance/weight, importance/capped   see algo.policy_loss.PolicyLoss
  loss/cross_domain, loss/in_domain                          contrastive terms without their weights, means over anchors
  contrast/anchors_cross_domain, contrast/anchors_in_domain  number of anchors
  contrast/anchors/<domain>                             number of the domain's rollouts that are one of either term
  contrast/positives_cross_domain, contrast/positives_in_domain   positives per anchor; contrast/positives/<domain>
                             those of the sharing term (of several optimizer steps: mean over all their anchors)
  contrast/negatives         negatives that an anchor of either term has; left out without an anchor
  contrast/negatives/<a>/<b>  those of them of domain b that an anchor of domain a has (also for a = b)
  contrast/positives/<a>/<b>  positives of domain b that a sharing anchor of domain a has; left out without an anchor
  contrast/similarity/<a>/<b>  mean similarity of correct rollouts of both domains (a = b: two different ones of one
                             domain), once for every two domains; left out where there is no pair
  contrast/alignment, contrast/uniformity   see algo.geometry; left out where there is no pair
  gradient/*                 see diagnose.term_gradients; only in the steps that measure it
  grad_norm                  before it is clipped; NaN where the update was not applied
  lr                         0 where the update was not applied
  update/applied             0 where the gradient was not finite, so that nothing moved; else 1

Of dynamic sampling (data.resample).
  resample/rounds            rounds of replacement that the step took
  resample/replaced          groups without signal that were replaced by others
  resample/prompts           prompts sampled altogether: those of the step, and the replacements

Of the work done.
  tokens/trained             prompt and response tokens, a prompt counted with each of its rollouts
  time/step                  seconds; parts of it: time/rollout, time/score, time/update, sync/seconds (new weights),
                             time/verify (engine.verify_sync), and time/diagnose in the steps that measure gradients
  sync/bytes                 bytes of the new weights that rank 0 received from other ranks; every worker of a
                             server gets a full copy besides
  memory/peak_gib            see memory.peak_memory_gib
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_mcpo.algo.contrastive import Contrast
from megatron_mcpo.algo.geometry import alignment, domain_similarity, uniformity
from megatron_mcpo.algo.policy_loss import kl_estimate
from megatron_mcpo.types import RolloutGroup, RolloutLabels, Scores, StopReason, TrainBatch

COLUMNS = ("entropy", "kl", "engine/logprob_diff", "engine/logprob_diff_max")
"""What `rollout_stats` says of a rollout: three sums over its response tokens, and a maximum."""


@dataclass(frozen=True, kw_only=True)
class BatchReport:
    """One optimizer step: the groups it learned from and what is known of them; stats_MK: K = len(COLUMNS)."""

    groups: Sequence[RolloutGroup]
    advantages_M: Tensor
    stats_MK: Tensor
    z_MD: Tensor | None
    contrast: Contrast | None
    labels: RolloutLabels
    num_tokens: int
    metrics: Mapping[str, float]
    diagnosis: Mapping[str, float] = field(default_factory=dict)


def rollout_stats(batch: TrainBatch, old: Scores, reference_logp_R: Tensor | None) -> Tensor:
    """COLUMNS of this rank's rollouts: [N, 4] fp32; kl is 0 without a reference, all are 0 for an empty response."""
    logp_R = old.logp_R
    kl_R = torch.zeros_like(logp_R) if reference_logp_R is None else kl_estimate(logp_R, reference_logp_R)
    mismatch_R = (logp_R - batch.engine_logp_R.to(logp_R.device)).abs()
    rollout_R = batch.rollout_R.to(logp_R.device)
    zero_N = torch.zeros(len(batch), device=logp_R.device)
    sums = [zero_N.index_add(0, rollout_R, values_R) for values_R in (old.entropy_R, kl_R, mismatch_R)]
    return torch.stack([*sums, zero_N.scatter_reduce(0, rollout_R, mismatch_R, "amax")], dim=1)


def step_figures(
    reports: Sequence[BatchReport], sampled: Sequence[RolloutGroup], domain_names: Sequence[str]
) -> dict[str, float]:
    """The figures of a step that the head of this file describes, but for those of the work done.

    sampled: all groups; the reports hold those of them that were trained on.
    The figures of a domain that had no group in this step are left out.
    """
    trained = {id(group) for report in reports for group in report.groups}
    assert trained <= {id(group) for group in sampled}, "the reports hold other groups than those sampled"
    figures = _mean_of([report.metrics for report in reports])
    figures["groups/errors"] = float(sum(group.error is not None for group in sampled))
    figures |= _figures_of(sampled, reports, domain=None, suffix="")
    for number, name in enumerate(domain_names):
        if any(group.prompt.domain == number for group in sampled):
            figures |= _figures_of(sampled, reports, domain=number, suffix=f"/{name}")
    figures |= _mean_of_known([{**_geometry(report, domain_names), **report.diagnosis} for report in reports])
    rewards = [figures[f"reward/{name}"] for name in domain_names if f"reward/{name}" in figures]
    figures["reward/mean"] = sum(rewards) / len(rewards) if rewards else float("nan")
    return figures


def rollout_rows(report: BatchReport, domain_names: Sequence[str], prompts: Sequence[str]) -> list[dict[str, Any]]:
    """A row a rollout of one optimizer step, for people to read. prompts: the text of each group's prompt.

    row: number of the rollout in this optimizer step, from 0: unique together with the file's `minibatch`
    group: number of its prompt in this optimizer step
    positives: the first 64 of the rollout's positives of the sharing term, as `row` numbers of the same minibatch;
    empty where it is no anchor, and where the contrastive terms are off
    num_positives, num_in_domain, num_negatives: how many positives it has of the sharing and of the consolidation
    term, and how many negatives; 0 where it is no anchor of the term (negatives: of either)
    source, index: name the item for good
    version: of the weights that it was sampled with
    """
    rows: list[dict[str, Any]] = []
    contrast = report.contrast
    listed = contrast.listed_ML.where(contrast.valid_cross_domain_M[:, None], -1).tolist() if contrast else None
    counts = _pair_counts(contrast, len(report.labels))
    for number, (group, prompt) in enumerate(zip(report.groups, prompts, strict=True)):
        for sample, completion in enumerate(group.completions):
            row = len(rows)
            rows.append(
                {
                    "row": row,
                    "group": number,
                    "domain": domain_names[group.prompt.domain],
                    "source": group.prompt.source,
                    "index": group.prompt.index,
                    "prompt": prompt,
                    "completion": completion.text,
                    "stop_reason": completion.stop_reason.value,
                    "answer": group.prompt.entry.get("answer"),
                    "reward": group.rewards[sample],
                    "correct": group.correct[sample],
                    "advantage": float(report.advantages_M[row]),
                    "version": completion.version,
                    "positives": [column for column in listed[row] if column >= 0] if listed else [],
                    **{name: column[row] for name, column in counts.items()},
                }
            )
    return rows


def _pair_counts(contrast: Contrast | None, num_rollouts: int) -> dict[str, list[int]]:
    """The counts of `rollout_rows`, of every rollout."""
    if contrast is None:
        return {f"num_{name}": [0] * num_rollouts for name in ("positives", "consolidated", "negatives")}
    return {
        "num_positives": (contrast.positives_cross_domain_M * contrast.valid_cross_domain_M).tolist(),
        "num_in_domain": (contrast.positives_in_domain_M * contrast.valid_in_domain_M).tolist(),
        "num_negatives": contrast.negatives_M.tolist(),
    }


def _figures_of(
    sampled: Sequence[RolloutGroup], reports: Sequence[BatchReport], *, domain: int | None, suffix: str
) -> dict[str, float]:
    groups = [g for g in sampled if domain is None or g.prompt.domain == domain]
    scored = [g for g in groups if g.error is None]
    completions = [c for g in scored for c in g.completions]
    selected = [_rows_of(report.groups, domain) for report in reports]
    stats = torch.cat(
        [torch.zeros(0, len(COLUMNS)), *(r.stats_MK.cpu()[rows] for r, rows in zip(reports, selected, strict=True))]
    )
    trained = [g for r in reports for g in r.groups if domain is None or g.prompt.domain == domain]
    num_tokens = sum(len(c.token_ids) for g in trained for c in g.completions)
    entropy, kl, mismatch = (stats[:, :3].double().sum(dim=0) / num_tokens).tolist()
    figures = {
        f"response_tokens{suffix}": _mean([len(c.token_ids) for c in completions]),
        f"truncated{suffix}": _mean([c.stop_reason is StopReason.LENGTH for c in completions]),
        f"nonzero_advantage{suffix}": _mean([g.has_nonzero_advantage for g in scored]),
        f"entropy{suffix}": entropy,
        f"kl{suffix}": kl,
    }
    if domain is None:
        figures["engine/logprob_diff_mean"] = mismatch
        figures["engine/logprob_diff_max"] = stats[:, 3].max().item() if num_tokens else float("nan")
    else:
        figures[f"errors{suffix}"] = float(len(groups) - len(scored))
        figures[f"timeouts{suffix}"] = float(sum(g.timed_out for g in groups))
        figures |= _reward_figures(scored, suffix)
        figures[f"engine/logprob_diff{suffix}"] = mismatch
    return figures | _contrast_figures(reports, selected, suffix)


def _reward_figures(scored: Sequence[RolloutGroup], suffix: str) -> dict[str, float]:
    return {
        f"reward{suffix}": _mean([r for g in scored for r in g.rewards]),
        f"reward_std{suffix}": _mean([statistics.pstdev(g.rewards) for g in scored]),
        f"pass_rate{suffix}": _mean([c for g in scored for c in g.correct]),
        f"all_right{suffix}": _mean([all(g.correct) for g in scored]),
        f"all_wrong{suffix}": _mean([not any(g.correct) for g in scored]),
    }


def _contrast_figures(reports: Sequence[BatchReport], selected: Sequence[Tensor], suffix: str) -> dict[str, float]:
    """Anchors of either term, and the positives an anchor had, of the selected rollouts."""
    pairs = [(r.contrast, rows) for r, rows in zip(reports, selected, strict=True) if r.contrast]
    if not pairs:
        return {}
    share = torch.cat([(c.positives_cross_domain_M * c.valid_cross_domain_M).cpu()[rows] for c, rows in pairs])
    consolidate = torch.cat([(c.positives_in_domain_M * c.valid_in_domain_M).cpu()[rows] for c, rows in pairs])
    if not suffix:
        return {
            "contrast/positives_cross_domain": _mean(share[share > 0].tolist(), empty=0.0),
            "contrast/positives_in_domain": _mean(consolidate[consolidate > 0].tolist(), empty=0.0),
        }
    return {
        f"contrast/anchors{suffix}": ((share > 0) | (consolidate > 0)).sum().item() / len(pairs),
        f"contrast/positives{suffix}": _mean(share[share > 0].tolist(), empty=0.0),
    }


def _geometry(report: BatchReport, domain_names: Sequence[str]) -> dict[str, float]:
    """What representations and pairs of one optimizer step look like, by pairs of domains; NaN where there is none."""
    if report.z_MD is None or report.contrast is None:
        return {}
    contrast, labels = report.contrast, report.labels.to(report.z_MD.device)
    anchors_M = contrast.valid_cross_domain_M | contrast.valid_in_domain_M
    figures = {
        "contrast/negatives": contrast.negatives_M[anchors_M].double().mean().item(),
        "contrast/alignment": alignment(report.z_MD, labels),
        "contrast/uniformity": uniformity(report.z_MD),
    }
    similarity = domain_similarity(report.z_MD, labels, num_domains=len(domain_names)).tolist()
    present = labels.domain_M.unique().tolist()
    for a in present:
        positives_AK = contrast.positives_MK[contrast.valid_cross_domain_M & (labels.domain_M == a)].double()
        negatives_AK = contrast.negatives_MK[anchors_M & (labels.domain_M == a)].double()
        for b in present:
            names = f"{domain_names[a]}/{domain_names[b]}"
            figures[f"contrast/negatives/{names}"] = negatives_AK[:, b].mean().item()
            if b >= a:
                figures[f"contrast/similarity/{names}"] = similarity[a][b]
            if b != a:
                figures[f"contrast/positives/{names}"] = positives_AK[:, b].mean().item()
    return figures


def _rows_of(groups: Sequence[RolloutGroup], domain: int | None) -> Tensor:
    domains = torch.tensor([g.prompt.domain for g in groups for _ in g.completions], dtype=torch.int64)
    return torch.arange(len(domains)) if domain is None else (domains == domain).nonzero().squeeze(1)


def _mean_of(dicts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: _mean([values[key] for values in dicts]) for key in dicts[0]} if dicts else {}


def _mean_of_known(dicts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The same, of the values that are numbers; a figure without one is left out."""
    known: dict[str, list[float]] = {}
    for key, value in (item for values in dicts for item in values.items()):
        if not math.isnan(value):
            known.setdefault(key, []).append(value)
    return {key: _mean(values) for key, values in known.items()}


def _mean(values: Sequence[float], *, empty: float = float("nan")) -> float:
    return sum(values) / len(values) if values else empty
