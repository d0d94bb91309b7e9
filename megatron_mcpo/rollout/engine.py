"""Define the interface between the trainer and an inference engine."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_mcpo.config.schema import HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE
from megatron_mcpo.types import Completion

NUM_SEEDS = 2**63
"""Seeds of completions are below this: vLLM keeps them as signed integers of 64 bits."""


@dataclass(frozen=True, kw_only=True)
class SamplingRequest:
    """One prompt to be completed `num_samples` times.

    Completion k uses the seed `seed + k`. Seeds are mandatory, because tensor-parallel engine ranks whose global
    generators differ would otherwise sample different tokens. A temperature of 0 is greedy; others are 0.01 to 2.
    """

    token_ids: Sequence[int]
    num_samples: int
    seed: int
    max_tokens: int
    temperature: float = 1.0
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The result of comparing the weights of an engine's rank with given tensors.

    different: names of the tensors whose values differ
    unread: names of the tensors that the engine keeps in a form that can't be read, so that nothing is known of them
    num_tensors: how many were compared
    """

    different: tuple[str, ...]
    unread: tuple[str, ...]
    num_tensors: int


class EngineError(RuntimeError):
    """The error of an engine that can no longer be used: it has to be rebuilt."""


class Engine(Protocol):
    """An inference engine as a rank of the trainer sees it. All ranks of one make the same calls in the same order."""

    version: int
    """The version of the weights that completions come from."""

    def generate(self, requests: Sequence[SamplingRequest]) -> list[tuple[Completion, ...]]:
        """Complete every request; return a tuple of `num_samples` completions per request, in order.

        Log-probs are those of the distribution that was sampled from (temperature applied).
        Raises EngineError while asleep and after a failed update.
        """

    def update(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> int:
        """Replace all weights by full (unsharded) tensors under their Hugging Face names; return the bytes received.

        Tied output embeddings are not sent. Raises EngineError on any failure, and on every later call.
        """

    def compare(self, named_tensors: Iterable[tuple[str, Tensor]]) -> Comparison:
        """Compare the weights that the engine computes with to these full tensors."""

    def sleep(self) -> None:
        """Release accelerator memory until `wake` (nothing to release on a CPU)."""

    def wake(self) -> None:
        """Undo `sleep`; the weights must then be sent again."""

    def close(self) -> None:
        """Free what the engine holds; it can't be used afterwards."""


def check_request(request: SamplingRequest, max_model_len: int) -> None:
    """Check a request. Raises ValueError if no engine with room for `max_model_len` tokens can serve it."""
    num_prompt = len(request.token_ids)
    if num_prompt == 0 or request.num_samples < 1 or request.max_tokens < 1:
        raise ValueError(
            f"{num_prompt} prompt tokens, num_samples = {request.num_samples}, max_tokens = {request.max_tokens}: must "
            "be at least 1; correct the request"
        )
    if request.temperature != 0 and not LOWEST_TEMPERATURE <= request.temperature <= HIGHEST_TEMPERATURE:
        raise ValueError(
            f"temperature = {request.temperature}: must be 0 or {LOWEST_TEMPERATURE} to {HIGHEST_TEMPERATURE}, which "
            "vLLM samples at; correct the request"
        )
    if not 0 <= request.seed <= NUM_SEEDS - request.num_samples:
        raise ValueError(
            f"seed = {request.seed}: must be at least 0 and leave room for {request.num_samples} seeds below 2**63; "
            "correct the request"
        )
    if num_prompt + request.max_tokens > max_model_len:
        raise ValueError(
            f"{num_prompt} prompt tokens + max_tokens = {request.max_tokens}: must not exceed the engine's "
            f"max_model_len = {max_model_len}; shorten the prompt, or build the engine with a larger max_model_len"
        )


def checked(
    named_tensors: Iterable[tuple[str, Tensor]], shapes: Mapping[str, tuple[int, ...]], arrived: dict[str, int]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of an update, each checked before an engine sees it.

    vLLM silently keeps the old value of a tensor that isn't sent, and loads garbage for a fused module of which only a
    part is sent. Names and shapes must therefore be exactly those of the checkpoint, else this raises EngineError.

    arrived: filled with the bytes of every tensor by name
    """
    for name, tensor in named_tensors:
        if name not in shapes:
            raise EngineError(f"{name}: must be a tensor of the checkpoint (tied output embeddings are not sent)")
        if name in arrived:
            raise EngineError(f"{name}: must be sent once, but was sent twice")
        if tuple(tensor.shape) != shapes[name]:
            raise EngineError(f"{name}: has shape {tuple(tensor.shape)}, must have {shapes[name]} as in the checkpoint")
        arrived[name] = tensor.numel() * tensor.element_size()
        yield name, tensor.detach()
    missing = sorted(set(shapes) - set(arrived))
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise EngineError(f"{len(missing)} of {len(shapes)} tensors were not sent: {', '.join(missing[:5])}{more}")
