"""What the stages hand to each other. Every carrier is frozen: a stage returns a new one.

Shape legend, used as suffixes of tensor names throughout the package:
  P prompts (groups) in a step     G rollouts a prompt        N rollouts held by one data-parallel rank
  M rollouts of the whole step     T tokens, all sequences concatenated without padding
  R response tokens, concatenated in the order of the rollouts
  D size of a representation       H hidden size              V vocabulary
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor


class StopReason(Enum):
    """Why the engine ended a completion."""

    STOP = "stop"
    """The model emitted an end-of-sequence token."""
    LENGTH = "length"
    """The response limit was reached: the text is truncated."""
    ABORT = "abort"
    """The engine gave the request up; the completion must not be trained on."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One item of one domain, ready to be sampled from."""

    domain: int
    """Index into the configuration's list of domains."""
    source: str
    """Name of the generator or file that the item came from."""
    index: int
    """Position of the item in its source: (source, index) names it for good."""
    token_ids: tuple[int, ...]
    entry: dict[str, Any]
    """What the verifier needs: question, answer, metadata."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sampled response. `logprobs` are the engine's, of the sampled tokens; `version` that of its weights."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop_reason: StopReason
    version: int
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class RolloutGroup:
    """The G completions of one prompt. `rewards` is empty until they are scored; `error` names a failed verifier."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    rewards: tuple[float, ...] = ()
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Keys:
    """What pairs need to know of every rollout of the step, in step order. All shapes [M]."""

    domain_M: Tensor
    prompt_M: Tensor
    correct_M: Tensor

    def __len__(self) -> int:
        return len(self.domain_M)


@dataclass(frozen=True, kw_only=True)
class TrainBatch:
    """The rollouts of one data-parallel rank, ragged and unpadded.

    tokens_T: int64, prompt and response of every rollout, concatenated
    prompt_lens_N, response_lens_N: int64; their sum is a rollout's length, their total is T
    rows_N: int64, position of each rollout in the step's order (0..M-1), ascending
    advantages_N: fp32
    engine_logp_R: fp32, the engine's log-prob of each response token
    keys: domain, prompt and correctness of ALL rollouts of the step (the same on every rank)
    num_response_tokens: R of the whole step, over all ranks: the denominator of token means
    """

    tokens_T: Tensor
    prompt_lens_N: Tensor
    response_lens_N: Tensor
    rows_N: Tensor
    advantages_N: Tensor
    engine_logp_R: Tensor
    keys: Keys
    num_response_tokens: int

    def __len__(self) -> int:
        return len(self.rows_N)

    def check(self) -> None:
        """Assert the shapes that the legend promises."""
        n = len(self)
        assert self.prompt_lens_N.shape == self.response_lens_N.shape == self.advantages_N.shape == (n,)
        assert self.tokens_T.shape == (int(self.prompt_lens_N.sum() + self.response_lens_N.sum()),)
        assert self.engine_logp_R.shape == (int(self.response_lens_N.sum()),)

    def select(self, rollouts: Sequence[int]) -> "TrainBatch":
        """The same batch with only these local rollouts, in this order; the step's keys and totals are kept."""
        pick = torch.as_tensor(rollouts, dtype=torch.int64)
        seq_lens = (self.prompt_lens_N + self.response_lens_N).tolist()
        tokens = self.tokens_T.split(seq_lens)
        logp = self.engine_logp_R.split(self.response_lens_N.tolist())
        return replace(
            self,
            tokens_T=torch.cat([tokens[i] for i in rollouts]) if len(pick) else self.tokens_T[:0],
            prompt_lens_N=self.prompt_lens_N[pick],
            response_lens_N=self.response_lens_N[pick],
            rows_N=self.rows_N[pick],
            advantages_N=self.advantages_N[pick],
            engine_logp_R=torch.cat([logp[i] for i in rollouts]) if len(pick) else self.engine_logp_R[:0],
        )


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a forward pass says of a TrainBatch; None where it was not asked for.

    logp_R, entropy_R: fp32; z_ND: fp32, unit rows; version: that of the weights that made them
    """

    logp_R: Tensor
    version: int
    entropy_R: Tensor | None = None
    z_ND: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Update:
    """What one optimizer step reports."""

    grad_norm: float
    lr: float
    applied: bool
    """False where the gradient was not finite: no parameter has moved."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Sums over all micro-batches and data-parallel ranks, already divided by their global denominators."""
