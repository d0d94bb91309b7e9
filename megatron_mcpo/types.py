"""Define the carriers that the stages exchange. Every carrier is frozen: a stage returns a new one.

Shape legend, used as suffixes of tensor names throughout the package:
  P prompts (groups) in a step     G rollouts per prompt       N rollouts held by one data-parallel rank
  M rollouts of all ranks together  T tokens, all sequences concatenated without padding
  R response tokens, concatenated in the order of the rollouts
  D size of a representation       H hidden size              V vocabulary
  X layers with experts            E experts of a layer       K experts of a token
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from itertools import groupby
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
    """The engine did not end the completion; what there is of it must not be trained on."""

    @property
    def is_end(self) -> bool:
        """Return whether the completion is whole."""
        return self is not StopReason.ABORT


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One item of one domain, ready to be sampled from."""

    domain: int
    """Index into the configuration's list of domains."""
    source: str
    """Name of the generator or file that the item came from."""
    index: int
    """Position of the item in its source: (source, index) identifies it."""
    token_ids: tuple[int, ...]
    entry: dict[str, Any]
    """What the verifier needs: question, answer, metadata."""


Routes = tuple[tuple[Tensor, ...], ...]
"""The experts that a pass used on a rank, by chunk and micro-batch: int16 [tokens of the rank, X of the chunk, K]."""


@dataclass(frozen=True, kw_only=True)
class Outline:
    """Hold what every rank knows of a completion, wherever it was sampled.

    versions: of the engine's weights that sampled it, ascending, each with its number of tokens
    """

    num_tokens: int
    stop_reason: StopReason
    versions: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sampled response, or the part of one that has been sampled so far.

    logprobs: the engine's, of the sampled tokens
    versions: of the engine's weights that sampled each token, ascending: a response may outlive a weight sync
    experts: those that the engine gave to every token but the last, which it never read, [prompt + response - 1, X, K];
        None where they were not asked for
    """

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    stop_reason: StopReason
    versions: Sequence[int]
    text: str = ""
    experts: Tensor | None = None

    @property
    def outline(self) -> Outline:
        """Return what other ranks are told of it."""
        versions = tuple((version, len(list(same))) for version, same in groupby(self.versions))
        return Outline(num_tokens=len(self.token_ids), stop_reason=self.stop_reason, versions=versions)


@dataclass(frozen=True, kw_only=True)
class RolloutGroup:
    """The G completions of one prompt. `rewards` and `correct` are empty until they are scored.

    completions: empty on the ranks that did not sample them
    told: outlines of the completions, once all ranks have been told of them
    holder: the rank that has the completions
    correct: whether the answer passed; penalties and format change the reward alone, so that the contrastive terms
        do not treat a correct answer that is too long as incorrect
    error: why its verifier failed; then no completion has a reward
    timed_out: the verifier failed because it took too long
    """

    prompt: Prompt
    completions: tuple[Completion, ...] = ()
    told: tuple[Outline, ...] = ()
    holder: int = 0
    rewards: tuple[float, ...] = ()
    correct: tuple[bool, ...] = ()
    error: str | None = None
    timed_out: bool = False

    @cached_property
    def outlines(self) -> tuple[Outline, ...]:
        """Return what is known of each completion on every rank."""
        return self.told or tuple(completion.outline for completion in self.completions)

    @property
    def has_nonzero_advantage(self) -> bool:
        """Return whether the rewards differ, so that advantages are not all 0; False where the verifier failed."""
        return self.error is None and len(set(self.rewards)) > 1


@dataclass(frozen=True, kw_only=True)
class RolloutLabels:
    """Domain, prompt and correctness of every rollout of a batch on all ranks, in the batch's order. All shapes [M]."""

    domain_M: Tensor
    prompt_M: Tensor
    correct_M: Tensor

    def __len__(self) -> int:
        return len(self.domain_M)

    def to(self, device: torch.device) -> "RolloutLabels":
        """Copy the labels to a device."""
        return RolloutLabels(
            domain_M=self.domain_M.to(device), prompt_M=self.prompt_M.to(device), correct_M=self.correct_M.to(device)
        )

    def select(self, rows: Tensor) -> "RolloutLabels":
        """Return the labels of some rollouts, given by a bool mask or by positions."""
        return RolloutLabels(domain_M=self.domain_M[rows], prompt_M=self.prompt_M[rows], correct_M=self.correct_M[rows])


