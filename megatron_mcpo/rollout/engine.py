"""The one interface between the trainer and an inference engine."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_mcpo.types import Completion


@dataclass(frozen=True, kw_only=True)
class SamplingRequest:
    """One prompt to be completed `num_samples` times.

    Completion k uses the seed `seed + k`: seeds are mandatory, because tensor-parallel engine ranks whose global
    generators differ would otherwise sample different tokens.
    temperature 0 is greedy.
    """

    token_ids: Sequence[int]
    num_samples: int
    seed: int
    max_tokens: int
    temperature: float = 1.0
    stop_token_ids: tuple[int, ...] = ()


class EngineError(RuntimeError):
    """The engine can't be trusted or used any more: rebuild it."""


class Engine(Protocol):
    """An inference engine in the trainer's process. All ranks of an engine make the same calls in the same order."""

    version: int
    """Version of the weights that completions come from."""

    def generate(self, requests: Sequence[SamplingRequest]) -> list[tuple[Completion, ...]]:
        """Complete every request; one tuple of `num_samples` completions each, in order.

        Log-probs are those of the distribution that was sampled from (temperature applied).
        Raises EngineError when asleep or after a failed update.
        """

    def update(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> int:
        """Replace ALL weights by full (unsharded) tensors under their Hugging Face names; returns bytes received.

        Tied output embeddings are not sent. Raises EngineError on any failure, and on every later call.
        """

    def mismatches(self, named_tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
        """Names of the tensors that the engine holds with other values than these (diagnosis after a failed canary)."""

    def sleep(self) -> None:
        """Release accelerator memory until `wake` (nothing to release on a CPU)."""

    def wake(self) -> None:
        """Undo `sleep`; the weights must then be sent again."""

    def close(self) -> None:
        """Free what the engine holds; it can't be used any more."""
