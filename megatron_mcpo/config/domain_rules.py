"""Rules between the keys of data, domains and their sources. Each returns a line a problem. Imports no torch.

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
    """Exactly one of generator, file and dataset; no key that belongs to another of them."""
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
        return [f": needs exactly one of generator, file and dataset, has {has}; leave one"]
    [kind] = named
    problems = [
        f".{key} = {value!r}: {why}; remove it"
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
            f".held_out_file = {source.held_out_file!r}: there is a held_out_split too; leave one of them out"
        )
    if kind == "dataset" and source.held_out_split == source.split:
        problems.append(f".held_out_split = {source.held_out_split!r}: is the split that is trained on; name another")
    if source.held_out_file and source.held_out_file == source.file:
        problems.append(f".held_out_file = {source.held_out_file!r}: is the file that is trained on; leave it out")
    for key, path in (("file", source.file), ("held_out_file", source.held_out_file)):
        if path is not None and not path.endswith(FILE_SUFFIXES):
            problems.append(f".{key} = {path!r}: must end in {' or '.join(FILE_SUFFIXES)}; convert it")
    return problems


def missing_files(config: _Data) -> list[str]:
    """Files that sources name and that are not there: to be asked where the run is started."""
    fix = "correct it, or make it (of public data sets: mcpo data prepare)"
    return [
        f"domain {domain.name!r}: sources[{index}].{key} = {path!r}: no such file; {fix}"
        for domain in config.domain
        for index, source in enumerate(domain.sources)
        for key, path in (("file", source.file), ("held_out_file", source.held_out_file))
        if path is not None and not Path(path).is_file()
    ]


def limits(config: _Data) -> list[str]:
    """A domain's response limit is at most the run's, which engine and micro-batches are sized for."""
    most = config.rollout.max_response_tokens
    return [
        f"domain {domain.name!r}: max_response_tokens = {domain.max_response_tokens}: at most "
        f"rollout.max_response_tokens = {most}; raise that, or lower it"
        for domain in config.domain
        if domain.max_response_tokens is not None and domain.max_response_tokens > most
    ]


def mixing(config: _Data) -> list[str]:
    """Keys of [data] that belong to another way of mixing; ways of mixing without anything to mix."""
    data, default = config.data, DataConfig()
    users = {
        "mixing_temperature": ("temperature",),
        "worst_temperature": ("worst",),
        "window": ("curriculum", "worst"),
    }
    problems = [
        f"data.{key} = {getattr(data, key)}: is for data.mixing = {' or '.join(map(repr, ways))}, which is "
        f"{data.mixing!r}; remove it"
        for key, ways in users.items()
        if data.mixing not in ways and getattr(data, key) != getattr(default, key)
    ]
    if data.mixing != "weights" and len(config.domain) == 1:
        problems.append(f"data.mixing = {data.mixing!r}: there is one domain, nothing to mix; set it to 'weights'")
    return problems
