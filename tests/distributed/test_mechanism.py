"""The contrastive terms act: on a real model, correct rollouts of two domains that share a rule come to be alike.

Each domain has tokens of its own, and a rollout is correct if its tokens are even. Nothing in the untrained model
relates the even tokens of one domain to those of the other: only the terms can.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_mcpo.algo.ranking import cross_domain_ranking
from megatron_mcpo.config.config import Config
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.data.batch import make_batch
from megatron_mcpo.distributed import parallel
from megatron_mcpo.mcore.policy import Policy
from megatron_mcpo.trainer.objective import Objective, Prepared, Scored
from megatron_mcpo.types import Completion, Prompt, RolloutGroup, StopReason
from tests.support import tiny_models
from tests.support.ranks import run_ranks

STEPS = 300
MODEL_LR = 5e-6
TOKENS = (range(0, 48), range(48, 96))
"""Of each domain."""


def rollouts(seed: int) -> list[RolloutGroup]:
    """Four prompts of either domain with four rollouts each, two of them correct."""
    random = torch.Generator().manual_seed(seed)

    def draw(domain: int, *, even: bool, count: int) -> tuple[int, ...]:
        pick = torch.randint(0, 24, (count,), generator=random)
        return tuple((TOKENS[domain].start + 2 * pick + (0 if even else 1)).tolist())

    groups = []
    for number in range(8):
        domain = number % 2
        prompt = Prompt(domain=domain, source="", index=number, token_ids=draw(domain, even=True, count=3), entry={})
        correct = (True, False, True, False)
        completions = tuple(
            Completion(
                token_ids=draw(domain, even=even, count=4),
                logprobs=(-4.0,) * 4,
                stop_reason=StopReason.STOP,
                versions=(0,) * 4,
            )
            for even in correct
        )
        groups.append(
            RolloutGroup(prompt=prompt, completions=completions, rewards=tuple(map(float, correct)), correct=correct)
        )
    return groups


def prepared(objective: Objective, seed: int) -> Prepared:
    groups = rollouts(seed)
    batch = make_batch(groups, num_data_ranks=1, data_rank=0, share_prompts=True)
    scored = Scored(groups=groups, batch=batch, old=objective.policy.score(batch), reference_logp_R=None)
    return objective.prepare(scored, step=seed + 1)


def ranking(objective: Objective) -> tuple[float, float]:
    """The ranking across domains and the gain of the cross-domain term, on rollouts that were not trained on."""
    found = prepared(objective, 10_000)
    assert found.contrasted is not None
    contrast = found.contrasted.contrast
    auc_M = cross_domain_ranking(found.contrasted.z_MD, found.scored.batch.labels, contrast.used_M).auc_M
    return auc_M.nanmean().item(), contrast.gain_cross_domain_M[contrast.valid_cross_domain_M].mean().item()


def train(config: Config, with_terms: bool) -> tuple[tuple[float, float], tuple[float, float]]:
    ranks = parallel.init(Layout(), seed=0, timeout_seconds=120)
    objective = Objective(config, Policy(config, from_folder(Path(config.model.path)), ranks), ranks)
    before = ranking(objective)
    for step in range(STEPS):
        step_data = prepared(objective, step)
        used = step_data if with_terms else replace(step_data, contrasted=None)
        objective.policy.update(step_data.scored.batch, objective.loss(used))
    return before, ranking(objective)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_models.save_model(path, "tied", num_layers=2)
    return path


def trained(folder: Path, *, with_terms: bool, **optimizer: float) -> tuple[tuple[float, float], tuple[float, float]]:
    sections: dict[str, Any] = {
        "run": {"steps": STEPS},
        "batch": {"prompts": 8, "samples": 4, "micro_batch_tokens": 1024},
        "algorithm": {"kl_weight": 0.0},
        "optimizer": {"lr": MODEL_LR, **optimizer},
    }
    return run_ranks(1, train, tiny_models.config(folder, **sections), with_terms)[0]


def test_with_the_default_rate_of_the_head_correct_rollouts_of_domains_become_alike(folder: Path) -> None:
    (before, _), (after, gain) = trained(folder, with_terms=True)
    assert before == pytest.approx(0.5, abs=0.1)
    assert after > 0.8
    assert gain > 0


def test_without_the_terms_they_do_not(folder: Path) -> None:
    _, (after, _) = trained(folder, with_terms=False)
    assert after == pytest.approx(0.5, abs=0.1)


def test_a_head_that_learns_as_slowly_as_the_model_does_not_bring_them_together(folder: Path) -> None:
    """Why the head has a rate of its own."""
    _, (after, _) = trained(folder, with_terms=True, head_lr=MODEL_LR)
    assert after < 0.6
