"""Check that engine and trainer hold the same weights, by their values and by the log-probs of the same tokens.

Shape legend: see megatron_mcpo.types.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_mcpo.config.config import Config
from megatron_mcpo.distributed.gather import gather_rows
from megatron_mcpo.distributed.parallel import Groups
from megatron_mcpo.distributed.peers import gather_objects
from megatron_mcpo.mcore.policy import Policy, Reference
from megatron_mcpo.rollout.engine import Comparison, Engine
from megatron_mcpo.trainer.collector import Collector, Sampling
from megatron_mcpo.trainer.exchange import rank_batch
from megatron_mcpo.types import Prompt

TOLERANCE: dict[str, float] = {"fp32": 1e-4, "bf16": 0.05, "fp8_per_block": 0.35}
"""Largest mean absolute log-prob difference. Engine and trainer round differently: for a 135M model in fp32 they were
measured 6e-6 apart, and bf16 itself 0.037 from fp32. Weights rounded to FP8 were 0.17 from those in bf16; twice that is
allowed, since smaller models lose more by rounding."""
_GROSS = 4.0
"""Multiple of the tolerance that no rounding of the same weights was seen to reach."""
_SHOWN = 5


class EngineCheckError(RuntimeError):
    """Engine and trainer hold different weights: what is sampled is not what is trained."""


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """Mean absolute difference between the log-probs of engine and trainer, in nats per token, and the tolerance."""

    mean: float
    tolerance: float

    def __str__(self) -> str:
        return f"mean {self.mean:#.2g} (tolerance {self.tolerance:#.2g})"


class EngineCheck:
    """A few fixed prompts, completed by every engine and scored by the policy."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        collector: Collector,
        policy: Policy | Reference,
        groups: Groups,
        prompts: Sequence[Prompt],
    ):
        """Repeat the prompts so that each engine has at least one. policy: what the engine was given"""
        self.engine = engine
        self.collector = collector
        self.policy = policy
        self.groups = groups
        rounds = -(-collector.num_engines // len(prompts))
        self.prompts = list(prompts) * rounds
        quantization = config.engine.quantization
        self.tolerance = TOLERANCE[config.model.dtype if quantization == "none" else quantization]
        self.sampling = Sampling(
            num_samples=[2] * len(config.domain),
            max_tokens=config.response_limits,
            temperature=config.rollout.temperature,
            seed=1,
        )

    def measure(self) -> Mismatch:
        """Measure the mismatch, the same on every rank; collective."""
        completed = self.collector.complete(self.prompts, self.sampling)
        batch = rank_batch(
            completed, self.groups, share_prompts=self.policy.shares_prompts, routing=self.policy.routing
        )
        logp_R = self.policy.score(batch).logp_R.cpu()
        sums_N = torch.zeros(len(batch)).index_add(0, batch.rollout_R, (logp_R - batch.engine_logp_R).abs())
        local_N1 = sums_N.unsqueeze(1).to(self.policy.device)
        mean = gather_rows(local_N1, batch, self.groups).sum().item() / batch.num_response_tokens
        return Mismatch(mean=mean, tolerance=self.tolerance)

    def check(self) -> Mismatch:
        """Return the mismatch; collective. Raises EngineCheckError with the first tensors whose values differ.

        Rounding alone may exceed the tolerance, except in fp32: where all tensors agree, only a gross difference is an
        error.
        """
        mismatch = self.measure()
        if mismatch.mean <= mismatch.tolerance:
            return mismatch
        different = self._compared().different
        if not different and mismatch.mean <= _GROSS * mismatch.tolerance:
            return mismatch
        raise EngineCheckError(
            f"engine/trainer log-prob mismatch = {mismatch.mean:.3g}: must be at most {mismatch.tolerance:g}; "
            + (f"tensors that differ: {_some(different)}" if different else "no tensor was found to differ")
        )

    def compare_weights(self) -> str:
        """Compare every engine's weights with the policy's; returns how many tensors are identical. Collective.

        Raises EngineCheckError, the same on every rank, with the first tensors that an engine holds with other values.
        """
        found = self._compared()
        if found.different:
            raise EngineCheckError(
                f"the engine does not hold what the trainer sent; tensors that differ: {_some(found.different)}"
            )
        identical = f"{found.num_tensors - len(found.unread)}/{found.num_tensors} tensors identical"
        return identical + (f", the engine cannot read back {_some(found.unread)}" if found.unread else "")

    def _compared(self) -> Comparison:
        """Return what the ranks' engines found together, the same on every rank."""
        mine = self.engine.compare(self.policy.weights())
        found = gather_objects(mine, self.groups)
        return Comparison(
            different=tuple(dict.fromkeys(name for each in found for name in each.different)),
            unread=tuple(dict.fromkeys(name for each in found for name in each.unread)),
            num_tensors=mine.num_tensors,
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
