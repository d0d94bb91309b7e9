"""MCPO (arXiv 2605.25443) on Megatron-Core: GRPO over several domains plus contrastive terms over rollout representations."""

__version__ = "0.1.0"
