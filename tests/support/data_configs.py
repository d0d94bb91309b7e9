"""Configurations with given domains, for tests of data."""

from typing import Any

from megatron_mcpo.config.config import Config


def make_config(*domains: dict[str, Any], seed: int = 0, max_prompt_tokens: int = 512) -> Config:
    return Config.model_validate(
        {
            "run": {"steps": 1, "seed": seed},
            "model": {"path": "model"},
            "batch": {"prompts": 4, "samples": 2},
            "optimizer": {"lr": 1e-5},
            "rollout": {"max_prompt_tokens": max_prompt_tokens},
            "evaluation": {"items": 10},
            "domain": list(domains),
        }
    )
