"""Compare the settings of two runs: what a resumed run may change, and what it can't. Imports no torch."""

from collections.abc import Callable
from typing import Any

from megatron_mcpo.config.config import Config

# Keys that change no metric and no weight of the run, bit for bit.
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
        "run.collective_timeout",
        "engine.patience",
        "engine.engine_check_every",
        "engine.verify_sync",
        "algorithm.diagnose_every",
        "contrastive.diagnose_every",
        "model.offload_reference",
        "optimizer.offload",
        "rewards.workers",
        "data.allow_changed",
    }
)

# Limits and measurements: a run goes on with other values of them, and says so.
LIMITS = frozenset(
    {
        "rewards.timeout",
        "rewards.memory_gib",
        "rewards.max_error_rate",
        "data.max_bad_rows",
        "evaluation.every",
        "evaluation.samples",
        "evaluation.temperature",
    }
)

_METHOD = ("contrastive.", "algorithm.")

_FIXED: tuple[tuple[str, Callable[[Config], Any], str], ...] = (
    ("run.seed", lambda config: config.run.seed, "the order of the prompts follows from it"),
    ("model.dtype", lambda config: config.model.dtype, "the weights of the checkpoint have it"),
    ("contrastive.head", lambda config: config.contrastive.head, "the trained head has this shape"),
    ("contrastive.dim", lambda config: config.contrastive.dim, "the trained head has this shape"),
    (
        "contrastive.cross_domain_weight and in_domain_weight",
        lambda config: "above 0" if config.contrastive.enabled else "both 0",
        "with a weight above 0 there is a head, which is trained from the first step",
    ),
    ("domain", lambda config: ", ".join(config.domain_names), "representations and metrics are kept by domain"),
)
"""What no resumed run can change: a name, its value, and why."""


def settings(config: Config) -> dict[str, Any]:
    """Return values by dotted key, without neutral keys and the layout of trainer and engines; a list is one value.

    A checkpoint can be loaded under any layout. The metrics are then equal up to rounding, and the console says so.
    """
    values: dict[str, Any] = {"domain": config.model_dump()["domain"]}
    for section, table in config.model_dump(exclude={"domain", "parallel"}).items():
        values |= {f"{section}.{key}": value for key, value in table.items()}
    return {key: value for key, value in values.items() if key not in NEUTRAL_KEYS | {"engine.servers"}}


def identity(config: Config) -> dict[str, Any]:
    """Return the settings in which a run is another run if they differ: those that are no limits."""
    return {key: value for key, value in settings(config).items() if key not in LIMITS}


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Return the settings that differ: three of them with both values, the method's first, and how many more."""
    keys = sorted((key for key in ours if theirs[key] != ours[key]), key=lambda key: not key.startswith(_METHOD))
    shown = [key if isinstance(ours[key], list) else f"{key} {theirs[key]} there, {ours[key]} here" for key in keys[:3]]
    return [*shown, f"and {len(keys) - 3} more"] if len(keys) > 3 else shown


def changes(theirs: Config, ours: Config) -> list[str]:
    """Return a line for every setting that a resumed run changes, with both values."""
    there, here = _by_domain(settings(theirs)), _by_domain(settings(ours))
    return [
        f"{key}: {there.get(key)} before, {here.get(key)} from here on"
        for key in there | here
        if there.get(key) != here.get(key)
    ]


def _by_domain(values: dict[str, Any]) -> dict[str, Any]:
    """Return settings in which every key of every domain is one."""
    domains = {f"domain {d['name']}: {key}": value for d in values["domain"] for key, value in d.items()}
    return {key: value for key, value in values.items() if key != "domain"} | domains


def fixed_problems(theirs: Config, ours: Config) -> list[str]:
    """Return a line for everything in which the settings differ although no resumed run can change it."""
    return [
        f"{name} = {value_of(ours)!r}: must stay {value_of(theirs)!r} ({reason}). Restore it, or begin a new run from "
        "the checkpoint with --init-from"
        for name, value_of, reason in _FIXED
        if value_of(ours) != value_of(theirs)
    ]