@dataclass(frozen=True, kw_only=True)
class TrainBatch:
    """One data-parallel rank's share of the rollouts that one optimizer step learns from, ragged and unpadded.

    tokens_T: int64, prompt and response of every rollout, concatenated
    prompt_lens_N, response_lens_N: int64; their sum is a rollout's length, their total is T
    rows_N: int64, position of each rollout in the batch's order over all ranks (0..M-1), ascending
    engine_logp_R: fp32, the engine's log-prob of each response token
    experts_TXK: int16, those that the engine gave to each token, -1 for the last of a rollout; None: not asked for
    labels: domain, prompt and correctness of ALL rollouts of the batch (the same on every rank)
    num_response_tokens: R of the whole batch, over all ranks: the denominator of token means
    prompt_lens_M, response_lens_M: number of tokens of every rollout of the batch
    rank_rows: which of these rollouts each data-parallel rank holds; from all three every rank derives the same number
        of micro-batches, and where gathered rows belong
    shared_prompts: rollouts of a prompt are packed behind ONE copy of it
    """

    tokens_T: Tensor
    prompt_lens_N: Tensor
    response_lens_N: Tensor
    rows_N: Tensor
    engine_logp_R: Tensor
    labels: RolloutLabels
    num_response_tokens: int
    prompt_lens_M: tuple[int, ...]
    response_lens_M: tuple[int, ...]
    rank_rows: tuple[tuple[int, ...], ...]
    shared_prompts: bool
    experts_TXK: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows_N)

    @property
    def rollout_R(self) -> Tensor:
        """Return the number, among this rank's N, of the rollout that each response token belongs to: int64 [R]."""
        return torch.repeat_interleave(torch.arange(len(self)), self.response_lens_N)

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens of all rollouts on all ranks; a prompt counts once per rollout."""
        return sum(self.prompt_lens_M) + sum(self.response_lens_M)

    def check(self) -> None:
        """Assert the shapes that the legend gives."""
        n = len(self)
        assert self.prompt_lens_N.shape == self.response_lens_N.shape == (n,)
        assert self.tokens_T.shape == (int(self.prompt_lens_N.sum() + self.response_lens_N.sum()),)
        assert self.engine_logp_R.shape == (int(self.response_lens_N.sum()),)
        assert self.experts_TXK is None or len(self.experts_TXK) == len(self.tokens_T)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The results of a forward pass over a TrainBatch, without a graph.

    logp_R, entropy_R: fp32; z_ND: fp32, the head's output (None: the model has no head)
    version: of the weights behind them
    routes: the experts that were used; None: the model has none, or they are not replayed
    """

    logp_R: Tensor
    entropy_R: Tensor
    z_ND: Tensor | None
    version: int
    routes: Routes | None = None


@dataclass(frozen=True, kw_only=True)
class Update:
    """The outcome of one optimizer step.

    lr, head_lr: rates of the model and of the contrastive head; 0 where the update was skipped
    scores: of the forward pass, before the weights moved
    load_XE: int64, how many tokens of all ranks each expert was given, by layer; None: the model has no experts
    """

    grad_norm: float
    lr: float
    head_lr: float
    applied: bool
    """False where the gradient was not finite, so that no parameter has changed."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Sums over all micro-batches and data-parallel ranks, already divided by their global denominators."""
    scores: Scores
    load_XE: Tensor | None = None
