"""Make random models of real shapes, with rollouts and policies, for checks on the device of this machine.

On a CPU the shapes are small ones: rows are rehearsed there, so that a GPU does not spend its time on typing errors.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from benchmarks.gpu.outcome import Band, Target
from benchmarks.measure import memory
from megatron_mcpo.config.config import Config, ConfigError
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.data.batch import make_batch
from megatron_mcpo.distributed import parallel
from megatron_mcpo.distributed.device import device, uses_gpu
from megatron_mcpo.distributed.parallel import Groups
from megatron_mcpo.mcore.policy import LossFunction, LossInput, Policy, Reference
from megatron_mcpo.mcore.precision import check_fp8
from megatron_mcpo.types import Completion, Prompt, RolloutGroup, StopReason, TrainBatch
from tests.support import tiny_models


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a Qwen3 model, or of a Qwen3-MoE model: `ffn` is then the size of one of its experts."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False
    experts: int = 0
    experts_per_token: int = 0


SMALL = Shape(hidden=256, ffn=512, layers=4, heads=4, kv_heads=2, head_dim=64, vocab=1000)
MEDIUM = Shape(hidden=2048, ffn=6144, layers=8, heads=16, kv_heads=8, head_dim=128, vocab=8192)
"""Eight layers of Qwen3-1.7B's shapes, with a small vocabulary."""
QWEN3_0_6B = Shape(hidden=1024, ffn=3072, layers=28, heads=16, kv_heads=8, head_dim=128, vocab=151_936, tied=True)
QWEN3_1_7B = Shape(hidden=2048, ffn=6144, layers=28, heads=16, kv_heads=8, head_dim=128, vocab=151_936, tied=True)
QWEN3_8B_LAYERS = Shape(hidden=4096, ffn=12288, layers=8, heads=32, kv_heads=8, head_dim=128, vocab=8192)
"""Eight layers of Qwen3-8B's shapes and a small vocabulary: the whole model and its optimizer would not fit one GPU."""
QWEN3_30B_A3B_LAYERS = Shape(
    hidden=2048, ffn=768, layers=4, heads=32, kv_heads=4, head_dim=128, vocab=8192, experts=128, experts_per_token=8
)
"""Four layers of Qwen3-30B-A3B's shapes and a small vocabulary: 2.5 billion parameters in 1,570 tensors."""

FEW_EXPERTS = Shape(
    hidden=256, ffn=128, layers=2, heads=4, kv_heads=2, head_dim=64, vocab=1000, experts=8, experts_per_token=2
)


def sized[T](on_gpu: T, on_cpu: T) -> T:
    """Return what a row takes on this machine: the first on a GPU, the second, small one in a rehearsal on a CPU."""
    return on_gpu if uses_gpu() else on_cpu


def on_gpu[T: (Band, Target)](*checks: T) -> tuple[T, ...]:
    """Return bands or targets of speed, or of a GPU's memory; none on a CPU, where sizes are others."""
    return checks if uses_gpu() else ()


def alone() -> Groups:
    """Make this process the only rank."""
    return parallel.init(Layout(), seed=0, timeout_seconds=600)


def save_model(folder: Path, shape: Shape, *, dtype: torch.dtype, num_stop_tokens: int = 1) -> PreTrainedModel:
    """Make a random model and write it into `folder`. num_stop_tokens: the first tokens, which end a response"""
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=8192,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=list(range(num_stop_tokens)),
    )
    with device():
        model: Any = _random(shape, sizes)
        model.to(dtype)
    model.save_pretrained(folder)
    return model


def _random(shape: Shape, sizes: dict[str, Any]) -> PreTrainedModel:
    if not shape.experts:
        return Qwen3ForCausalLM(Qwen3Config(**sizes))
    mixture: dict[str, Any] = dict(
        num_experts=shape.experts,
        num_experts_per_tok=shape.experts_per_token,
        moe_intermediate_size=shape.ffn,
        norm_topk_prob=True,
    )
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **mixture))


def settings(
    folder: Path,
    *,
    tokens: int = 512,
    prompt: int = 60,
    response: int = 30,
    model: dict[str, str | bool] | None = None,
    engine: dict[str, float] | None = None,
    optimizer: dict[str, bool] | None = None,
) -> Config:
    """Return a configuration for a model folder.

    tokens: the most in a micro-batch; prompt, response: the longest; model, engine, optimizer: keys of these sections
    """
    return tiny_models.config(
        folder,
        model={"dtype": "bf16", **(model or {})},
        batch={"micro_batch_tokens": tokens},
        rollout={"max_prompt_tokens": prompt, "max_response_tokens": response},
        engine=engine or {},
        optimizer=optimizer or {},
    )


