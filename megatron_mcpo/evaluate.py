"""Held-out accuracy by domain."""

from collections.abc import Sequence

from megatron_mcpo.collect import Collector, Sampling
from megatron_mcpo.config import Config
from megatron_mcpo.data.domains import Domain
from megatron_mcpo.rewards.scorer import check_error_rate


def evaluate(collector: Collector, domains: Sequence[Domain], config: Config) -> dict[str, float]:
    """Share of each domain's held-out items whose greedy completion is correct; all ranks together.

    Items whose verifier failed are left out; a domain without a verified item has NaN. Raises TooManyErrors when more
    than rewards.max_error_rate of all items failed.
    """
    prompts = [prompt for domain in domains for prompt in domain.held_out]
    greedy = Sampling(num_samples=1, max_tokens=config.rollout.max_response_tokens, temperature=0.0, seed=0)
    groups = collector.collect(prompts, greedy)
    check_error_rate(groups, domain_names=config.domain_names, max_error_rate=config.rewards.max_error_rate)
    accuracies = {}
    for number, domain in enumerate(domains):
        correct = [
            group.rewards[0] >= config.algorithm.pass_threshold
            for group in groups
            if group.prompt.domain == number and group.error is None
        ]
        accuracies[domain.name] = sum(correct) / len(correct) if correct else float("nan")
    return accuracies
