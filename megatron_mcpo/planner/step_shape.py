"""What a step computes, if every rollout is as long as it may be: the longest that the configuration allows.

Shorter rollouts cost less than planned. How lengths are distributed is the model's and the task's: no guess is made.
"""

from dataclasses import dataclass

from megatron_mcpo.config.config import Config
from megatron_mcpo.config.layout import Layout


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """prompt, response: tokens of a rollout; rollouts: of a step, over all ranks; updates: optimizer steps of a step

    replica_rollouts: of one optimizer step and one data-parallel replica, the largest share
    micros: micro-batches of these; sequences: rollouts in one of them
    micro_tokens: tokens that ONE rank computes of a micro-batch (its share, where context parallelism divides them)
    """

    prompt: int
    response: int
    rollouts: int
    updates: int
    replica_rollouts: int
    micros: int
    sequences: int
    micro_tokens: int

    @property
    def length(self) -> int:
        return self.prompt + self.response

    @property
    def response_tokens(self) -> int:
        """Of a micro-batch on one rank: positions that logits are made for."""
        return -(-self.micro_tokens * self.response // self.length)


def step_shape(config: Config, layout: Layout) -> StepShape:
    """As mcore/packing.py packs equally long rollouts; Transformer Engine's attention shares no prompts."""
    batch, rollout = config.batch, config.rollout
    length = rollout.max_prompt_tokens + rollout.max_response_tokens
    aligned = -(-length // layout.sequence_alignment) * layout.sequence_alignment
    rollouts = batch.prompts * max(config.group_sizes)
    replica = -(-rollouts // (batch.minibatches * layout.data))
    micros = -(-replica // (batch.micro_batch_tokens // aligned))
    if layout.virtual_pipeline > 1:
        micros = -(-micros // layout.pipeline) * layout.pipeline
    sequences = -(-replica // micros)
    return StepShape(
        prompt=rollout.max_prompt_tokens,
        response=rollout.max_response_tokens,
        rollouts=rollouts,
        updates=batch.minibatches,
        replica_rollouts=replica,
        micros=micros,
        sequences=sequences,
        micro_tokens=sequences * aligned // layout.context,
    )
