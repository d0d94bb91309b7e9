"""Read the unique items of every source; no item is both trained on and held out, whatever its domain."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_mcpo.config.config import Config
from megatron_mcpo.config.domain_schema import GENERATED_ITEMS, DomainConfig
from megatron_mcpo.data.files import Origin, origins
from megatron_mcpo.data.generators import ItemRequest, generate
from megatron_mcpo.data.row_statistics import RowStatistics
from megatron_mcpo.data.rows import Item, RowError, generated_item, parse_row
from megatron_mcpo.data.verl import from_verl, is_verl


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The unique items of one origin, in the order in which they are used."""

    name: str
    items: list[Item]
    row_statistics: RowStatistics
    origin: Origin | None = None
    """None for a generator."""


@dataclass(frozen=True, kw_only=True)
class SourcePools:
    """The pools of one source; held_out is None where held-out items are taken from `train`."""

    train: Pool
    held_out: Pool | None
    num_seen: int
    """Questions left out of `train` because they are held out or in an earlier source."""


def read_pools(config: Config, *, cache_dir: Path) -> list[list[SourcePools]]:
    """Return the pools of every domain's sources. Raises ConfigError for sources that can't be read or made at all.

    Rows of files are taken in the order of a hash of their questions, the same for every run.seed: many files are
    sorted by kind or difficulty. So their order in the file has no influence, and added rows change that of no others.
    A question that some source names as held out is in no `train`, and no question is in two of them.
    """
    generated = iter(_generate(config, cache_dir))
    pairs = [
        [_pools(config, domain, index, generated) for index in range(len(domain.sources))] for domain in config.domain
    ]
    held_out = [held for domain_pairs in pairs for _, held in domain_pairs if held]
    seen = {item.key for pool in held_out for item in pool.items}
    return [[_unseen(train, held, seen) for train, held in domain_pairs] for domain_pairs in pairs]


def _unseen(train: Pool, held_out: Pool | None, seen: set[bytes]) -> SourcePools:
    """Return the pools without training items whose question is in `seen`; add theirs to it."""
    keys = [item.key for item in train.items]
    fresh = [item for item, key in zip(train.items, keys, strict=True) if key not in seen]
    seen.update(keys)
    return SourcePools(train=replace(train, items=fresh), held_out=held_out, num_seen=len(train.items) - len(fresh))


def source_name(domain: DomainConfig, index: int) -> str:
    """Return the name of its generator, file or dataset, numbered where the domain uses it more than once."""
    names = [source.generator or origins(source)[0].name for source in domain.sources]
    return names[index] if names.count(names[index]) == 1 else f"{names[index]}#{index}"


def held_out_shares(domain: DomainConfig, num: int) -> list[int]:
    """Divide `num` over the sources by weight: largest remainders are rounded up."""
    total = sum(source.weight for source in domain.sources)
    exact = [num * source.weight / total for source in domain.sources]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
    for i in by_remainder[: num - sum(shares)]:
        shares[i] += 1
    return shares


def _pools(
    config: Config, domain: DomainConfig, index: int, generated: Iterator[list[dict[str, Any]]]
) -> tuple[Pool, Pool | None]:
    """Return the pool of training rows and, where the source names them, of held-out rows."""
    name = source_name(domain, index)
    if domain.sources[index].generator is not None:
        items = [generated_item(position, item) for position, item in enumerate(next(generated))]
        row_statistics = RowStatistics(domain=domain.name, source=name, place="item {}".format, rows=len(items))
        return Pool(name=name, items=items, row_statistics=row_statistics), None
    train, held_out = origins(domain.sources[index])
    return (
        _row_pool(config, domain, index, train, name=name),
        _row_pool(config, domain, index, held_out, name=f"{held_out.name} (held out)") if held_out else None,
    )


def _row_pool(config: Config, domain: DomainConfig, index: int, origin: Origin, *, name: str) -> Pool:
    row_statistics = RowStatistics(domain=domain.name, source=name, place=origin.place)
    distinct = _distinct(_items(config, domain, origin, row_statistics), row_statistics)
    seed = _item_seed(domain.name, index).to_bytes(4)
    order = sorted(distinct, key=lambda key: hashlib.blake2b(key, key=seed, digest_size=8).digest())
    items = [distinct[key] for key in order]
    return Pool(name=name, items=items, row_statistics=row_statistics, origin=origin)


def _items(config: Config, domain: DomainConfig, origin: Origin, row_statistics: RowStatistics) -> Iterator[Item]:
    """Yield the items of an origin without the rows that are meant for another domain of the configuration."""
    verifiers = [verifier.kind for verifier in domain.scoring]
    others = set(config.domain_names) - {domain.name}
    for position, row in origin.rows():
        try:
            if isinstance(row, RowError):
                raise row
            named = row.get("domain")
            if isinstance(named, str) and named in others:
                continue
            _check_domain(named, domain.name)
            item = parse_row(from_verl(row, verifiers) if is_verl(row) else row, position, verifiers)
        except RowError as error:
            row_statistics.rows += 1
            row_statistics.leave_out(position, error)
            continue
        row_statistics.rows += 1
        yield item


def _check_domain(named: object, domain: str) -> None:
    if named is not None and not isinstance(named, str):
        raise RowError("malformed", f"domain = {named!r:.60}: must be text, the name of a [[domain]]")
    if named is not None and named != domain:
        raise RowError("malformed", f"domain = {named!r:.60}: the configuration has no such [[domain]]")


def _distinct(items: Iterator[Item], row_statistics: RowStatistics) -> dict[bytes, Item]:
    """Return the first item of every question by its key, and count the others."""
    first: dict[bytes, Item] = {}
    for item in items:
        key = item.key
        if key in first:
            row_statistics.repeat(same_answer=first[key].answer == item.answer)
        else:
            first[key] = item
    return first


def _generate(config: Config, cache_dir: Path) -> list[list[dict[str, Any]]]:
    requests = [
        ItemRequest(
            domain=domain.name,
            source=source,
            size=domain.shots + held_out + (domain.items or GENERATED_ITEMS),
            seed=_item_seed(domain.name, index),
        )
        for domain in config.domain
        for index, (source, held_out) in enumerate(
            zip(domain.sources, held_out_shares(domain, config.evaluation.items), strict=True)
        )
        if source.generator is not None
    ]
    return generate(requests, cache_dir=cache_dir) if requests else []


def _item_seed(domain: str, source: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{domain}/{source}".encode()).digest()[:4]) >> 1
