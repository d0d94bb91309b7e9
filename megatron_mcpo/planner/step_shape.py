"""Work out what a step computes if every rollout has the same length: the greatest that is allowed, or a mean one.

Memory is planned for the greatest length. Seconds are, too, unless the mean length of responses is known (lengths.py).
"""

from dataclasses import dataclass

from megatron_mcpo.config.config import Config
from megatron_mcpo.config.layout import Layout


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """The sizes of a step.

    prompt, response: tokens of a rollout; rollouts: of a step, over all ranks; updates: optimizer steps of a step
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
        """Return the number of positions of a micro-batch on one rank for which logits are computed."""
        return -(-self.micro_tokens * self.response // self.length)


def step_shape(config: Config, layout: Layout, response: int) -> StepShape:
    """Return the sizes of a step, packed as mcore/packing.py packs rollouts of equal length without shared prompts.

    response: tokens of every response; prompts are as long as allowed
    """
    batch, rollout = config.batch, config.rollout
    length = rollout.max_prompt_tokens + response
    aligned = -(-length // layout.sequence_alignment) * layout.sequence_alignment
    rollouts = batch.prompts * max(config.group_sizes)
    replica = -(-rollouts // (batch.minibatches * layout.data))
    micros = -(-replica // (batch.micro_batch_tokens // aligned))
    if layout.virtual_pipeline > 1:
        micros = -(-micros // layout.pipeline) * layout.pipeline
    sequences = -(-replica // micros)
    return StepShape(
        prompt=rollout.max_prompt_tokens,
        response=response,
        rollouts=rollouts,
        updates=batch.minibatches,
        replica_rollouts=replica,
        micros=micros,
        sequences=sequences,
        micro_tokens=sequences * aligned // layout.context,
    )
