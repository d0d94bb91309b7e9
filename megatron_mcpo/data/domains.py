"""Build domains: prompts to train on and held-out prompts, with few-shot examples, as token ids."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from megatron_mcpo.config.config import Config, ConfigError
from megatron_mcpo.config.domain_schema import GENERATED_ITEMS
from megatron_mcpo.data.conversation import PromptMaker, choose_shots
from megatron_mcpo.data.item_pools import Pool, SourcePools, held_out_shares, read_pools
from megatron_mcpo.data.row_statistics import RowStatistics
from megatron_mcpo.data.rows import Item
from megatron_mcpo.storage.run_items import Split
from megatron_mcpo.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FEWEST_QUESTIONS = 4
"""Unique questions that a source must have besides its few-shot examples: one held out, three to train on."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The training prompts of one generator, file or dataset; `weight` relative to the domain's other sources."""

    name: str
    weight: float
    train: tuple[Prompt, ...]
    split: Split


@dataclass(frozen=True, kw_only=True)
class Domain:
    """A domain. No question of `held_out` is a training prompt or few-shot example of any domain."""

    name: str
    sources: tuple[Source, ...]
    held_out: tuple[Prompt, ...]
    notes: tuple[str, ...]
    """What a user should know: rows that are skipped or repeated, sources with fewer questions than requested."""

    @property
    def verifiers_of_rows(self) -> set[str]:
        """Return the verifiers that training rows name themselves."""
        return {
            prompt.entry["verifier"] for source in self.sources for prompt in source.train if "verifier" in prompt.entry
        }


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The domains as far as they can be built, what prevents training, and what was read."""

    domains: list[Domain]
    problems: list[str]
    row_statistics: list[RowStatistics]
    """One for every source and for every file or split of held-out items, in the configuration's order."""


def load_domains(
    config: Config,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    cache_dir: Path,
    splits: Mapping[str, Split] = MappingProxyType({}),
) -> list[Domain]:
    """Return the configuration's domains, in its order. Raises ConfigError with all problems: see `inspect_domains`."""
    inspection = inspect_domains(config, tokenizer, cache_dir=cache_dir, splits=splits)
    if inspection.problems:
        raise ConfigError(inspection.problems)
    return inspection.domains


def inspect_domains(
    config: Config,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    cache_dir: Path,
    splits: Mapping[str, Split] = MappingProxyType({}),
) -> Inspection:
    """Read and tokenize all items; return the domains with what is wrong with them.

    Items depend on domains and sources only, not on run.seed, so that runs with other seeds are judged on the same
    held-out questions. A source with too few unique questions is divided: few-shot examples first, then at most a
    quarter of the rest is held out. A run that goes on keeps what it held out, also where items were added: splits has
    what it did with a source, by DOMAIN/SOURCE.
    Problems: sources with more bad rows than data.max_bad_rows, or with fewer than shots + 4 unique questions.
    Raises ConfigError for generators that fail and files that can't be read.
    """
    domains: list[Domain] = []
    problems: list[str] = []
    row_statistics: list[RowStatistics] = []
    for index, pools in enumerate(read_pools(config, cache_dir=cache_dir)):
        builder = _Builder(config, tokenizer, index, splits)
        domains.append(builder.build(pools))
        problems += builder.problems
        row_statistics += builder.row_statistics
    return Inspection(domains=domains, problems=problems, row_statistics=row_statistics)


def splits_of(domains: Sequence[Domain]) -> dict[str, Split]:
    """Return how every source was divided, by DOMAIN/SOURCE."""
    return {f"{domain.name}/{source.name}": source.split for domain in domains for source in domain.sources}


