"""Small real things to check the trainer with: Hugging Face folders of random models, configurations, rollouts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megatron_mcpo.config import Config
from megatron_mcpo.types import Completion, Prompt, RolloutGroup, StopReason

VOCAB = 97  # divides over no number of ranks: the padding must not take part
HIDDEN = 72  # divides over 4 heads and over 9
MAX_PROMPT, MAX_RESPONSE = 19, 8


def save_model(
    folder: Path, *, tied: bool, num_layers: int = 4, num_heads: int = 4, num_kv_heads: int = 2, seed: int = 0
) -> PreTrainedModel:
    """A random model in fp32: Llama with tied embeddings, Qwen3 with untied ones."""
    shape: dict[str, Any] = dict(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(seed)
    config: PretrainedConfig = LlamaConfig(**shape) if tied else Qwen3Config(head_dim=16, **shape)
    model: PreTrainedModel = LlamaForCausalLM(config) if tied else Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter)) if parameter.dim() == 1 else parameter.mul_(3.0)
    model.save_pretrained(folder)
    return model


def config(folder: Path, **sections: dict[str, Any]) -> Config:
    """A configuration around a model folder; keyword arguments replace keys of whole sections."""
    values: dict[str, Any] = {
        "run": {"steps": 4},
        "model": {"path": str(folder), "dtype": "fp32"},
        "batch": {"prompts": 6, "samples": 3, "micro_batch_tokens": 64},
        "rollout": {"max_prompt_tokens": MAX_PROMPT, "max_response_tokens": MAX_RESPONSE},
        "optimizer": {"lr": 1e-3},
        "contrastive": {"dim": 16},
        "domain": [{"name": name, "sources": [{"generator": "chain_sum"}]} for name in ("red", "green", "blue")],
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return Config.model_validate(values)


def rollout_groups(
    *, num_prompts: int, num_samples: int, shortest_prompt: int = 3, seed: int = 0
) -> list[RolloutGroup]:
    """Groups of random tokens of uneven lengths over three domains, with mixed outcomes."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(shortest: int, longest: int) -> tuple[int, ...]:
        length = int(torch.randint(shortest, longest + 1, (1,), generator=generator))
        return tuple(torch.randint(0, VOCAB, (length,), generator=generator).tolist())

    groups = []
    for number in range(num_prompts):
        completions = []
        for _ in range(num_samples):
            ids = tokens(1, MAX_RESPONSE)
            logprobs = (-3 - 2 * torch.rand(len(ids), generator=generator)).tolist()
            completions.append(
                Completion(token_ids=ids, logprobs=tuple(logprobs), stop_reason=StopReason.STOP, version=0)
            )
        rewards = torch.randint(0, 2, (num_samples,), generator=generator).tolist()
        prompt_ids = tokens(shortest_prompt, MAX_PROMPT)
        prompt = Prompt(domain=number % 3, source="random", index=number, token_ids=prompt_ids, entry={})
        groups.append(
            RolloutGroup(prompt=prompt, completions=tuple(completions), rewards=tuple(float(r) for r in rewards))
        )
    return groups


def other_logprobs(groups: Sequence[RolloutGroup], *, seed: int) -> list[Tensor]:
    """Log-probs of another policy than the engine's, far enough that clips and caps are hit: a tensor a rollout."""
    generator = torch.Generator().manual_seed(seed)
    engine = [torch.tensor(completion.logprobs) for group in groups for completion in group.completions]
    return [logp + 0.4 * torch.randn(logp.shape, generator=generator) for logp in engine]