def reference(config: Config, groups: Groups) -> Reference:
    return Reference(config, from_folder(Path(config.model.path)), groups)


def policy(config: Config, groups: Groups) -> Policy:
    return Policy(config, from_folder(Path(config.model.path)), groups)


def rollouts(
    vocab: int, *, prompts: int, samples: int, prompt: tuple[int, int], response: tuple[int, int]
) -> list[RolloutGroup]:
    """Return groups of random tokens. prompt, response: shortest and longest"""
    generator = torch.Generator().manual_seed(0)

    def tokens(shortest: int, longest: int) -> tuple[int, ...]:
        length = int(torch.randint(shortest, longest + 1, (1,), generator=generator))
        return tuple(torch.randint(vocab, (length,), generator=generator).tolist())

    groups = []
    for number in range(prompts):
        asked = Prompt(domain=number % 3, source="random", index=number, token_ids=tokens(*prompt), entry={})
        answers = [tokens(*response) for _ in range(samples)]
        completions = tuple(
            Completion(
                token_ids=ids, logprobs=(-6.0,) * len(ids), stop_reason=StopReason.STOP, versions=(0,) * len(ids)
            )
            for ids in answers
        )
        correct = tuple(torch.randint(2, (samples,), generator=generator).bool().tolist())
        rewards = tuple(map(float, correct))
        groups.append(RolloutGroup(prompt=asked, completions=completions, rewards=rewards, correct=correct))
    return groups


def batch_of(groups: Sequence[RolloutGroup], learner: Policy | Reference) -> TrainBatch:
    return make_batch(groups, num_data_ranks=1, data_rank=0, share_prompts=learner.shares_prompts)


def signed_loss(batch: TrainBatch) -> LossFunction:
    """Return a loss: the mean over response tokens of -(+1 or -1 by rollout) log-prob."""
    sign_R = (1.0 - 2.0 * (torch.arange(len(batch)) % 2))[batch.rollout_R].to(device())

    def loss(x: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
        value = -(x.logp_r * sign_R[x.response_r]).sum() / batch.num_response_tokens
        return value, {"loss": value}

    return loss


def exact_logprobs(folder: Path, groups: Sequence[RolloutGroup]) -> Tensor:
    """Return the log-probs of all response tokens, computed by transformers in float64."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    model.to(device()).eval()
    found = []
    for group in groups:
        for completion in group.completions:
            ids = torch.tensor([(*group.prompt.token_ids, *completion.token_ids)], device=device())
            with torch.no_grad():
                logp = model(ids).logits[0].log_softmax(-1)
            first = len(group.prompt.token_ids)
            found.append(logp[first - 1 : -1].gather(1, ids[0, first:, None]).squeeze(1))
    return torch.cat(found)


def cosine(left: Tensor, right: Tensor) -> float:
    dot = (left * right).sum(dtype=torch.float64)
    return (dot / (norm(left) * norm(right))).item()


def norm(values: Tensor) -> float:
    return values.square().sum(dtype=torch.float64).sqrt().item()


def fp8_problem() -> str:
    """Return why layers can't compute in FP8 here; an empty text if they can."""
    try:
        for recipe in ("blockwise", "tensorwise"):
            check_fp8(recipe)
    except ConfigError as error:
        return "; ".join(error.problems)
    return ""


def bytes_in_use() -> int:
    """Return the bytes of torch's tensors on the GPU; on a CPU those of this process."""
    return torch.cuda.memory_allocated() if uses_gpu() else memory("VmRSS")


def make_deterministic() -> None:
    """Let torch, cuBLAS and Transformer Engine take only kernels that compute the same bits again, where they can."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    torch.use_deterministic_algorithms(True, warn_only=True)


def wait() -> None:
    """Wait until the device has finished its work."""
    if device().type == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object], *, repeats: int = 10, warm_up: int = 3) -> float:
    """Return the median seconds of a call, including the device's work."""
    for _ in range(warm_up):
        work()
    taken = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        work()
        wait()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)
