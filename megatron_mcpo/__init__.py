"""MCPO (arXiv 2605.25443) on Megatron-Core: GRPO over several domains, contrastive terms over rollouts."""

from megatron_mcpo.config.environment import hide_gpu

__version__ = "0.2.0"

hide_gpu()
