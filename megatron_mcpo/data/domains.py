"""Domains: prompts to train on and prompts held out, with worked examples in front, as token ids."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mcpo.config import Config, ConfigError
from megatron_mcpo.data.generators import ItemRequest, generate
from megatron_mcpo.sections import DomainConfig
from megatron_mcpo.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = dict[str, Any]

FEWEST_QUESTIONS = 4
"""Distinct questions that a source must have besides its worked examples: one held out, three to train on."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The training prompts of one generator; `weight` relative to the domain's other sources."""

    name: str
    weight: float
    train: tuple[Prompt, ...]


@dataclass(frozen=True, kw_only=True)
class Domain:
    """No question of `held_out` is among the training prompts or the worked examples, of any domain."""

    name: str
    sources: tuple[Source, ...]
    held_out: tuple[Prompt, ...]
    notes: tuple[str, ...]
    """What a user should know: sources that have fewer distinct questions than were asked for."""


@dataclass(frozen=True, kw_only=True)
class _Split:
    """The distinct items of one source, with their positions in it."""

    shots: list[Item]
    held_out: list[tuple[int, Item]]
    train: list[tuple[int, Item]]


def load_tokenizer(config: Config) -> "PreTrainedTokenizerBase":
    """The tokenizer of the model's folder. Raises ConfigError when it can't be read or has no chat template."""
    from transformers import AutoTokenizer

    path = config.model.path
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            [f"model.path = {path!r}: its tokenizer can't be read ({reason}); download it again"]
        ) from None
    if not tokenizer.chat_template:
        raise ConfigError([f"model.path = {path!r}: has no chat template; use an instruction-tuned model"])
    return tokenizer


def load_domains(config: Config, tokenizer: "PreTrainedTokenizerBase", *, cache_dir: Path) -> list[Domain]:
    """The configuration's domains, in its order.

    Items depend on domains and sources only, not on run.seed, so that runs with other seeds are judged on the same
    held-out questions. A source with too few distinct questions is divided: worked examples first, then at most a
    quarter of the rest is held out. Raises ConfigError with all problems: generators that fail, sources with fewer
    than shots + 4 distinct questions, prompts longer than rollout.max_prompt_tokens.
    """
    requests = [request for domain in config.domain for request in _requests(domain, config.evaluation.items)]
    pools = iter(generate(requests, cache_dir=cache_dir))
    seen: set[str] = set()
    problems: list[str] = []
    domains = []
    for index, domain in enumerate(config.domain):
        builder = _Builder(config, tokenizer, index, problems)
        domains.append(builder.build([_unseen(next(pools), seen) for _ in domain.sources]))
    if problems:
        raise ConfigError(problems)
    return domains


def _requests(domain: DomainConfig, num_held_out: int) -> list[ItemRequest]:
    return [
        ItemRequest(
            domain=domain.name,
            source=source,
            size=domain.shots + held_out + domain.items,
            seed=_item_seed(domain.name, index),
        )
        for index, (source, held_out) in enumerate(
            zip(domain.sources, _held_out_shares(domain, num_held_out), strict=True)
        )
    ]


