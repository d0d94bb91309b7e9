"""Sample and verify a step's prompts, divided over all engines of the job.

Every engine completes its share of the prompts and one of its ranks verifies them; then all ranks receive all groups.
So a step's data do not depend on how the trainer is laid out. Shape legend: see megatron_mcpo.types.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from megatron_mcpo import progress
from megatron_mcpo.distributed.parallel import Groups, gather_objects, together
from megatron_mcpo.rewards.scorer import Scorer
from megatron_mcpo.rollout.decoding import ResponseDecoder
from megatron_mcpo.rollout.engine import NUM_SEEDS, Engine, SamplingRequest
from megatron_mcpo.types import Prompt, RolloutGroup, StopReason


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The settings that prompts are completed with.

    num_samples, max_tokens: of each domain, in the configuration's order
    seed: of the first prompt's first sample, of any size; see `first_seed`
    """

    num_samples: Sequence[int]
    max_tokens: Sequence[int]
    temperature: float
    seed: int

    def first_seed(self, position: int) -> int:
        """Return the seed of the first sample of the prompt at a position; those of the others follow it.

        Seeds are consecutive over all samples of a step, modulo what an engine takes: a run's seed may be so large that
        the steps' seeds are not.
        """
        most = max(self.num_samples)
        return (self.seed + position * most) % (NUM_SEEDS - most)


class Collector:
    """The completion and verification of prompts. All ranks call it together with the same prompts.

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
        """Keep the parts. my_engines: which of the job's `num_engines` are behind `engine` on this rank, by number"""
        self.engine = engine
        self.scorer = scorer
        self._decoder = ResponseDecoder(tokenizer)
        self.groups = groups
        self.stop_token_ids = stop_token_ids
        self.num_engines = num_engines
        self.my_engines = my_engines

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[RolloutGroup]:
        """Return one group per prompt, in order, the same on every rank, without rewards."""
        return self._divide(prompts, sampling, score=False)

    def collect(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[RolloutGroup]:
        """Return the groups with rewards; where the verifier failed, `error` says why and there is no reward."""
        return self._divide(prompts, sampling, score=True)

    def _divide(self, prompts: Sequence[Prompt], sampling: Sampling, *, score: bool) -> list[RolloutGroup]:
        mine = [i for i in range(len(prompts)) if i % self.num_engines in self.my_engines]
        groups: list[RolloutGroup] = []
        # The ranks of an engine wait for each other: one that fails must end at once, for torchrun to end the others.
        completed = self._generate([prompts[i] for i in mine], [sampling.first_seed(i) for i in mine], sampling)
        with together(self.groups), progress.phase("verification of responses"):
            if self.scorer is not None:
                groups = self.scorer.score(completed) if score else completed
        share = list(zip(mine, groups, strict=True)) if groups else []
        by_position = dict(pair for part in gather_objects(share, self.groups) for pair in part)
        return [by_position[i] for i in range(len(prompts))]

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
            texts = self._decoder.texts(prompt, completions)
            completions = tuple(replace(c, text=text) for c, text in zip(completions, texts, strict=True))
            aborted = any(c.stop_reason is StopReason.ABORT for c in completions)
            groups.append(
                RolloutGroup(prompt=prompt, completions=completions, error="the engine aborted" if aborted else None)
            )
        return groups
