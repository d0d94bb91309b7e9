"""Held-out accuracy by domain."""

from collections.abc import Sequence

from megatron_mcpo.accuracy import Item, figures
from megatron_mcpo.collect import Collector, Sampling
from megatron_mcpo.config import Config
from megatron_mcpo.data.domains import Domain
from megatron_mcpo.rewards.boxes import after_hashes, last_boxed
from megatron_mcpo.rewards.scorer import check_error_rate
from megatron_mcpo.types import Completion, RolloutGroup, StopReason

_SEED = 0
"""Of every evaluation, whatever the run's seed and step: what differs between two is the model."""


def evaluate(collector: Collector, domains: Sequence[Domain], config: Config) -> dict[str, float]:
    """What megatron_mcpo.accuracy describes, of evaluation.samples responses to every held-out item; collective.

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
    check_error_rate(groups, domain_names=config.domain_names, max_error_rate=config.rewards.max_error_rate)
    return figures(
        {
            domain.name: [_item(g) for g in groups if g.prompt.domain == number and g.error is None]
            for number, domain in enumerate(domains)
        }
    )


def _item(group: RolloutGroup) -> Item:
    return Item(correct=group.correct, answers=tuple(map(answer, group.completions)))


def answer(completion: Completion) -> str:
    r"""What a response votes for: its answer in lower case with single spaces; "" where the response was cut.

    The answer is what stands in the last \boxed{}, or after the last ####, or, without either, all of the text.
    """
    if completion.stop_reason is not StopReason.STOP:
        return ""
    boxed = last_boxed(completion.text)
    return " ".join((boxed[1] if boxed else after_hashes(completion.text)).casefold().split())