def _item_seed(domain: str, source: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{domain}/{source}".encode()).digest()[:4]) >> 1


def _held_out_shares(domain: DomainConfig, num: int) -> list[int]:
    """`num` divided over the sources by weight: largest remainders are rounded up."""
    total = sum(source.weight for source in domain.sources)
    exact = [num * source.weight / total for source in domain.sources]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
    for i in by_remainder[: num - sum(shares)]:
        shares[i] += 1
    return shares


def _unseen(items: Sequence[Item], seen: set[str]) -> list[tuple[int, Item]]:
    """Items whose question no earlier source has, with their positions; `seen` is added to."""
    fresh = [(position, item) for position, item in enumerate(items) if item["question"] not in seen]
    seen.update(item["question"] for _, item in fresh)
    return fresh


class _Builder:
    """Makes one domain; what is wrong with it goes to `problems`."""

    def __init__(self, config: Config, tokenizer: "PreTrainedTokenizerBase", index: int, problems: list[str]):
        self._domain = config.domain[index]
        self._index = index
        self._num_held_out = config.evaluation.items
        self._max_tokens = config.rollout.max_prompt_tokens
        self._tokenizer = tokenizer
        self._problems = problems

    def build(self, pools: Sequence[list[tuple[int, Item]]]) -> Domain:
        domain = self._domain
        sources: list[Source] = []
        held_out: list[Prompt] = []
        notes: list[str] = []
        shares = _held_out_shares(domain, self._num_held_out)
        for i, (pool, share) in enumerate(zip(pools, shares, strict=True)):
            name = self._source_name(i)
            split = self._split(name, pool, share, notes)
            if split is None:
                continue
            train = self._prompts(name, split.shots, split.train)
            sources.append(Source(name=name, weight=domain.sources[i].weight, train=train))
            held_out += self._prompts(name, split.shots, split.held_out)
        return Domain(name=domain.name, sources=tuple(sources), held_out=tuple(held_out), notes=tuple(notes))

    def _source_name(self, index: int) -> str:
        """The generator's name, numbered where the domain uses it more than once."""
        generators = [source.generator for source in self._domain.sources]
        name = generators[index]
        return name if generators.count(name) == 1 else f"{name}#{index}"

    def _split(self, name: str, pool: list[tuple[int, Item]], num_held_out: int, notes: list[str]) -> _Split | None:
        domain = self._domain
        wanted = domain.shots + num_held_out + domain.items
        if len(pool) < domain.shots + FEWEST_QUESTIONS:
            self._problems.append(
                f"domain {domain.name!r}, source {name!r}: only {len(pool)} distinct questions, which must do for "
                f"{domain.shots} worked examples and {FEWEST_QUESTIONS} more; widen its options or lower shots"
            )
            return None
        shots, rest = _choose_shots(pool, domain.shots)
        if len(pool) < wanted:
            num_held_out = min(num_held_out, len(rest) // FEWEST_QUESTIONS)
            notes.append(
                f"domain {domain.name!r}, source {name!r}: {len(pool)} distinct questions of {wanted} asked for: "
                f"{len(shots)} worked examples, {num_held_out} held out, {len(rest) - num_held_out} to train on"
            )
        return _Split(shots=shots, held_out=rest[:num_held_out], train=rest[num_held_out:])

    def _prompts(self, name: str, shots: Sequence[Item], items: Sequence[tuple[int, Item]]) -> tuple[Prompt, ...]:
        if not items:
            return ()
        texts = [
            self._tokenizer.apply_chat_template(self._messages(shots, item), tokenize=False, add_generation_prompt=True)
            for _, item in items
        ]
        token_ids = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        longest = max(len(ids) for ids in token_ids)
        if longest > self._max_tokens:
            self._problems.append(
                f"domain {self._domain.name!r}, source {name!r}: its longest prompt has {longest} tokens, "
                f"rollout.max_prompt_tokens allows {self._max_tokens}; raise it, or lower shots or the source's options"
            )
        return tuple(
            Prompt(domain=self._index, source=name, index=position, token_ids=tuple(ids), entry=item)
            for (position, item), ids in zip(items, token_ids, strict=True)
        )

    def _messages(self, shots: Sequence[Item], item: Item) -> list[dict[str, str]]:
        messages = []
        for shot in shots:
            messages.append({"role": "user", "content": self._question(shot)})
            messages.append({"role": "assistant", "content": shot["answer"].strip()})
        return [*messages, {"role": "user", "content": self._question(item)}]

    def _question(self, item: Item) -> str:
        return f"{item['question'].strip()}\n{self._domain.instruction}".strip()


def _choose_shots(pool: list[tuple[int, Item]], num: int) -> tuple[list[Item], list[tuple[int, Item]]]:
    """The first `num` items, where possible with different answers (two times "Yes" teaches to say "Yes"); the rest."""
    answers: set[str] = set()
    novel: list[tuple[int, Item]] = []
    repeated: list[tuple[int, Item]] = []
    for entry in pool:
        (repeated if entry[1]["answer"] in answers else novel).append(entry)
        answers.add(entry[1]["answer"])
    chosen = (novel + repeated)[:num]
    positions = {position for position, _ in chosen}
    return [item for _, item in chosen], [entry for entry in pool if entry[0] not in positions]
