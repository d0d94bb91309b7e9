"""Measure what routing replay changes: how far engine and trainer are apart, and how long a step takes.

`.venv/bin/python -m benchmarks.router_replay [--json] [--out benchmarks/results/NAME.json]`
Small random models with experts, in bf16, sampled by vLLM and scored by Megatron-Core with the same weights. Their
routers choose closely, as those of no trained model do, so that every figure is a worst case.
"""

import gc
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from benchmarks.measure import options, timed, write_rows
from megatron_mcpo.config.config import Config
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.data.batch import make_batch
from megatron_mcpo.distributed import cpu_bf16, parallel
from megatron_mcpo.mcore.policy import LossInput, Policy
from megatron_mcpo.rollout.engine import SamplingRequest
from megatron_mcpo.rollout.vllm_engine import VllmEngine
from megatron_mcpo.types import Prompt, RolloutGroup, Routes, TrainBatch

PROMPTS, SAMPLES, PROMPT, RESPONSE = 8, 4, 24, 64
REPEATS = 8
MODES = ("off", "trainer", "engine")
_SHAPE: dict[str, Any] = dict(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=128,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=256,
    initializer_range=0.08,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=0,
)
_MODELS: dict[str, tuple[type[PreTrainedModel], PretrainedConfig]] = {
    "qwen3_moe, 8 of 64": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(num_experts=64, num_experts_per_tok=8, moe_intermediate_size=64, norm_topk_prob=True, **_SHAPE),
    ),
    "mixtral, 2 of 8": (MixtralForCausalLM, MixtralConfig(num_local_experts=8, num_experts_per_tok=2, **_SHAPE)),
}


def main(arguments: Sequence[str]) -> int:
    return write_rows("router_replay", rows(), options(__doc__).parse_args(arguments))


def rows() -> Iterator[dict[str, Any]]:
    """Yield a row per model and mode.

    mismatch_*: of the log-probs of engine and scoring pass, in nats: mean and 99.9th percentile of the absolute
        difference, and the estimate k3 of the KL divergence
    choices_changed: share of tokens and layers that the scoring pass would give other experts than the engine did
    ratio_p999: 99.9th percentile of the absolute log-ratio of a token after an update, before any clipping
    overhead: seconds of a scoring pass and an update, over those without replay, less 1
    bytes_per_token: what the rollouts carry
    """
    cpu_bf16.apply()
    groups = parallel.init(Layout(), seed=0, timeout_seconds=600)
    for name in _MODELS:
        with TemporaryDirectory() as folder:
            yield from _of_model(name, Path(folder), groups)
    parallel.destroy()


def _of_model(name: str, folder: Path, groups: parallel.Groups) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    kind, shape = _MODELS[name]
    model: Any = kind(shape)
    model.to(torch.bfloat16).save_pretrained(folder)
    rollouts = _sampled(folder)
    batches = {
        mode: make_batch(_without(rollouts, mode), num_data_ranks=1, data_rank=0, share_prompts=False) for mode in MODES
    }
    policies = {mode: Policy(_config(folder, mode), from_folder(folder), groups) for mode in MODES}
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    found: dict[str, dict[str, float]] = {}
    routes: dict[str, Routes | None] = {}
    for repeat in range(1 + REPEATS):
        for mode, policy in policies.items():
            measured = _Step(policy, batches[mode])
            taken = timed(measured.run)
            if repeat == 0:
                found[mode], routes[mode] = measured.figures(), measured.before.routes
            else:
                seconds[mode].append(taken)
    engine = batches["engine"].experts_TXK
    assert engine is not None
    for mode in MODES:
        yield {
            "model": name,
            "replay": mode,
            **found[mode],
            "choices_changed": _share_changed(routes["engine" if mode == "engine" else "trainer"], engine),
            "overhead": round(min(seconds[mode]) / min(seconds["off"]) - 1, 3),
            "bytes_per_token": engine[0].numel() if mode == "engine" else 0,
        }


