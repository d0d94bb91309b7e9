"""Compare the settings of two runs: those that must be equal to resume one with the other. Imports no torch."""

from typing import Any

from megatron_mcpo.config.config import Config

# Keys that change no metric and no weight of the run, bit for bit: a run may be resumed with other values.
# Not among them: run.steps (the learning-rate schedule spans it) and the engine's sizes (they change the composition
# of decoding batches, and with it the rounding of log-probs).
NEUTRAL_KEYS = frozenset(
    {
        "run.name",
        "run.dir",
        "run.resume",
        "run.trackers",
        "run.checkpoint_every",
        "run.keep_checkpoints",
        "run.keep_every",
        "engine.engine_check_every",
        "engine.verify_sync",
        "algorithm.diagnose_every",
        "contrastive.diagnose_every",
        "model.offload_reference",
        "optimizer.offload",
        "rewards.workers",
    }
)


_METHOD = ("contrastive.", "algorithm.")


def settings(config: Config) -> dict[str, Any]:
    """Return values by dotted key, without neutral keys and the layout of trainer and engines; a list is one value.

    A checkpoint can be loaded under any layout. The metrics are then equal up to rounding, and the console says so.
    """
    values: dict[str, Any] = {"domain": config.model_dump()["domain"]}
    for section, table in config.model_dump(exclude={"domain", "parallel"}).items():
        values |= {f"{section}.{key}": value for key, value in table.items()}
    return {key: value for key, value in values.items() if key not in NEUTRAL_KEYS | {"engine.servers"}}


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Return the settings that differ: three of them with both values, the method's first, and how many more."""
    keys = sorted((key for key in ours if theirs[key] != ours[key]), key=lambda key: not key.startswith(_METHOD))
    shown = [key if isinstance(ours[key], list) else f"{key} {theirs[key]} there, {ours[key]} here" for key in keys[:3]]
    return [*shown, f"and {len(keys) - 3} more"] if len(keys) > 3 else shown
