"""The one interface between the trainer and an inference engine."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
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


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What an engine's rank found when it compared its weights with others.

    different: names of the tensors that it holds with other values
    unread: names of the tensors that it keeps in a form that can't be read, so that nothing is known of them
    num_tensors: how many it was asked about
    """

    different: tuple[str, ...]
    unread: tuple[str, ...]
    num_tensors: int


class EngineError(RuntimeError):
    """The engine can't be trusted or used any more: rebuild it."""


class Engine(Protocol):
    """Inference engines as a rank of the trainer sees them. All ranks of one make the same calls in the same order."""

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

    def compare(self, named_tensors: Iterable[tuple[str, Tensor]]) -> Comparison:
        """Hold the weights that the engine computes with against these full tensors."""

    def sleep(self) -> None:
        """Release accelerator memory until `wake` (nothing to release on a CPU)."""

    def wake(self) -> None:
        """Undo `sleep`; the weights must then be sent again."""

    def close(self) -> None:
        """Free what the engine holds; it can't be used any more."""


def check_request(request: SamplingRequest, max_model_len: int) -> None:
    """Raises ValueError for a request that no engine with room for `max_model_len` tokens can serve."""
    num_prompt = len(request.token_ids)
    if num_prompt == 0 or request.num_samples < 1 or request.max_tokens < 1 or request.temperature < 0:
        raise ValueError(
            f"{num_prompt} prompt tokens, num_samples {request.num_samples}, max_tokens {request.max_tokens}, "
            f"temperature {request.temperature}: need at least one of each, and a temperature of 0 or more"
        )
    if num_prompt + request.max_tokens > max_model_len:
        raise ValueError(
            f"{num_prompt} prompt tokens + max_tokens {request.max_tokens} exceed the engine's max_model_len "
            f"{max_model_len}: shorten the prompt or build the engine with a larger one"
        )


def checked(
    named_tensors: Iterable[tuple[str, Tensor]], shapes: Mapping[str, tuple[int, ...]], arrived: dict[str, int]
) -> Iterator[tuple[str, Tensor]]:
    """Pass the tensors of an update on, each checked before an engine sees it; bytes by name end in `arrived`.

    vLLM keeps the old value of a tensor that isn't sent and loads garbage for a fused module of which only a part is
    sent, without a word: names and shapes must be exactly those of the checkpoint. Raises EngineError.
    """
    for name, tensor in named_tensors:
        if name not in shapes:
            raise EngineError(f"{name}: is no tensor of the checkpoint (tied output embeddings are not sent)")
        if name in arrived:
            raise EngineError(f"{name}: was sent twice")
        if tuple(tensor.shape) != shapes[name]:
            raise EngineError(f"{name}: has shape {tuple(tensor.shape)}, the checkpoint has {shapes[name]}")
        arrived[name] = tensor.numel() * tensor.element_size()
        yield name, tensor.detach()
    missing = sorted(set(shapes) - set(arrived))
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise EngineError(f"{len(missing)} of {len(shapes)} tensors were not sent: {', '.join(missing[:5])}{more}")
