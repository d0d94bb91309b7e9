"""What the planner's predictions are measured against: a real trainer's rank."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from megatron_mcpo.config.config import Config
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.data.batch import make_batch
from megatron_mcpo.distributed import parallel
from megatron_mcpo.distributed.parallel import Groups
from megatron_mcpo.mcore.policy import Policy, Reference
from megatron_mcpo.types import Completion, Prompt, RolloutGroup, StopReason, TrainBatch
from tests.support import tiny_models

PROMPT, RESPONSE = 360, 240  # longer than attention's plain form, which is for short sequences on a CPU


Kind = Literal["llama", "qwen3", "experts"]


def save_model(folder: Path, kind: Kind) -> None:
    """Sizes that are multiples of 64: the padding of buffers is then none of the optimizer's."""
    shape: dict[str, Any] = dict(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
    )
    experts: dict[str, Any] = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=256, head_dim=64)
    torch.manual_seed(0)
    if kind == "llama":
        LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
    elif kind == "qwen3":
        Qwen3ForCausalLM(Qwen3Config(head_dim=64, **shape)).save_pretrained(folder)
    else:
        Qwen3MoeForCausalLM(Qwen3MoeConfig(norm_topk_prob=True, **experts, **shape)).save_pretrained(folder)


def config_of(folder: Path, **sections: dict[str, Any]) -> Config:
    merged: dict[str, dict[str, Any]] = {
        "batch": {"prompts": 4, "samples": 2, "micro_batch_tokens": 2 * (PROMPT + RESPONSE)},
        "rollout": {"max_prompt_tokens": PROMPT, "max_response_tokens": RESPONSE},
        "contrastive": {"dim": 64},
        **sections,
    }
    merged["model"] = {"dtype": "bf16"} | sections.get("model", {})
    return tiny_models.config(folder, **merged)


def rollouts(config: Config) -> list[RolloutGroup]:
    """All as long as the configuration allows, which is what the planner assumes."""
    completion = Completion(
        token_ids=tuple(range(1, RESPONSE + 1)),
        logprobs=(-1.0,) * RESPONSE,
        stop_reason=StopReason.STOP,
        versions=(0,) * RESPONSE,
    )
    return [
        RolloutGroup(
            prompt=Prompt(domain=0, source="", index=number, token_ids=tuple(range(1, PROMPT + 1)), entry={}),
            completions=(completion,) * config.batch.samples,
            rewards=(1.0,) * config.batch.samples,
            correct=(True,) * config.batch.samples,
        )
        for number in range(config.batch.prompts)
    ]


@dataclass(frozen=True)
class Trainer:
    """A real one on this rank, and its part of a step."""

    groups: Groups
    policy: Policy
    reference: Reference
    batch: TrainBatch

    @classmethod
    def of(cls, config: Config, world_size: int) -> Self:
        layout, model = config.layout(world_size), from_folder(Path(config.model.path))
        groups = parallel.init(layout, seed=0, timeout_seconds=60)
        batch = make_batch(
            rollouts(config), num_data_ranks=layout.data, data_rank=groups.data_rank, share_prompts=False
        )
        return cls(groups, Policy(config, model, groups), Reference(config, model, groups), batch)
