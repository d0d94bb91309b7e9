"""Make small real inputs for checks of the trainer: Hugging Face folders of random models, configurations, rollouts."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.utils import logging

from megatron_mcpo.config.config import Config
from megatron_mcpo.types import Completion, Prompt, RolloutGroup, StopReason

VOCAB = 97  # divisible by no number of ranks, so that padding must be left out
HIDDEN = 72  # divisible by 4 heads and by 9
MAX_PROMPT, MAX_RESPONSE = 19, 8
EXPERTS = 4

Kind = Literal["tied", "untied", "experts"]
"""Llama with tied embeddings, Qwen3 with untied ones, Qwen3-MoE with four experts of which a token gets two."""


def save_model(
    folder: Path,
    kind: Kind,
    *,
    num_layers: int = 4,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    seed: int = 0,
    sure: bool = False,
) -> PreTrainedModel:
    """Make a random model in fp32 and write it. sure: rounding to bf16 never changes the experts of a token"""
    shape: dict[str, Any] = dict(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=128,
        tie_word_embeddings=kind == "tied",
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(seed)
    model = _model(kind, shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter)) if parameter.dim() == 1 else parameter.mul_(3.0)
    if sure and kind == "experts":
        _make_sure(model)
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    return model


def _model(kind: Kind, shape: dict[str, Any]) -> PreTrainedModel:
    if kind == "tied":
        return LlamaForCausalLM(LlamaConfig(**shape))
    if kind == "untied":
        return Qwen3ForCausalLM(Qwen3Config(head_dim=16, **shape))
    experts: dict[str, Any] = dict(
        num_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=40, norm_topk_prob=True, head_dim=16
    )
    config = Qwen3MoeConfig(**experts, **shape)
    config._experts_implementation = "eager"  # other implementations have no kernel for float64
    return Qwen3MoeForCausalLM(config)


@torch.no_grad()
def _make_sure(model: Any) -> None:
    """Let only the embedding determine a token's experts, in a channel for each of them, in steps of 0.3.

    No layer writes into these channels, so that a token prefers the experts in the same order in all layers. The norm
    divides the steps by about 1 or less, the router doubles them: the difference from one expert to the next is 0.5 or
    more, a hundred times what bf16 rounds off.
    """
    orders = torch.tensor(list(itertools.permutations(range(EXPERTS))))
    model.model.embed_tokens.weight[:, :EXPERTS] = 0.3 * orders[torch.arange(VOCAB) % len(orders)]
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[:EXPERTS] = 0.0
        layer.mlp.experts.down_proj[:, :EXPERTS] = 0.0
        layer.post_attention_layernorm.weight[:EXPERTS] = 1.0
        layer.mlp.gate.weight.mul_(0.1)
        layer.mlp.gate.weight[:, :EXPERTS] = 2.0 * torch.eye(EXPERTS)


def as_saved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's tensors (or their gradients) with the names and shapes that they have in its files.

    In memory transformers 5 keeps all experts of a layer in one tensor: gate_up_proj [E, 2F, H], down_proj [E, H, F].
    """
    saved: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        prefix, _, kind = name.rpartition(".")
        if kind not in ("gate_up_proj", "down_proj"):
            saved[name] = tensor
            continue
        for number, expert in enumerate(tensor):
            names = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
            for part, values in zip(names, expert.chunk(len(names)), strict=True):
                saved[f"{prefix}.{number}.{part}.weight"] = values
    return saved


def config(folder: Path, **sections: dict[str, Any]) -> Config:
    """Return a configuration for a model folder; keyword arguments replace keys of whole sections."""
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
    """Return groups of random tokens of uneven lengths over three domains, with mixed outcomes."""
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
                Completion(
                    token_ids=ids, logprobs=tuple(logprobs), stop_reason=StopReason.STOP, versions=(0,) * len(ids)
                )
            )
        correct = tuple(torch.randint(0, 2, (num_samples,), generator=generator).bool().tolist())
        prompt_ids = tokens(shortest_prompt, MAX_PROMPT)
        prompt = Prompt(domain=number % 3, source="random", index=number, token_ids=prompt_ids, entry={})
        groups.append(
            RolloutGroup(
                prompt=prompt, completions=tuple(completions), rewards=tuple(map(float, correct)), correct=correct
            )
        )
    return groups


def uneven(groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
    """Return the same groups, with every second one shorter by a rollout and a penalty that grows within a group."""
    cut = [slice(None, None if number % 2 else -1) for number in range(len(groups))]
    return [
        replace(
            group,
            completions=group.completions[part],
            rewards=tuple(max(0.0, reward - 0.3 * late) for late, reward in enumerate(group.rewards[part])),
            correct=group.correct[part],
        )
        for group, part in zip(groups, cut, strict=True)
    ]


def with_experts(groups: Sequence[RolloutGroup], *, num_layers: int, seed: int = 0) -> list[RolloutGroup]:
    """Return the same groups with random experts of every token, other ones than the routers would choose."""
    generator = torch.Generator().manual_seed(seed)

    def choices(num_tokens: int) -> Tensor:
        return torch.rand(num_tokens, num_layers, EXPERTS, generator=generator).topk(2).indices.to(torch.uint8)

    found = []
    for group in groups:
        prompt = choices(len(group.prompt.token_ids))
        completions = [
            replace(c, experts=torch.cat([prompt, choices(len(c.token_ids))])[:-1]) for c in group.completions
        ]
        found.append(replace(group, completions=tuple(completions)))
    return found


def other_logprobs(groups: Sequence[RolloutGroup], *, seed: int) -> list[Tensor]:
    """Return log-probs of another policy than the engine's, so different that clips and caps apply; one per rollout."""
    generator = torch.Generator().manual_seed(seed)
    engine = [torch.tensor(completion.logprobs) for group in groups for completion in group.completions]
    return [logp + 0.4 * torch.randn(logp.shape, generator=generator) for logp in engine]
