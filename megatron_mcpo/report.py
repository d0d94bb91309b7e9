"""What a step tells: the figures of metrics.jsonl, the rows of the rollout dump. Shape legend: megatron_mcpo.types."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_mcpo.algo.contrastive import Contrast
from megatron_mcpo.types import RolloutGroup, Scores, StopReason, TrainBatch

COLUMNS = ("entropy", "kl", "engine/logprob_diff", "engine/logprob_diff_max")
"""What `rollout_stats` says of a rollout: three means over its response tokens, and a maximum."""


@dataclass(frozen=True, kw_only=True)
class BatchReport:
    """One optimizer step: the groups it learned from and what is known of them; stats_MK: K = len(COLUMNS)."""

    groups: Sequence[RolloutGroup]
    advantages_PG: Tensor
    stats_MK: Tensor
    z_MD: Tensor | None
    contrast: Contrast | None
    num_tokens: int
    metrics: Mapping[str, float]


def rollout_stats(batch: TrainBatch, old: Scores, reference_logp_R: Tensor | None) -> Tensor:
    """COLUMNS of this rank's rollouts: [N, 4] fp32. kl is the k3 estimate; 0 without a reference."""
    logp_R = old.logp_R
    difference_R = torch.zeros_like(logp_R) if reference_logp_R is None else reference_logp_R - logp_R
    kl_R = torch.expm1(difference_R) - difference_R
    mismatch_R = (logp_R - batch.engine_logp_R.to(logp_R.device)).abs()
    rollout_R = batch.rollout_R.to(logp_R.device)
    lens_N = batch.response_lens_N.clamp(min=1).to(logp_R.device)
    means = [
        torch.zeros(len(batch), device=logp_R.device).index_add(0, rollout_R, values_R) / lens_N
        for values_R in (old.entropy_R, kl_R, mismatch_R)
    ]
    peak = torch.zeros(len(batch), device=logp_R.device).scatter_reduce(0, rollout_R, mismatch_R, "amax")
    return torch.stack([*means, peak], dim=1)


def step_figures(
    reports: Sequence[BatchReport], collected: Sequence[RolloutGroup], domain_names: Sequence[str]
) -> dict[str, float]:
    """The figures of a step, over all its optimizer steps and by domain.

    collected: all groups, also those that were left out because their verifier failed.
    A figure of a domain that had no group in this step is left out.
    """
    figures = _mean_of([report.metrics for report in reports])
    figures["groups/errors"] = float(sum(group.error is not None for group in collected))
    figures |= _figures_of(collected, reports, domain=None, suffix="")
    for number, name in enumerate(domain_names):
        if any(group.prompt.domain == number for group in collected):
            figures |= _figures_of(collected, reports, domain=number, suffix=f"/{name}")
    rewards = [figures[f"reward/{name}"] for name in domain_names if f"reward/{name}" in figures]
    figures["reward/mean"] = sum(rewards) / len(rewards) if rewards else float("nan")
    return figures


def rollout_rows(report: BatchReport, domain_names: Sequence[str], prompts: Sequence[str]) -> list[dict[str, Any]]:
    """A row a rollout of one optimizer step, for people to read. prompts: the text of each group's prompt."""
    rows = []
    for number, (group, prompt) in enumerate(zip(report.groups, prompts, strict=True)):
        for sample, completion in enumerate(group.completions):
            row = number * len(group.completions) + sample
            rows.append(
                {
                    "row": row,
                    "domain": domain_names[group.prompt.domain],
                    "source": group.prompt.source,
                    "index": group.prompt.index,
                    "prompt": prompt,
                    "completion": completion.text,
                    "stop_reason": completion.stop_reason.value,
                    "answer": group.prompt.entry.get("answer"),
                    "reward": group.rewards[sample],
                    "advantage": float(report.advantages_PG[number, sample]),
                    "version": completion.version,
                    "positives": report.contrast.share_MM[row].nonzero().squeeze(1).tolist() if report.contrast else [],
                }
            )
    return rows


def _figures_of(
    collected: Sequence[RolloutGroup], reports: Sequence[BatchReport], *, domain: int | None, suffix: str
) -> dict[str, float]:
    groups = [g for g in collected if domain is None or g.prompt.domain == domain]
    scored = [g for g in groups if g.error is None]
    completions = [c for g in scored for c in g.completions]
    rewards = [r for g in scored for r in g.rewards]
    selected = [_rows_of(report.groups, domain) for report in reports]
    stats = torch.zeros(0, len(COLUMNS))
    if reports:
        stats = torch.cat([r.stats_MK[rows.to(r.stats_MK.device)] for r, rows in zip(reports, selected, strict=True)])
    figures = {
        f"response_tokens{suffix}": _mean([len(c.token_ids) for c in completions]),
        f"truncated{suffix}": _mean([c.stop_reason is StopReason.LENGTH for c in completions]),
        f"signal{suffix}": _mean([len(set(g.rewards)) > 1 for g in scored]),
        f"entropy{suffix}": _mean(stats[:, 0].tolist()),
        f"kl{suffix}": _mean(stats[:, 1].tolist()),
    }
    if domain is None:
        figures["engine/logprob_diff_mean"] = _mean(stats[:, 2].tolist())
        figures["engine/logprob_diff_max"] = max(stats[:, 3].tolist(), default=float("nan"))
    else:
        figures[f"reward{suffix}"] = _mean(rewards)
        figures[f"errors{suffix}"] = float(len(groups) - len(scored))
        figures[f"engine/logprob_diff{suffix}"] = _mean(stats[:, 2].tolist())
    return figures | _contrast_figures(reports, selected, suffix)


def _contrast_figures(reports: Sequence[BatchReport], selected: Sequence[Tensor], suffix: str) -> dict[str, float]:
    """Valid anchors of either term, and the positives an anchor had, of the selected rollouts."""
    pairs = [(r.contrast, rows) for r, rows in zip(reports, selected, strict=True) if r.contrast]
    if not pairs:
        return {}
    share = torch.cat([contrast.positives_share_M.cpu()[rows] for contrast, rows in pairs])
    consolidate = torch.cat([contrast.positives_consolidate_M.cpu()[rows] for contrast, rows in pairs])
    if not suffix:
        return {
            "contrast/positives_share": _mean(share[share > 0].tolist(), empty=0.0),
            "contrast/positives_consolidate": _mean(consolidate[consolidate > 0].tolist(), empty=0.0),
        }
    return {
        f"contrast/anchors{suffix}": float(((share > 0) | (consolidate > 0)).sum()),
        f"contrast/positives{suffix}": _mean(share[share > 0].tolist(), empty=0.0),
    }


def _rows_of(groups: Sequence[RolloutGroup], domain: int | None) -> Tensor:
    domains = torch.tensor([g.prompt.domain for g in groups for _ in g.completions], dtype=torch.int64)
    return torch.arange(len(domains)) if domain is None else (domains == domain).nonzero().squeeze(1)


def _mean_of(dicts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: _mean([values[key] for values in dicts]) for key in dicts[0]} if dicts else {}


def _mean(values: Sequence[float], *, empty: float = float("nan")) -> float:
    return sum(values) / len(values) if values else empty
