"""Rollouts of older weights: what of them may be old when a step learns from them, and what may not."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_mcpo.config.layout import Layout
from megatron_mcpo.data.batch import make_batch
from megatron_mcpo.trainer.objective import Objective, Scored
from tests.support import tiny_models
from tests.support.checkpoints import build, learn
from tests.support.ranks import run_ranks


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_models.save_model(folder, "tied", num_layers=2)
    return folder


def test_contrastive_terms_use_the_weights_that_learn_whatever_sampled_the_rollouts(model: Path) -> None:
    run_ranks(1, _learn_from_old_and_new, model)


def _learn_from_old_and_new(model: Path) -> None:
    """The same tokens, as if all, some or none of them had been sampled two steps ago."""
    config = tiny_models.config(model)
    policy = build(config, Layout())
    groups = tiny_models.rollout_groups(num_prompts=6, num_samples=3)
    for seed in range(2):
        learn(policy, seed)
    objective = Objective(config, policy, policy.groups)
    found = []
    for version in (2, 0, 1):
        aged = [
            replace(
                group, completions=tuple(replace(c, versions=(version,) * len(c.token_ids)) for c in group.completions)
            )
            for group in groups
        ]
        batch = make_batch(aged, num_data_ranks=1, data_rank=0, share_prompts=policy.shares_prompts)
        prepared = objective.prepare(
            Scored(groups=aged, batch=batch, old=policy.score(batch), reference_logp_R=None), step=3
        )
        assert prepared.contrasted is not None
        assert prepared.representation_version == policy.version == 2
        found.append(prepared.contrasted.z_MD)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])

    # Scores of older weights are not used: the batch is scored again.
    stale = Scored(groups=groups, batch=batch, old=policy.score(batch), reference_logp_R=None)
    learn(policy, 3)
    fresh = objective.prepare(stale, step=4)
    assert fresh.contrasted is not None and fresh.representation_version == policy.version == 3
    assert not torch.equal(fresh.contrasted.z_MD, found[0])
    now = policy.score(batch).z_ND
    assert now is not None
    torch.testing.assert_close(fresh.contrasted.head_MD[batch.rows_N], now)
