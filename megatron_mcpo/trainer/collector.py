"""Prompts in, scored groups out: sampling and verification, shared out over all engines of the job.

Every engine completes its share of a step's prompts and a rank of its scores them; then all ranks learn of all
groups. So a step's data do not depend on how the trainer is laid out. Shape legend: see megatron_mcpo.types.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from megatron_mcpo.distributed.parallel import Groups, gather_objects, together
from megatron_mcpo.rewards.scorer import Scorer
from megatron_mcpo.rollout.engine import Engine, SamplingRequest
from megatron_mcpo.types import Prompt, RolloutGroup, StopReason


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How prompts are completed.

    num_samples, max_tokens: of each domain, in the configuration's order
    seed: of the first prompt's first sample; the prompt at position p begins with seed + p * max(num_samples)
    """

    num_samples: Sequence[int]
    max_tokens: Sequence[int]
    temperature: float
    seed: int


class Collector:
    """Completes and scores prompts. All ranks call it together with the same prompts.

    scorer: on one of the ranks that use an engine; None on the others
    """

    def __init__(
        self,
        engine: Engine,
        scorer: Scorer | None,
        tokenizer: PreTrainedTokenizerBase,
        groups: Groups,
        *,
        num_engines: int,
        my_engines: Collection[int],
        stop_token_ids: tuple[int, ...],
    ):
        """my_engines: numbers, among the job's `num_engines`, of those that `engine` stands for on this rank"""
        self.engine = engine
        self.scorer = scorer
        self.tokenizer = tokenizer
        self.groups = groups
        self.stop_token_ids = stop_token_ids
        self.num_engines = num_engines
        self.my_engines = my_engines

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[RolloutGroup]:
        """One group a prompt, in order, the same on every rank; rewards are not yet there."""
        return self._share_out(prompts, sampling, score=False)

    def collect(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[RolloutGroup]:
        """The same, with rewards; where the verifier failed a group's `error` says why, and it has none."""
        return self._share_out(prompts, sampling, score=True)

    def _share_out(self, prompts: Sequence[Prompt], sampling: Sampling, *, score: bool) -> list[RolloutGroup]:
        mine = [i for i in range(len(prompts)) if i % self.num_engines in self.my_engines]
        groups: list[RolloutGroup] = []
        # The ranks of an engine wait for each other: one that fails must end at once, for torchrun to end the others.
        completed = self._generate([prompts[i] for i in mine], [self._seed(sampling, i) for i in mine], sampling)
        with together(self.groups):
            if self.scorer is not None:
                groups = self.scorer.score(completed) if score else completed
        share = list(zip(mine, groups, strict=True)) if groups else []
        by_position = dict(pair for part in gather_objects(share, self.groups) for pair in part)
        return [by_position[i] for i in range(len(prompts))]

    def _seed(self, sampling: Sampling, position: int) -> int:
        return sampling.seed + position * max(sampling.num_samples)

    def _generate(self, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: Sampling) -> list[RolloutGroup]:
        requests = [
            SamplingRequest(
                token_ids=prompt.token_ids,
                num_samples=sampling.num_samples[prompt.domain],
                seed=seed,
                max_tokens=sampling.max_tokens[prompt.domain],
                temperature=sampling.temperature,
                stop_token_ids=self.stop_token_ids,
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        groups = []
        for prompt, completions in zip(prompts, self.engine.generate(requests), strict=True):
            texts = self.tokenizer.batch_decode([list(c.token_ids) for c in completions], skip_special_tokens=True)
            completions = tuple(replace(c, text=text) for c, text in zip(completions, texts, strict=True))
            aborted = any(c.stop_reason is StopReason.ABORT for c in completions)
            groups.append(
                RolloutGroup(prompt=prompt, completions=completions, error="the engine aborted" if aborted else None)
            )
        return groups