def token_problems(domains: Sequence[Domain], tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> list[str]:
    """Return which tokens of the prompts the model does not have, a line per domain, with a prompt that has them.

    Tokens above the vocabulary come from a tokenizer of another model, or were added to it without the model. With
    tensor parallelism they would be rows of padding.
    """
    problems = []
    for domain in domains:
        prompts = [*(prompt for source in domain.sources for prompt in source.train), *domain.held_out]
        wrong = [prompt for prompt in prompts if max(prompt.token_ids, default=0) >= vocab_size]
        if wrong:
            token = max(wrong[0].token_ids)
            problems.append(
                f"domain {domain.name!r}: {len(wrong)} of {len(prompts)} prompts have tokens that the model has not, "
                f"such as {tokenizer.convert_ids_to_tokens(token)!r} (id {token}; first: {wrong[0].source}, question "
                f"{wrong[0].index}): must be below vocab_size = {vocab_size}. Use the model's own tokenizer and chat "
                "template, or remove such text from the data."
            )
    return problems


class _Builder:
    """The builder of one domain; what is wrong with it is in `problems`."""

    def __init__(self, config: Config, tokenizer: "PreTrainedTokenizerBase", index: int, splits: Mapping[str, Split]):
        self._config = config
        self._splits = splits
        self._domain = config.domain[index]
        self._maker = PromptMaker(
            self._domain,
            index,
            tokenizer,
            max_tokens=config.rollout.max_prompt_tokens,
            template_values=config.data.chat_template_kwargs,
        )
        self._notes: list[str] = []
        self.problems: list[str] = []
        self.row_statistics: list[RowStatistics] = []

    def build(self, sources: list[SourcePools]) -> Domain:
        """Return the domain, without the prompts of sources that have too few."""
        domain = self._domain
        built: list[Source] = []
        held_out: list[Prompt] = []
        shares = held_out_shares(domain, self._config.evaluation.items)
        for source, pools, share in zip(domain.sources, sources, shares, strict=True):
            train, held, split = self._split(pools, share)
            built.append(Source(name=pools.train.name, weight=source.weight, train=train, split=split))
            held_out += held
        return Domain(name=domain.name, sources=tuple(built), held_out=tuple(held_out), notes=tuple(self._notes))

    def _split(self, pools: SourcePools, share: int) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...], Split]:
        """Return the training prompts and `share` held-out prompts of one source; both empty where it has too few."""
        pool, domain = pools.train, self._domain
        earlier = self._splits.get(f"{domain.name}/{pool.name}")
        shots = _chosen_before(pool.items, earlier, domain.shots) or choose_shots(pool.items, domain.shots)
        chosen = {item.position for item in shots}
        rest = [item for item in pool.items if item.position not in chosen]
        from_itself = share if pools.held_out is None else 0
        kept: set[int] | None = None
        if earlier is not None:
            kept = {item.position for item in rest if item.key_bits in earlier.held_out}
            rest.sort(key=lambda item: item.position not in kept)
            from_itself = len(kept)
        most = self._most_items(pool)
        usable, num_usable = _first(self._maker.prompts(pool, rest, shots), from_itself + most)
        self._judge(pool.row_statistics)
        if pool.row_statistics.rows == 0:
            return (), (), Split()
        if len(shots) < domain.shots or num_usable < FEWEST_QUESTIONS:
            apart = "" if pools.held_out is None else " that are not held out"
            self.problems.append(
                f"{pool.row_statistics.where}: {len(shots) + num_usable} unique questions{apart}: must be at least "
                f"{domain.shots} few-shot examples, with answers, and {FEWEST_QUESTIONS} more. Add questions (a "
                "generator: wider options; a file: other rows) or lower shots"
            )
            return (), (), Split()
        if kept is not None:
            from_itself = sum(prompt.index in kept for prompt in usable)
        elif num_usable < from_itself + most:
            from_itself = min(from_itself, num_usable // FEWEST_QUESTIONS)
        train, held = usable[from_itself:], usable[:from_itself]
        split = _split_of(rest, shots, held)
        held = held[:share]
        if pools.held_out is not None:
            train, held = usable, self._held_out(pools.held_out, shots, share)
        self._tell_sizes(pools, share, num_shots=len(shots), num_usable=num_usable, num_held=len(held))
        return tuple(train), tuple(held), split

    def _most_items(self, pool: Pool) -> int:
        return self._domain.items or (GENERATED_ITEMS if pool.origin is None else sys.maxsize)

    def _held_out(self, pool: Pool, shots: Sequence[Item], share: int) -> list[Prompt]:
        held, num_usable = _first(self._maker.prompts(pool, pool.items, shots), share)
        self._judge(pool.row_statistics)
        if num_usable == 0 and pool.row_statistics.rows > 0:
            self.problems.append(
                f"{pool.row_statistics.where}: must have a row that can be used; correct the rows, or name another file"
            )
        return held

    def _judge(self, row_statistics: RowStatistics) -> None:
        self.row_statistics.append(row_statistics)
        if problem := row_statistics.problem(self._config.data.max_bad_rows):
            self.problems.append(problem)
        self._notes += row_statistics.notes()

    def _tell_sizes(self, pools: SourcePools, share: int, *, num_shots: int, num_usable: int, num_held: int) -> None:
        where, items = pools.train.row_statistics.where, self._most_items(pools.train)
        if pools.num_seen and pools.train.origin:
            self._notes.append(f"{where}: skipping {pools.num_seen} questions in an earlier source or held out")
        own_held = num_held if pools.held_out is None else 0
        num_train = min(num_usable - own_held, items)
        requested = self._domain.shots + share + items
        evaluates = f"evaluates {num_held}" + (f" of the {share} that evaluation.items asks for" * (num_held < share))
        severity = "WARNING: " * (num_held < share)  # an accuracy of fewer items than asked for has a wider interval
        if pools.train.origin is None and num_shots + num_usable < requested:
            self._notes.append(
                f"{severity}{where}: has {num_shots + num_usable} unique questions of {requested} requested: trains on "
                f"{num_train}, {evaluates}, shows {num_shots} in prompts"
            )
        elif num_held < share:
            self._notes.append(f"{severity}{where}: {evaluates}")
        if pools.train.origin and num_train < num_usable - own_held:
            self._notes.append(
                f"{where}: training on {num_train} of {num_usable - own_held} questions; raise domain.items for more"
            )


def _chosen_before(items: Sequence[Item], earlier: Split | None, num: int) -> list[Item]:
    """Return the worked examples that a run had, in their order; none where they are not `num`, or not all there."""
    if earlier is None or len(earlier.shots) != num:
        return []
    found = {item.key_bits: item for item in items if item.key_bits in earlier.shots}
    return [found[bits] for bits in earlier.shots] if len(found) == num else []


def _split_of(rest: Sequence[Item], shots: Sequence[Item], held: Sequence[Prompt]) -> Split:
    positions = {prompt.index for prompt in held}
    return Split(
        shots=tuple(item.key_bits for item in shots),
        held_out=frozenset(item.key_bits for item in rest if item.position in positions),
    )


def _first(prompts: Iterator[Prompt], num: int) -> tuple[list[Prompt], int]:
    """Return the first `num` prompts, and how many there are."""
    kept: list[Prompt] = []
    count = 0
    for prompt in prompts:
        if count < num:
            kept.append(prompt)
        count += 1
    return kept, count
