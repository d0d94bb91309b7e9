"""Name the settings that gradient_table.py checks gradients with: together they use every part of the objective."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to configure and pack a step.

    shortest_prompt: if it exceeds half of a micro-batch, no two rollouts share one
    uneven: groups of different sizes, and correct answers whose rewards are less than 1
    updated: the optimizer's update is checked, too
    replays: a model with experts gives the tokens those that an engine chose
    """

    name: str
    sections: dict[str, dict[str, Any]]
    share_prompts: bool
    shortest_prompt: int = 3
    uneven: bool = False
    updated: bool = False
    replays: bool = False


VARIANTS = [
    Variant(
        name="one rollout per micro-batch",
        sections={"batch": {"micro_batch_tokens": 32}},
        share_prompts=False,
        shortest_prompt=17,
    ),
    Variant(
        name="few rollouts, recomputed, sequence means, rloo, mlp head on the last token, centred",
        sections={
            "batch": {"micro_batch_tokens": 64},
            "model": {"recompute": "full"},
            "rollout": {"temperature": 0.8},
            "algorithm": {"aggregation": "seq_mean_token_mean", "advantage": "rloo"},
            "contrastive": {"head": "mlp", "pool": "last", "center": "prompt"},
        },
        share_prompts=True,
        updated=True,
        replays=True,
    ),
    Variant(
        name="all rollouts in one micro-batch, per_domain, k2, all rivals of the domain",
        sections={
            "batch": {"micro_batch_tokens": 4096},
            "algorithm": {"advantage": "per_domain", "kl_estimator": "k2"},
            "contrastive": {"negatives": "domain", "denominator": "all"},
        },
        share_prompts=True,
        updated=True,
    ),
    Variant(
        name="contrastive reward, recomputed, dr_grpo, cispo, mask, k2",
        sections={
            "batch": {"micro_batch_tokens": 64},
            "model": {"recompute": "selective"},
            "algorithm": {
                "advantage": "dr_grpo",
                "aggregation": "dr_grpo",
                "clip": "cispo",
                "importance": "mask",
                "kl_estimator": "k2",
            },
            "contrastive": {
                "mode": "reward",
                "cross_domain_weight": 0.1,
                "in_domain_weight": 0.05,
            },  # some of them capped
        },
        share_prompts=False,
        replays=True,
    ),
    Variant(
        name="one ratio per rollout, uneven groups with penalties",
        sections={"batch": {"micro_batch_tokens": 64}, "algorithm": {"clip": "gspo"}},
        share_prompts=True,
        uneven=True,
    ),
]
