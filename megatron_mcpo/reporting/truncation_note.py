"""Say that all rollouts of a step were cut: then none ends by itself, and hardly any has an answer to be judged."""

from collections.abc import Sequence

from megatron_mcpo.config.config import Config


def truncation_note(config: Config, step: int, stop_tokens: Sequence[str]) -> str:
    """Return the warning. stop_tokens: those of which none ended a rollout"""
    limits = sorted(set(config.response_limits))
    reached = f"{limits[0]}" if len(limits) == 1 else f"{limits[0]} to {limits[-1]}"
    return (
        f"WARNING: step {step}: all rollouts were cut at max_response_tokens = {reached}, none ended with "
        f"{' or '.join(map(repr, stop_tokens))}. Raise rollout.max_response_tokens; if the responses are complete, the "
        "model ends them with another token: add its id to eos_token_id in generation_config.json."
    )
