"""Say once in a run when the contrastive terms do not act: their losses stay at the chance level or above it."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_mcpo.config.config import Config
from megatron_mcpo.reporting.numbers import number
from megatron_mcpo.reporting.selection import mean

JUDGED_AT = 10
"""The step after which the gains are judged; a head that begins random has had this many updates by then."""

_WINDOW = 5


def contrast_note(config: Config, steps: Sequence[Mapping[str, Any]]) -> str | None:
    """Return a warning for the terms whose mean gain over the last five steps is not above 0; None without any.

    steps: lines of metrics.jsonl, in order
    """
    weights = {
        "cross_domain": config.contrastive.cross_domain_weight,
        "in_domain": config.contrastive.in_domain_weight,
    }
    weak = {}
    for term, weight in weights.items():
        gains = [row.get(f"contrast/gain_{term}") for row in steps[-_WINDOW:]]
        known = [gain for gain in gains if gain is not None]
        if weight > 0 and known and mean(known) <= 0:
            weak[f"contrast/gain_{term}"] = number(mean(known), ".2f")
    if not weak:
        return None
    found = ", ".join(f"{key} = {gain}" for key, gain in weak.items())
    return (
        f"WARNING: {found} (mean of steps {steps[-_WINDOW:][0]['step']} to {steps[-1]['step']}): must be above 0, the "
        "chance level (until then representations do not tell correct from incorrect rollouts, and the term's gradient "
        f"is noise to the model). Raise optimizer.head_lr (it is {config.optimizer.head_lr:g}) or the term's weight, "
        "or give it more steps."
    )
