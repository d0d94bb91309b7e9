"""Configurations, groups and scorers for the tests of rewards."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_mcpo.config.config import Config
from megatron_mcpo.rewards.scorer import Scorer
from megatron_mcpo.types import Completion, Prompt, RolloutGroup, StopReason

SOURCES = [{"file": "items.jsonl"}]
"""Never opened here."""

HOSTILE = [
    '__import__("os").system("touch PWNED")',
    '[__import__("os").system("touch PWNED")]',
    "9**9**9**9",
    "$9^{9^{9^9}}$",
    "$(10^{10^9})!$",
    "\\boxed{" * 100_000,
    "(" * 100_000,
    "9" * 1_000_000,
    "9" * 5000,
    "4\x00",
    "\ud800",
    "\u202e4",
    "</answer></answer>",
    "nan",
    "inf",
    "1e400",
    "1e999999999",
    "-0",
    "None",
    "\x1b]0;title\x07",
    "<script>alert(1)</script>",
    "",
    "x" * 100_000,
    "\x00" * 1000,
    "🤖" * 1000,
    "$" * 10_000,
    "{" * 50_000 + "}" * 50_000,
    "\\boxed{" * 1000,
    "\\boxed{" * 1000 + "}" * 1000,
    "\\frac{" * 1000 + "1",
    "$" + "\\frac{1}{" * 300 + "7" + "}" * 300 + "$",
    "$" + "x^{" * 500 + "7" + "}" * 500 + "$",
    "\\begin{pmatrix}" * 500,
    "answer is " * 10_000,
    "1/" * 50_000,
    "a" * 50_000 + "!",
    "(" * 500 + "7" + ")" * 499,
    "7" + " " * 100_000 + "8",
]
"""Texts that break parsers, cost them their time, or run in them; none is right for any item of these tests."""


def config_of(domains: Sequence[Mapping[str, Any]], **sections: Mapping[str, Any]) -> Config:
    """Return a configuration with these domains, called d0, d1, ..."""
    values = {
        "run": {"steps": 1},
        "model": {"path": "x"},
        "batch": {"prompts": 2, "samples": 2},
        "optimizer": {"lr": 1e-5},
        "domain": [{"name": f"d{n}", "sources": SOURCES, **domain} for n, domain in enumerate(domains)],
    }
    return Config.model_validate({**values, **sections})


def scorer_of(*verifiers: Mapping[str, Any], **rewards: Any) -> Scorer:
    """Return a scorer of one domain with these verifiers; rewards: keys of [rewards]."""
    return Scorer(config_of([{"verifiers": list(verifiers)}], rewards=rewards))


def function(path: str) -> dict[str, str]:
    return {"kind": "function", "function": path}


def completion(text: str, stop_reason: StopReason = StopReason.STOP, *, num_tokens: int = 1) -> Completion:
    return Completion(
        token_ids=(1,) * num_tokens,
        logprobs=(-0.5,) * num_tokens,
        stop_reason=stop_reason,
        versions=(0,) * num_tokens,
        text=text,
    )


def group(*texts: str, index: int = 0, domain: int = 0, **entry: Any) -> RolloutGroup:
    values = {"question": f"q{index}", "answer": "right", "metadata": {}, **entry}
    prompt = Prompt(domain=domain, source="made-up", index=index, token_ids=(1, 2), entry=values)
    return RolloutGroup(prompt=prompt, completions=tuple(completion(text) for text in texts))
