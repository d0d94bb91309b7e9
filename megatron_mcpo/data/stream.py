"""Order the training prompts: a pure function of the seed, the prompts taken so far and their pass rates.

It does not depend on how the trainer is laid out: what is observed are the groups of all ranks.
"""

import hashlib
import json
import random
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.config.domain_schema import DataConfig
from megatron_mcpo.data.domains import Domain
from megatron_mcpo.data.mixing import capped, mixing_shares
from megatron_mcpo.types import Prompt, RolloutGroup


class ItemId(NamedTuple):
    """What identifies a training item across the starts of a run. number: its index; digest: of its content"""

    domain: int
    source: str
    number: int
    digest: int


class PromptStream:
    """The sequence of prompts of all domains, the same on every rank and in every layout.

    Shares: every domain earns its share of each step as credit, and the domain with most credit gives the next prompt;
    credit is carried over, so that in the long run the shares are exact. Sources of a domain share in the same way. A
    step of two or more prompts has at least two domains: a domain's share of n prompts is capped at (n - 1) / n.
    Within a source every epoch is a new shuffle, and starts when the last one is used up.
    """

    def __init__(self, domains: Sequence[Domain], *, weights: Sequence[float], seed: int, data: DataConfig):
        """weights: one per domain; data: how they are mixed (data/mixing.py)"""
        self._seed = seed
        self._data = data
        self._weights = list(weights)
        self._sizes = [sum(len(source.train) for source in domain.sources) for domain in domains]
        self._domains = [_DomainCursor(domain, seed=seed, skips=data.item_curriculum) for domain in domains]
        self._credits = [0.0] * len(self._domains)
        # A window a domain: (correct rollouts, rollouts) of each of its newest steps.
        self._recent: list[deque[tuple[int, int]]] = [deque(maxlen=data.window) for _ in domains]
        assert len(weights) == len(domains) and min(weights) > 0

    def next(self, num: int) -> list[Prompt]:
        """Return the next `num` prompts; neighbours come from different domains where possible."""
        for i, share in enumerate(capped(self.shares(), num)):
            self._credits[i] += num * share
        taken: list[int] = []
        while len(taken) < num:
            lonely = len(taken) == num - 1 and len(set(taken)) == 1 < len(self._domains)
            candidates = [i for i in range(len(self._domains)) if not (lonely and i == taken[0])]
            best = _richest(self._credits, candidates)
            self._credits[best] -= 1
            taken.append(best)
        return self.replacements(taken)

    def replacements(self, domains: Sequence[int]) -> list[Prompt]:
        """Return the next prompt of each of these domains, whatever their shares."""
        return [self._domains[domain].next() for domain in domains]

    def identity(self, prompt: Prompt) -> ItemId:
        """Return what a prompt of this stream can be found by again."""
        return ItemId(prompt.domain, prompt.source, prompt.index, _digest(prompt))

    def find(self, item: ItemId) -> Prompt | None:
        """Return a prompt of this stream; None if there is none, or its content is another now."""
        if not 0 <= item.domain < len(self._domains):
            return None
        prompt = self._domains[item.domain].find(item.source, item.number)
        return prompt if prompt is not None and _digest(prompt) == item.digest else None

    def observe(self, groups: Sequence[RolloutGroup]) -> None:
        """Learn the pass rates of a step's groups, in any order, the same ones on every rank.

        Groups whose verifier failed are ignored.
        """
        known = [group for group in groups if group.error is None and group.correct]
        for domain, window in enumerate(self._recent):
            passed = [correct for group in known if group.prompt.domain == domain for correct in group.correct]
            if passed:
                window.append((sum(passed), len(passed)))
        for (domain, source, index), passed in _by_item(known).items():
            self._domains[domain].observe(source, index, decided=len(set(passed)) == 1)

    def shares(self) -> list[float]:
        """Return the share of each domain in the next step, before the rule of two domains."""
        return mixing_shares(self._data, weights=self._weights, sizes=self._sizes, pass_rates=self.pass_rates())

    def pass_rates(self) -> list[float | None]:
        """Return the pass rate of each domain over its window; None before it was observed."""
        sums = [(sum(correct for correct, _ in window), sum(count for _, count in window)) for window in self._recent]
        return [correct / count if count else None for correct, count in sums]

    def state_dict(self) -> dict[str, Any]:
        """Return everything that `next` depends on, as JSON."""
        return {
            "seed": self._seed,
            "credits": list(self._credits),
            "recent": [[list(entry) for entry in window] for window in self._recent],
            "domains": [domain.state_dict() for domain in self._domains],
        }

    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        """Continue from a saved state; return the sources, as DOMAIN/SOURCE, whose items are not those of the state.

        Such a source begins its next epoch, with the items that it has now. Raises ConfigError where seed, domains or
        sources differ.
        """
        saved, own = _identity(state), _identity(self.state_dict())
        if saved != own:
            raise ConfigError(
                [
                    f"domain: must have the seed and sources of the run, {saved} (this configuration has {own}). "
                    "Restore them, or begin a new run with --run.resume never"
                ]
            )
        self._credits = [float(credit) for credit in state["credits"]]
        self._recent = [
            deque(((correct, count) for correct, count in window), maxlen=self._data.window)
            for window in state["recent"]
        ]
        changed = []
        for domain, domain_state in zip(self._domains, state["domains"], strict=True):
            changed += domain.load_state_dict(domain_state)
        return changed

    def digests(self) -> dict[str, list[int]]:
        """Return a 64-bit digest of every item by source, DOMAIN/SOURCE, in the order of the items."""
        return {f"{domain.name}/{source.name}": source.digests for domain in self._domains for source in domain.sources}


