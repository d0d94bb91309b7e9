"""Check that workers can import and call the functions that a configuration names as verifiers. Imports no torch."""

from contextlib import closing

from megatron_mcpo.config.config import Config
from megatron_mcpo.config.domain_schema import RewardsConfig
from megatron_mcpo.rewards.pool import VerifierUnavailable, WorkerPool


def problems(config: Config) -> list[str]:
    """Return one line (key, value, rule, fix) for every function that a worker can't import or call.

    A worker is started for each: a function is the user's own code, which has no business in the trainer.
    """
    named = [
        (f"domain {domain.name!r}: verifiers[{index}].function = {verifier.function!r}", verifier.function)
        for domain in config.domain
        for index, verifier in enumerate(domain.verifiers)
        if verifier.function is not None
    ]
    one_worker = config.rewards.model_copy(update={"workers": 1})
    reasons = {function: _why_not_imported(function, one_worker) for function in dict.fromkeys(f for _, f in named)}
    return [
        f"{where}: must be a function that a worker can import, and call with an item and a response ({reason}). "
        "Correct it."
        for where, function in named
        if (reason := reasons[function])
    ]


def _why_not_imported(function: str, rewards: RewardsConfig) -> str | None:
    with closing(WorkerPool([function], rewards)) as pool:
        try:
            pool.wait_ready()
        except VerifierUnavailable as error:
            return str(error)
    return None
