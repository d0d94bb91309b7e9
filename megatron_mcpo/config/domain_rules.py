"""Check rules between keys of data, domains and their sources; return one line per problem. Imports no torch.

`config` is a megatron_mcpo.config.config.Config, which imports this module: hence the protocol.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from megatron_mcpo.config.domain_schema import DataConfig, DomainConfig, SourceConfig
from megatron_mcpo.config.schema import RolloutConfig

FILE_SUFFIXES = (".jsonl", ".parquet")


class _Data(Protocol):
    @property
    def data(self) -> DataConfig: ...
    @property
    def domain(self) -> Sequence[DomainConfig]: ...
    @property
    def rollout(self) -> RolloutConfig: ...


def sources(config: _Data) -> list[str]:
    """Check that a source has exactly one of generator, file and dataset, and no key of another of them."""
    found = []
    for domain in config.domain:
        for index, source in enumerate(domain.sources):
            where = f"domain {domain.name!r}: sources[{index}]"
            found += [f"{where}{problem}" for problem in _source_problems(source)]
    return found


def _source_problems(source: SourceConfig) -> list[str]:
    named = [key for key in ("generator", "file", "dataset") if getattr(source, key) is not None]
    if len(named) != 1:
        has = " and ".join(named) if named else "none of them"
        return [f": must have exactly one of generator, file and dataset (it has {has}). Keep one."]
    [kind] = named
    problems = [
        f".{key} = {value!r}: must be left out ({why}). Remove it."
        for key, value, default, kinds, why in (
            ("options", source.options, {}, ("generator",), "only generators have options"),
            ("subset", source.subset, None, ("dataset",), "only datasets have subsets"),
            ("split", source.split, "train", ("dataset",), "only datasets have splits"),
            ("held_out_split", source.held_out_split, None, ("dataset",), "only datasets have splits"),
            ("held_out_file", source.held_out_file, None, ("file", "dataset"), "a generator makes its held-out items"),
        )
        if value != default and kind not in kinds
    ]
    if source.held_out_file and source.held_out_split:
        problems.append(
            f".held_out_file = {source.held_out_file!r}: must be left out where held_out_split is given. Remove one."
        )
    if kind == "dataset" and source.held_out_split == source.split:
        problems.append(
            f".held_out_split = {source.held_out_split!r}: must differ from split, which is trained on. Name another."
        )
    if source.held_out_file and source.held_out_file == source.file:
        problems.append(
            f".held_out_file = {source.held_out_file!r}: must differ from file, which is trained on. Remove it."
        )
    for key, path in (("file", source.file), ("held_out_file", source.held_out_file)):
        if path is not None and not path.endswith(FILE_SUFFIXES):
            problems.append(f".{key} = {path!r}: must end in {' or '.join(FILE_SUFFIXES)}. Convert it.")
    return problems


def missing_files(config: _Data) -> list[str]:
    """Return which files of the sources do not exist, for a command that is started where the run will be."""
    fix = "Correct it, or make the file (from public data sets: mcpo data prepare)."
    return [
        f"domain {domain.name!r}: sources[{index}].{key} = {path!r}: must be a file (no such file). {fix}"
        for domain in config.domain
        for index, source in enumerate(domain.sources)
        for key, path in (("file", source.file), ("held_out_file", source.held_out_file))
        if path is not None and not Path(path).is_file()
    ]


def limits(config: _Data) -> list[str]:
    """Check that a domain's response limit is at most the run's, which engine and micro-batches are sized for."""
    most = config.rollout.max_response_tokens
    return [
        f"domain {domain.name!r}: max_response_tokens = {domain.max_response_tokens}: must be at most "
        f"rollout.max_response_tokens = {most}. Lower it, or raise that."
        for domain in config.domain
        if domain.max_response_tokens is not None and domain.max_response_tokens > most
    ]


def mixing(config: _Data) -> list[str]:
    """Check that [data] has no key of another way of mixing, and that there are domains to mix."""
    data, default = config.data, DataConfig()
    users = {
        "mixing_temperature": ("temperature",),
        "worst_temperature": ("worst",),
        "window": ("curriculum", "worst"),
    }
    problems = [
        f"data.{key} = {getattr(data, key)}: requires data.mixing = {' or '.join(map(repr, ways))} (it is "
        f"{data.mixing!r}). Remove it."
        for key, ways in users.items()
        if data.mixing not in ways and getattr(data, key) != getattr(default, key)
    ]
    if data.mixing != "weights" and len(config.domain) == 1:
        problems.append(f"data.mixing = {data.mixing!r}: requires at least two domains. Set it to 'weights'.")
    return problems
