"""Measure held-out accuracy by domain."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_mcpo.config.config import Config
from megatron_mcpo.config.domain_schema import DomainConfig
from megatron_mcpo.data.domains import Domain
from megatron_mcpo.distributed.peers import gather_lists
from megatron_mcpo.reporting.accuracy import Item, accuracy_metrics
from megatron_mcpo.rewards.registry import VERIFIERS, stated_answer
from megatron_mcpo.rewards.scorer import check_error_rate
from megatron_mcpo.trainer.collector import Collector, Sampling
from megatron_mcpo.types import Completion, RolloutGroup, StopReason

_SEED = 0
"""Seed of every evaluation, whatever the run's seed and step, so that two evaluations differ in the model alone."""


def evaluate(collector: Collector, domains: Sequence[Domain], config: Config) -> dict[str, float]:
    """Measure what reporting/accuracy.py describes on evaluation.samples responses to every held-out item; collective.

    Items whose verifier failed are left out; a domain without a verified item has NaN. Raises TooManyErrors when more
    than rewards.max_error_rate of all items failed.
    """
    prompts = [prompt for domain in domains for prompt in domain.held_out]
    sampling = Sampling(
        num_samples=[config.evaluation.samples] * len(domains),
        max_tokens=config.response_limits,
        temperature=config.evaluation.temperature,
        seed=_SEED,
    )
    groups = collector.collect(prompts, sampling)
    peers = collector.groups
    check_error_rate(groups, domain_names=config.domain_names, max_error_rate=config.rewards.max_error_rate)
    mine = [
        (config.domain[group.prompt.domain].name, place, item_of(group, config.domain[group.prompt.domain]))
        for place, group in enumerate(groups)
        if group.holder == peers.rank and group.error is None
    ]
    items: dict[str, list[Item]] = {name: [] for name in config.domain_names}
    for name, _, item in sorted(gather_lists(mine, peers), key=lambda entry: entry[1]):
        items[name].append(item)
    return accuracy_metrics(items)


def left_out(metrics: Mapping[str, float], domains: Sequence[Domain]) -> list[str]:
    """Return a warning if accuracies are those of fewer items than there are, because their verifier failed."""
    counts = {domain.name: len(domain.held_out) - round(metrics[f"items/{domain.name}"]) for domain in domains}
    where = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
    if not where:
        return []
    num_items = sum(len(domain.held_out) for domain in domains)
    return [
        f"WARNING: the verifier failed on {sum(counts.values())} of {num_items} held-out items, which the accuracies "
        f"leave out ({where})"
    ]


def item_of(group: RolloutGroup, settings: DomainConfig) -> Item:
    """Return what accuracy is computed from: whether each response is correct, and its answer for the vote."""
    kind = voting_kind(settings, group.prompt.entry)
    return Item(correct=group.correct, answers=tuple(answer(completion, kind) for completion in group.completions))


def voting_kind(settings: DomainConfig, entry: Mapping[str, Any]) -> str:
    """Return the kind of verifier whose answer counts in a vote: of several that judge, the first that extracts one."""
    kinds = [verifier.kind for verifier in settings.scoring if VERIFIERS[verifier.kind].judges]
    if not settings.scoring:
        kinds = [entry.get("verifier") or "reasoning_gym"]
    return next((kind for kind in kinds if VERIFIERS[kind].stated is not None), "")


def answer(completion: Completion, kind: str) -> str:
    """Return the answer that a response votes for, by the kind of its verifier; "" without one, or if truncated."""
    return stated_answer(kind, completion.text.strip()) if completion.stop_reason is StopReason.STOP else ""
