"""Do engine and trainer hold the same weights? Both say how likely the same tokens are.

Shape legend: see megatron_mcpo.types.
"""

from collections.abc import Sequence

import torch

from megatron_mcpo.batch import make_batch
from megatron_mcpo.collect import Collector, Sampling
from megatron_mcpo.config import Config
from megatron_mcpo.gather import gather_rows
from megatron_mcpo.mcore.policy import Policy
from megatron_mcpo.parallel import Groups, gather_objects
from megatron_mcpo.types import Prompt

TOLERANCE: dict[str, float] = {"fp32": 1e-4, "bf16": 0.05}
"""Largest mean absolute log-prob difference. Engine and trainer round differently: on a 135M model in fp32 they were
measured 6e-6 apart, and bf16 itself is 0.037 away from fp32."""
_GROSS = 4.0
"""Times the tolerance; no rounding of the same weights was seen to reach it."""
_SHOWN = 5


class CanaryError(RuntimeError):
    """Engine and trainer disagree: what is sampled is not what is trained."""


class Canary:
    """A few fixed prompts, completed by every engine and scored by the policy."""

    def __init__(self, config: Config, collector: Collector, policy: Policy, groups: Groups, prompts: Sequence[Prompt]):
        """prompts: repeated so that each engine has one at least"""
        self.collector = collector
        self.policy = policy
        self.groups = groups
        rounds = -(-collector.num_engines // len(prompts))
        self.prompts = list(prompts) * rounds
        self.tolerance = TOLERANCE[config.model.dtype]
        self.sampling = Sampling(
            num_samples=2,
            max_tokens=config.rollout.max_response_tokens,
            temperature=config.rollout.temperature,
            seed=1,
        )

    def difference(self) -> float:
        """Mean absolute difference of log-probs (nats a token), the same on every rank; collective."""
        completed = self.collector.complete(self.prompts, self.sampling)
        batch = make_batch(
            completed,
            pass_threshold=1.0,
            num_data_ranks=self.groups.layout.data,
            data_rank=self.groups.data_rank,
            share_prompts=self.policy.shares_prompts,
        )
        logp_R = self.policy.score(batch).logp_R.cpu()
        sums_N = torch.zeros(len(batch)).index_add(0, batch.rollout_R, (logp_R - batch.engine_logp_R).abs())
        local_N1 = sums_N.unsqueeze(1).to(self.policy.device)
        return gather_rows(local_N1, batch, self.groups).sum().item() / batch.num_response_tokens

    def check(self) -> float:
        """The difference; collective. Raises CanaryError with the first tensors that an engine holds with other values.

        Rounding alone may exceed the tolerance in bf16: where all tensors agree, only a gross difference is an error.
        """
        difference = self.difference()
        if difference <= self.tolerance:
            return difference
        names = self._mismatches()
        if not names and difference <= _GROSS * self.tolerance:
            return difference
        shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        raise CanaryError(
            f"engine and trainer log-probs of the same tokens differ by {difference:.3g} on average, more than "
            f"{self.tolerance:g}; "
            + (f"tensors that differ: {shown}" if names else "yet no tensor was found to differ")
        )

    def _mismatches(self) -> list[str]:
        """Tensors that any rank's engine holds with other values, the same list on every rank."""
        mine = self.collector.engine.mismatches(self.policy.weights())
        return list(dict.fromkeys(name for names in gather_objects(mine, self.groups) for name in names))
