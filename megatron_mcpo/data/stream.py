"""The order in which prompts are trained on: a pure function of the seed and of how many were taken before."""

import random
from collections.abc import Iterable, Sequence
from typing import Any

from megatron_mcpo.data.domains import Domain
from megatron_mcpo.types import Prompt


class PromptStream:
    """Deals prompts from all domains, in the same order on every rank and in every layout.

    Shares: every domain earns its share of each step as credit, and the domain with most credit gives the next prompt;
    credit is carried over, so that in the long run the shares are exact. Sources of a domain share in the same way. A
    step of two or more prompts has at least two domains: a domain's share of n prompts is capped at (n - 1) / n.
    Within a source every epoch is a new shuffle, and starts when the last one is used up.
    """

    def __init__(self, domains: Sequence[Domain], *, weights: Sequence[float], seed: int):
        self._seed = seed
        self._weights = list(weights)
        self._domains = [_DomainCursor(domain, seed=seed) for domain in domains]
        self._credits = [0.0] * len(self._domains)
        assert len(weights) == len(domains) and min(weights) > 0

    def next(self, num: int) -> list[Prompt]:
        """The next `num` prompts; neighbours come from different domains where possible."""
        for i, share in enumerate(_capped_shares(self._weights, num)):
            self._credits[i] += num * share
        taken: list[int] = []
        while len(taken) < num:
            lonely = len(taken) == num - 1 and len(set(taken)) == 1 < len(self._domains)
            candidates = [i for i in range(len(self._domains)) if not (lonely and i == taken[0])]
            best = _richest(self._credits, candidates)
            self._credits[best] -= 1
            taken.append(best)
        return [self._domains[i].next() for i in taken]

    def state_dict(self) -> dict[str, Any]:
        """Everything `next` depends on, as JSON."""
        return {
            "seed": self._seed,
            "credits": list(self._credits),
            "domains": [domain.state_dict() for domain in self._domains],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state. Raises ValueError when seed, domains, sources or their sizes were others."""
        saved, own = _identity(state), _identity(self.state_dict())
        if saved != own:
            raise ValueError(
                f"the saved order of prompts is of {saved}, this run has {own}: it can't be continued; "
                "restore seed, domains and sources, or start a new run"
            )
        self._credits = [float(credit) for credit in state["credits"]]
        for domain, domain_state in zip(self._domains, state["domains"], strict=True):
            domain.load_state_dict(domain_state)


class _DomainCursor:
    def __init__(self, domain: Domain, *, seed: int):
        self._name = domain.name
        total = sum(source.weight for source in domain.sources)
        self._shares = [source.weight / total for source in domain.sources]
        self._credits = [0.0] * len(domain.sources)
        self._sources = [
            _SourceCursor(source.name, source.train, seed=f"{seed}/{domain.name}/{i}")
            for i, source in enumerate(domain.sources)
        ]

    def next(self) -> Prompt:
        self._credits = [credit + share for credit, share in zip(self._credits, self._shares, strict=True)]
        best = _richest(self._credits, range(len(self._credits)))
        self._credits[best] -= 1
        return self._sources[best].next()

    def state_dict(self) -> dict[str, Any]:
        sources = [source.state_dict() for source in self._sources]
        return {"name": self._name, "credits": list(self._credits), "sources": sources}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._credits = [float(credit) for credit in state["credits"]]
        for source, source_state in zip(self._sources, state["sources"], strict=True):
            source.load_state_dict(source_state)


class _SourceCursor:
    def __init__(self, name: str, prompts: Sequence[Prompt], *, seed: str):
        assert prompts
        self._name = name
        self._prompts = prompts
        self._seed = seed
        self._start(epoch=0, position=0)

    def next(self) -> Prompt:
        if self._position == len(self._order):
            self._start(epoch=self._epoch + 1, position=0)
        prompt = self._prompts[self._order[self._position]]
        self._position += 1
        return prompt

    def state_dict(self) -> dict[str, Any]:
        return {"name": self._name, "size": len(self._order), "epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._start(epoch=state["epoch"], position=state["position"])

    def _start(self, *, epoch: int, position: int) -> None:
        # Seeding by a string is the same on every machine: it goes through SHA-512, not through hash().
        self._order = list(range(len(self._prompts)))
        random.Random(f"{self._seed}/{epoch}").shuffle(self._order)
        self._epoch, self._position = epoch, position


def _richest(credits: Sequence[float], candidates: Iterable[int]) -> int:
    """The candidate with most credit, the first of equals; rounding keeps equals equal in spite of the last bits."""
    return max(candidates, key=lambda i: round(credits[i], 9))


def _capped_shares(weights: Sequence[float], num: int) -> list[float]:
    """Weights as shares of `num` prompts, none above (num - 1) / num where that leaves room for a second domain."""
    total = sum(weights)
    shares = [weight / total for weight in weights]
    cap = (num - 1) / num
    top = max(range(len(shares)), key=shares.__getitem__)
    if num < 2 or len(shares) < 2 or shares[top] <= cap:
        return shares
    others = 1 - shares[top]
    return [cap if i == top else share * (1 - cap) / others for i, share in enumerate(shares)]


def _identity(state: dict[str, Any]) -> str:
    domains = [(d["name"], [(s["name"], s["size"]) for s in d["sources"]]) for d in state["domains"]]
    return f"seed {state['seed']}, " + ", ".join(
        f"{name} ({', '.join(f'{source} x {size}' for source, size in sources)})" for name, sources in domains
    )
