"""Domains of made-up prompts."""

from collections.abc import Sequence

from megatron_mcpo.data.domains import Domain, Source
from megatron_mcpo.storage.run_items import Split
from megatron_mcpo.types import Prompt


def made_up_domain(index: int, sizes: Sequence[int], weights: Sequence[float] | None = None) -> Domain:
    sources = [
        Source(
            name=f"s{i}",
            weight=weight,
            train=tuple(
                Prompt(domain=index, source=f"s{i}", index=k, token_ids=(k,), entry={"question": str(k)})
                for k in range(size)
            ),
            split=Split(),
        )
        for i, (size, weight) in enumerate(zip(sizes, weights or [1.0] * len(sizes), strict=True))
    ]
    return Domain(name=f"d{index}", sources=tuple(sources), held_out=(), notes=())


def names(prompts: Sequence[Prompt]) -> list[tuple[int, str, int]]:
    return [(prompt.domain, prompt.source, prompt.index) for prompt in prompts]
