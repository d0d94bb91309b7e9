"""MCPO (arXiv 2605.25443) on Megatron-Core: GRPO over several domains, contrastive terms over rollouts."""

__version__ = "0.1.0"
