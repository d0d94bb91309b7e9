"""Check that workers can import and call the functions that a configuration names as verifiers. Imports no torch."""

from collections.abc import Iterator

from megatron_mcpo.config.config import Config
from megatron_mcpo.rewards.pool import VerifierUnavailable, WorkerPool

_GIB = 2**30


def problems(config: Config) -> list[str]:
    """Return one line (key, value, rule, fix) for every function that a worker can't import or call.

    A worker is started for each: a function is the user's own code, which has no business in the trainer.
    """
    return list(_problems(config))


def _problems(config: Config) -> Iterator[str]:
    for domain in config.domain:
        for index, verifier in enumerate(domain.verifiers):
            if verifier.function is None:
                continue
            reason = _why_not_imported(verifier.function, config)
            if reason:
                yield (
                    f"domain {domain.name!r}: verifiers[{index}].function = {verifier.function!r}: must be a function "
                    f"that a worker can import, and call with an item and a response ({reason}). Correct it."
                )


def _why_not_imported(function: str, config: Config) -> str | None:
    pool = WorkerPool(
        [function],
        num_workers=1,
        timeout=config.rewards.timeout,
        memory_bytes=int(config.rewards.memory_gib * _GIB),
    )
    try:
        pool.wait_ready()
    except VerifierUnavailable as error:
        return str(error)
    finally:
        pool.close()
    return None
