"""Say in a run when nothing can be learned: responses are cut off, rewards never differ, anchors are missing."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_mcpo.config.config import Config

WINDOW = 6
"""Steps that `signal_notes` looks at, the one before the longest span included."""

_CUT_OFF = 0.5
_NO_ADVANTAGE_STEPS, _NO_ANCHOR_STEPS = 3, 5

_NO_ADVANTAGE = (
    "every group has equal rewards, so that no rollout has an advantage and the policy term learns nothing: the "
    "questions are all too hard or too easy, the verifier does not find the answers (see rollouts/ and `mcpo reward "
    "try`), or responses are cut off (rollout.max_response_tokens = {limit})"
)
_NO_ANCHOR = "no correct rollout has the partners of either contrastive term, so that both terms are left out"


def signal_notes(config: Config, steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the warnings that are due after the last of these steps; each of them once for a span of such steps.

    steps: the last lines of metrics.jsonl, at most WINDOW, in order
    """
    now, limit = steps[-1], config.rollout.max_response_tokens
    notes = []
    truncated = now.get("truncated")
    if now["step"] == 1 and truncated is not None and truncated >= _CUT_OFF:
        notes.append(
            f"WARNING: {truncated:.0%} of the responses were cut off at rollout.max_response_tokens = {limit}: a "
            "response without its end is mostly judged incorrect. Raise it."
        )
    if _just_lasted(steps, _NO_ADVANTAGE_STEPS, lambda row: row.get("nonzero_advantage") == 0):
        notes.append(f"WARNING: for {_NO_ADVANTAGE_STEPS} steps {_NO_ADVANTAGE.format(limit=limit)}.")
    if config.contrastive.enabled and _just_lasted(steps, _NO_ANCHOR_STEPS, _has_no_anchor):
        notes.append(f"WARNING: for {_NO_ANCHOR_STEPS} steps {_NO_ANCHOR}. They need correct and incorrect rollouts.")
    return notes


def nothing_learned(config: Config, steps: Sequence[Mapping[str, Any]]) -> str | None:
    """Return why a run has learned nothing, where in none of its steps a term had anything to learn from; else None."""
    has_signal = (row.get("nonzero_advantage") != 0 or not _has_no_anchor(row) for row in steps)
    if not steps or any(has_signal):
        return None
    why = _NO_ADVANTAGE.format(limit=config.rollout.max_response_tokens)
    return f"WARNING: nothing was learned: in all {len(steps)} steps {why}."


def _has_no_anchor(row: Mapping[str, Any]) -> bool:
    return not any(row.get(f"contrast/anchors_{term}") for term in ("cross_domain", "in_domain"))


def _just_lasted(steps: Sequence[Mapping[str, Any]], length: int, holds: Callable[[Mapping[str, Any]], bool]) -> bool:
    """Return whether something holds for exactly the last `length` of these steps."""
    lasted = [holds(row) for row in steps[-length:]]
    before = steps[-length - 1 : -length]
    return len(lasted) == length and all(lasted) and not any(holds(row) for row in before)