class _Step:
    """A scoring pass, an update, and a second scoring pass with the experts that an update would use."""

    def __init__(self, policy: Policy, batch: TrainBatch):
        self.policy = policy
        self.batch = batch

    def run(self) -> None:
        self.before = self.policy.score(self.batch)
        self.policy.update(self.batch, self._loss, routes=self.before.routes)

    def figures(self) -> dict[str, float]:
        engine_R = self.batch.engine_logp_R
        apart_R = self.before.logp_R.cpu() - engine_R
        after_R = self.policy.score(self.batch, routes=self.before.routes).logp_R
        return {
            "mismatch_mean": apart_R.abs().mean().item(),
            "mismatch_p999": apart_R.abs().quantile(0.999).item(),
            "mismatch_kl": (apart_R.exp() - 1 - apart_R).mean().item(),
            "ratio_p999": (after_R - self.before.logp_R).abs().quantile(0.999).item(),
        }

    def _loss(self, given: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
        sign_r = torch.where(given.response_r % 2 == 0, 1.0, -1.0)  # half of the tokens gain, half lose
        return (sign_r * given.logp_r).sum() / self.batch.num_response_tokens, {}


def _sampled(folder: Path) -> list[RolloutGroup]:
    engine = VllmEngine(
        folder,
        dtype="bf16",
        quantization="none",
        tensor_parallel=1,
        max_model_len=PROMPT + RESPONSE,
        max_concurrent=PROMPTS * SAMPLES,
        kv_cache_gib=0.05,
        gpu_memory_utilization=0.3,
        distributed=True,
        job_tag="router-replay",
        load_weights=True,
        routed_experts=True,
    )
    draw = random.Random(0)
    prompts = [tuple(draw.randrange(1, _SHAPE["vocab_size"]) for _ in range(PROMPT)) for _ in range(PROMPTS)]
    completions = engine.generate(
        [
            SamplingRequest(token_ids=tokens, num_samples=SAMPLES, seed=SAMPLES * number, max_tokens=RESPONSE)
            for number, tokens in enumerate(prompts)
        ]
    )
    engine.close()
    gc.collect()
    return [
        RolloutGroup(
            prompt=Prompt(domain=0, source="made up", index=number, token_ids=tokens, entry={}),
            completions=of_prompt,
            rewards=(0.0,) * SAMPLES,
            correct=(False,) * SAMPLES,
        )
        for number, (tokens, of_prompt) in enumerate(zip(prompts, completions, strict=True))
    ]


def _without(rollouts: Sequence[RolloutGroup], mode: str) -> list[RolloutGroup]:
    """Return the rollouts as the mode carries them: with the engine's experts or without."""
    if mode == "engine":
        return list(rollouts)
    return [replace(g, completions=tuple(replace(c, experts=None) for c in g.completions)) for g in rollouts]


def _config(folder: Path, mode: str) -> Config:
    return Config.model_validate(
        {
            "run": {"steps": 100},
            "model": {"path": str(folder), "dtype": "bf16", "router_replay": mode},
            "batch": {
                "prompts": PROMPTS,
                "samples": SAMPLES,
                "micro_batch_tokens": PROMPTS * SAMPLES * (PROMPT + RESPONSE),
            },
            "rollout": {"max_prompt_tokens": PROMPT, "max_response_tokens": RESPONSE},
            "contrastive": {"cross_domain_weight": 0.0, "in_domain_weight": 0.0},
            "optimizer": {"lr": 1e-4},
            "domain": [{"name": "made_up", "sources": [{"generator": "chain_sum"}]}],
        }
    )


def _share_changed(routes: Routes | None, engine_TXK: Tensor) -> float:
    """Return the share of tokens and layers whose experts differ, as sets. All rollouts are in one micro-batch."""
    assert routes is not None
    [[chosen_TXK]] = routes
    known_T = engine_TXK[:, 0, 0] >= 0
    differ_TX = (chosen_TXK.cpu().sort(-1).values != engine_TXK.sort(-1).values).any(-1)
    return differ_TX[known_T].float().mean().item()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
