"""Say in a run when nothing can be learned: responses are cut off, rewards never differ, anchors are missing."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_mcpo.config.config import Config

WINDOW = 6
"""Steps that `signal_notes` looks at, the one before the longest span included."""

_CUT_OFF = 0.5
_NO_ADVANTAGE_STEPS, _NO_ANCHOR_STEPS, _UNUSED_STEPS = 3, 5, 5

_NO_ADVANTAGE = (
    "every group has equal rewards, so that no rollout has an advantage and the policy term learns nothing: the "
    "questions are all too hard or too easy, the verifier does not find the answers (see rollouts/ and `mcpo reward "
    "try`), or responses are cut off (rollout.max_response_tokens = {limit})"
)
_NO_ANCHOR = "no correct rollout has the partners of either contrastive term, so that both terms are left out"


def signal_notes(config: Config, steps: Sequence[Mapping[str, Any]], stop_tokens: Sequence[str]) -> list[str]:
    """Return the warnings that are due after the last of these steps; each of them once for a span of such steps.

    Args:
        config: of the run
        steps: the last lines of metrics.jsonl, at most WINDOW, in order
        stop_tokens: those that end a response
    """
    now, limit = steps[-1], config.rollout.max_response_tokens
    notes = []
    truncated = now.get("truncated") or 0.0
    if _just_lasted(steps, 1, lambda row: row.get("truncated") == 1):
        notes.append(_all_cut_off(config, stop_tokens))
    elif now["step"] == 1 and truncated >= _CUT_OFF:
        notes.append(
            f"WARNING: {truncated:.0%} of the responses were cut off at max_response_tokens = {_limits(config)}: a "
            "response without its end is mostly judged incorrect. Raise rollout.max_response_tokens."
        )
    if _just_lasted(steps, _NO_ADVANTAGE_STEPS, lambda row: row.get("nonzero_advantage") == 0):
        notes.append(f"WARNING: for {_NO_ADVANTAGE_STEPS} steps {_NO_ADVANTAGE.format(limit=limit)}.")
    if config.contrastive.enabled and _just_lasted(steps, _NO_ANCHOR_STEPS, _has_no_anchor):
        notes.append(f"WARNING: for {_NO_ANCHOR_STEPS} steps {_NO_ANCHOR}. They need correct and incorrect rollouts.")
    if _just_lasted(steps, _UNUSED_STEPS, lambda row: (row.get("moe/unused_experts") or 0.0) > 0):
        notes.append(
            f"WARNING: for {_UNUSED_STEPS} steps some experts were given no token ({now['moe/unused_experts']:.1%} of "
            "them now): they learn nothing. Small batches may do that; if moe/load_entropy falls, too, the router "
            "collapses: lower optimizer.lr, or set model.router_replay."
        )
    if _just_lasted(steps, 1, lambda row: row.get("importance/effective") == 0):
        notes.append(
            f"WARNING: algorithm.importance = {config.algorithm.importance!r} has dropped every token, so that the "
            "policy term learns nothing: the weights that sampled are too different from those that learn. Lower "
            "optimizer.lr or engine.staleness, or allow more (algorithm.rejection_limit, importance_cap)."
        )
    return notes


def nothing_learned(config: Config, steps: Sequence[Mapping[str, Any]]) -> str | None:
    """Return why a run has learned nothing, where in none of its steps a term had anything to learn from; else None."""
    has_signal = (row.get("nonzero_advantage") != 0 or not _has_no_anchor(row) for row in steps)
    if not steps or any(has_signal):
        return None
    why = _NO_ADVANTAGE.format(limit=config.rollout.max_response_tokens)
    return f"WARNING: nothing was learned: in all {len(steps)} steps {why}."


def _all_cut_off(config: Config, stop_tokens: Sequence[str]) -> str:
    return (
        f"WARNING: all responses were cut off at max_response_tokens = {_limits(config)}, none ended with "
        f"{' or '.join(map(repr, stop_tokens))}. Raise rollout.max_response_tokens; if the responses are complete, the "
        "model ends them with another token: add its id to eos_token_id in generation_config.json."
    )


def _limits(config: Config) -> str:
    limits = sorted(set(config.response_limits))
    return f"{limits[0]}" if len(limits) == 1 else f"{limits[0]} to {limits[-1]}"


def _has_no_anchor(row: Mapping[str, Any]) -> bool:
    return not any(row.get(f"contrast/anchors_{term}") for term in ("cross_domain", "in_domain"))


def _just_lasted(steps: Sequence[Mapping[str, Any]], length: int, holds: Callable[[Mapping[str, Any]], bool]) -> bool:
    """Return whether something holds for exactly the last `length` of these steps."""
    lasted = [holds(row) for row in steps[-length:]]
    before = steps[-length - 1 : -length]
    return len(lasted) == length and all(lasted) and not any(holds(row) for row in before)
