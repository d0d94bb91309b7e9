"""Check [[domain.verifiers]] before torch is imported."""

import importlib.util
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from megatron_mcpo.config.config import Config, ConfigError
from megatron_mcpo.config.domain_schema import DomainConfig, VerifierConfig
from megatron_mcpo.rewards.registry import VERIFIERS
from megatron_mcpo.rewards.sandbox.levels import available_level


def problems(config: Config) -> list[str]:
    """Return one line (key, value, rule, fix) for every verifier that can't work."""
    found: list[str] = []
    for domain, limit in zip(config.domain, config.response_limits, strict=True):
        for index, verifier in enumerate(domain.verifiers):
            where = f"domain {domain.name!r}: verifiers[{index}]"
            of_keys = [*_missing(verifier, where), *_misplaced(verifier, where)]
            found += of_keys or _values(verifier, where, response_limit=limit)
    if any(verifier.kind == "code" for domain in config.domain for verifier in domain.verifiers):
        found += _sandbox(config)[1]
    return found


def where_code_runs(config: Config, chosen_by_rows: Sequence[Collection[str]]) -> list[str]:
    """Return a note on the sandbox where the responses of a domain are programs.

    chosen_by_rows: per domain, the verifiers that its rows name themselves.
    Raises ConfigError where this machine has no sandbox for programs.
    """
    if not any(_runs_code(settings, named) for settings, named in zip(config.domain, chosen_by_rows, strict=True)):
        return []
    level, problems = _sandbox(config)
    if problems:
        raise ConfigError(problems)
    warning = "WARNING: it can reach what you can reach: " if level == "insecure" else ""
    return [f"{warning}the model's code runs at level {level!r} (rewards.sandbox = {config.rewards.sandbox!r})"]


def _runs_code(settings: DomainConfig, chosen_by_rows: Collection[str]) -> bool:
    """Tell whether a domain runs programs; one with verifiers of its own ignores those that its rows name."""
    return "code" in ([verifier.kind for verifier in settings.scoring] if settings.scoring else chosen_by_rows)


def _sandbox(config: Config) -> tuple[str | None, list[str]]:
    """Return the level of the sandbox, or what is wrong with it."""
    try:
        return available_level(config.rewards.sandbox), []
    except ValueError as error:
        return None, [str(error)]


def _missing(verifier: VerifierConfig, where: str) -> Iterator[str]:
    for key in VERIFIERS[verifier.kind].required:
        if not getattr(verifier, key):
            yield f"{where}: kind {verifier.kind!r} needs the key {key!r} ({_meaning(key)}); set it"


def _misplaced(verifier: VerifierConfig, where: str) -> Iterator[str]:
    """Find keys of other kinds. A default value does no harm: a resolved configuration has all keys."""
    for key, owner in ((key, name) for name, other in VERIFIERS.items() for key in other.keys):
        value = getattr(verifier, key)
        if owner != verifier.kind and value != VerifierConfig.model_fields[key].default:
            yield (
                f"{where}.{key} = {value!r}: belongs to kind {owner!r}, this verifier is of kind {verifier.kind!r}; "
                "leave it out"
            )


def _meaning(key: str) -> str:
    return (VerifierConfig.model_fields[key].description or "").partition(": ")[2]


def _values(verifier: VerifierConfig, where: str, *, response_limit: int) -> Iterator[str]:
    if verifier.pattern is not None:
        try:
            re.compile(verifier.pattern)
        except (re.error, RecursionError, OverflowError) as error:
            yield f"{where}.pattern = {verifier.pattern!r}: is not a regular expression ({error}); correct it"
    if verifier.buffer_tokens is not None and verifier.buffer_tokens > response_limit:
        yield (
            f"{where}.buffer_tokens = {verifier.buffer_tokens}: must be at most the domain's response limit, "
            f"{response_limit}; lower it"
        )
    if verifier.function is not None and (reason := _not_found(verifier.function.partition(":")[0])):
        yield (
            f"{where}.function = {verifier.function!r}: {reason}; correct it, start in the folder of the module, or "
            "put that folder into PYTHONPATH"
        )
    if verifier.prompt is not None:
        text, reason = _read(verifier.prompt)
        if not reason and "{response}" not in text:
            reason = "has no {response}, so that the judge would never see one"
        if reason:
            yield f"{where}.prompt = {verifier.prompt!r}: {reason}; give the path of a text that has it"
    if verifier.api_key_file is not None:
        text, reason = _read(verifier.api_key_file)
        if reason or not text.strip():
            yield f"{where}.api_key_file: {reason or 'is empty'}; give the path of a file with the key"


def _not_found(module: str) -> str:
    """Return why there is no such module, "" where there is one; import the packages around it, not the module."""
    try:
        found = importlib.util.find_spec(module) is not None
    except Exception as error:  # a package may raise anything while it is imported
        return f"its package can't be imported ({type(error).__name__}: {error})"
    return "" if found else f"there is no module {module!r}"


def _read(path: str) -> tuple[str, str]:
    """Return the text of a file, and why it can't be read ("": it was)."""
    try:
        return Path(path).read_text(encoding="utf-8"), ""
    except OSError as error:
        return "", f"can't be read ({error.strerror})"
    except UnicodeDecodeError:
        return "", "is not UTF-8 text"