class _DomainCursor:
    """The position in one domain."""

    def __init__(self, domain: Domain, *, seed: int, skips: bool):
        self.name = domain.name
        total = sum(source.weight for source in domain.sources)
        self._shares = [source.weight / total for source in domain.sources]
        self._credits = [0.0] * len(domain.sources)
        self.sources = [
            _SourceCursor(source.name, source.train, seed=f"{seed}/{domain.name}/{i}", skips=skips)
            for i, source in enumerate(domain.sources)
        ]
        self._by_name = {source.name: cursor for source, cursor in zip(domain.sources, self.sources, strict=True)}

    def next(self) -> Prompt:
        self._credits = [credit + share for credit, share in zip(self._credits, self._shares, strict=True)]
        best = _richest(self._credits, range(len(self._credits)))
        self._credits[best] -= 1
        return self.sources[best].next()

    def find(self, source: str, index: int) -> Prompt | None:
        return self._by_name[source].find(index) if source in self._by_name else None

    def observe(self, source: str, index: int, *, decided: bool) -> None:
        self._by_name[source].observe(index, decided=decided)

    def state_dict(self) -> dict[str, Any]:
        sources = [source.state_dict() for source in self.sources]
        return {"name": self.name, "credits": list(self._credits), "sources": sources}

    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        self._credits = [float(credit) for credit in state["credits"]]
        pairs = zip(self.sources, state["sources"], strict=True)
        return [f"{self.name}/{source.name}" for source, saved in pairs if not source.load_state_dict(saved)]


class _SourceCursor:
    """The position in one source.

    skips: every second epoch, beginning with the second, skips items whose last rollouts were all correct or incorrect.
    """

    def __init__(self, name: str, prompts: Sequence[Prompt], *, seed: str, skips: bool):
        assert prompts
        self.name = name
        self.digests = [_digest(prompt) for prompt in prompts]
        self._prompts = prompts
        self._seed = seed
        self._skips = skips
        self._decided: set[int] = set()
        self._start(epoch=0, position=0)

    def next(self) -> Prompt:
        while True:
            if self._position == len(self._order):
                self._start(epoch=self._epoch + 1, position=0)
            prompt = self._prompts[self._order[self._position]]
            self._position += 1
            if self._epoch % 2 == 0 or prompt.index not in self._decided:
                return prompt

    def find(self, index: int) -> Prompt | None:
        return next((prompt for prompt in self._prompts if prompt.index == index), None)

    def observe(self, index: int, *, decided: bool) -> None:
        """Note an item's rollouts. decided: all of them were correct, or none"""
        if not self._skips:
            return
        if decided:
            self._decided.add(index)
        else:
            self._decided.discard(index)

    def state_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "items": hashlib.sha256(str(self.digests).encode()).hexdigest(),
            "epoch": self._epoch,
            "position": self._position,
            "decided": sorted(self._decided),
        }

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Continue from a saved state, or with the epoch after it where that had other items; return whether not."""
        if state["items"] != self.state_dict()["items"]:
            self._start(epoch=state["epoch"] + 1, position=0)
            return False
        self._decided = set(state["decided"]) if self._skips else set()
        self._start(epoch=state["epoch"], position=state["position"])
        return True

    def _start(self, *, epoch: int, position: int) -> None:
        # Seeding by a string is the same on every machine: it goes through SHA-512, not through hash().
        self._order = list(range(len(self._prompts)))
        random.Random(f"{self._seed}/{epoch}").shuffle(self._order)
        self._epoch, self._position = epoch, position


def _digest(prompt: Prompt) -> int:
    """Return 64 bits of a hash of what the model reads and what its answer is compared with."""
    content = json.dumps([prompt.token_ids, prompt.entry], sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest()[:8])


def _by_item(groups: Sequence[RolloutGroup]) -> dict[tuple[int, str, int], list[bool]]:
    """Return whether each rollout of an item was correct; a step may hold an item more than once."""
    found: dict[tuple[int, str, int], list[bool]] = {}
    for group in groups:
        prompt = group.prompt
        found.setdefault((prompt.domain, prompt.source, prompt.index), []).extend(group.correct)
    return found


def _richest(credits: Sequence[float], candidates: Iterable[int]) -> int:
    """Return the candidate with most credit, the first of equals; rounding hides differences in the last bits."""
    return max(candidates, key=lambda i: round(credits[i], 9))


def _identity(state: dict[str, Any]) -> str:
    domains = [f"{d['name']} ({', '.join(s['name'] for s in d['sources'])})" for d in state["domains"]]
    return f"seed {state['seed']}, {', '.join(domains)}"
