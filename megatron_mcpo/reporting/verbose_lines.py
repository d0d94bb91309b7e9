"""Format a training step for `mcpo train --verbose`: one line with every metric of the whole step."""

import math
from collections.abc import Mapping

from megatron_mcpo.reporting.numbers import number


def step_line(step: int, total: int, values: Mapping[str, float]) -> str:
    """Return the line of a step, without the ETA. A metric that the step does not have is left out."""
    parts = [
        f"step {step:>{len(str(total))}}/{total}",
        _metric(values, "reward", "reward/mean", ".3f"),
        _advantage_part(values),
        _loss_part(values),
        _metric(values, "grad norm", "grad_norm", ".3g"),
        _metric(values, "lr", "lr", ".2g"),
        _metric(values, "entropy", "entropy", ".2f"),
        _metric(values, "kl", "kl", ".2g"),
        _engine_part(values),
        _metric(values, "tokens", "tokens/trained", ",.0f"),
        _metric(values, "truncated", "truncated", ".0%"),
        _time_part(values),
        _metric(values, "memory", "memory/peak_gib", ".2f", unit=" GiB"),
    ]
    return "  ".join(part for part in parts if part)


def _metric(values: Mapping[str, float], label: str, key: str, form: str, unit: str = "") -> str:
    return f"{label} {number(values[key], form)}{unit}" if key in values else ""


def _advantage_part(values: Mapping[str, float]) -> str:
    """Return the share of groups whose rewards differ; where only the domains' are known, their mean."""
    if "nonzero_advantage" in values:
        return _metric(values, "nonzero advantage", "nonzero_advantage", ".0%")
    shares = [value for key, value in values.items() if key.startswith("nonzero_advantage/") and math.isfinite(value)]
    return f"nonzero advantage {math.fsum(shares) / len(shares):.0%}" if shares else ""


def _loss_part(values: Mapping[str, float]) -> str:
    parts = []
    for term in ("policy", "kl", "cross_domain", "in_domain"):
        if f"loss/{term}" not in values:
            continue
        counts = [
            f"{values[key]:.4g} {label}"
            for label, key in (
                ("anchors", f"contrast/anchors_{term}"),
                ("positives each", f"contrast/positives_{term}"),
            )
            if key in values
        ]
        tail = f" ({', '.join(counts)})" if counts else ""
        parts.append(f"{term} {number(values[f'loss/{term}'], '.4g')}{tail}")
    return "loss " + " ".join(parts) if parts else ""


def _engine_part(values: Mapping[str, float]) -> str:
    if "engine/logprob_diff_mean" not in values:
        return ""
    most = f" max {number(values['engine/logprob_diff_max'], '.2g')}" if "engine/logprob_diff_max" in values else ""
    return f"mismatch {number(values['engine/logprob_diff_mean'], '.2g')}{most}"


def _time_part(values: Mapping[str, float]) -> str:
    keys = (
        ("rollout", "time/rollout"),
        ("wait", "time/wait_for_rollouts"),
        ("score", "time/score"),
        ("update", "time/update"),
        ("sync", "sync/seconds"),
    )
    phases = " ".join(f"{label} {number(values[key], '.1f')}" for label, key in keys if key in values)
    total = number(values["time/step"], ".1f") + " s" if "time/step" in values else ""
    return f"{total} ({phases})".strip() if phases else total
