"""The gradient of the whole objective, on the real Megatron model, against a plain one-process float64 reference.

Not covered here: other options of the objective (test_policy_loss, test_contrastive), the transport of weights to the
engine (test_vllm_engine), bf16, GPUs.
"""

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.gradient_table import (
    BOUND,
    HEAD,
    LAYOUTS,
    MODELS,
    VARIANTS,
    Case,
    check,
    expected_gradients,
    make_cases,
    make_config,
    models_for,
    score,
)
from megatron_mcpo.algo.advantage import ESTIMATORS
from megatron_mcpo.algo.contrastive import contrastive
from megatron_mcpo.config.config import Config
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.data.batch import make_batch
from megatron_mcpo.distributed import parallel
from megatron_mcpo.mcore.packing import num_micro_batches
from megatron_mcpo.mcore.policy import Policy
from megatron_mcpo.trainer.gradient_diagnostics import domain_gradients, term_gradients
from megatron_mcpo.trainer.objective import Contrasted, Objective, Scored
from megatron_mcpo.types import RolloutGroup, RolloutLabels
from tests.support import reference, tiny_models
from tests.support.ranks import run_ranks


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Case]]:
    return {model: make_cases(tmp_path_factory.mktemp("models"), model) for model in MODELS}


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradient_equals_the_reference(cases: dict[str, list[Case]], name: str) -> None:
    layout, number = LAYOUTS[name], list(LAYOUTS).index(name)
    assert_exact(check(layout, [case for model in models_for(layout) for case in in_turns(cases[model], number)]))


def in_turns(cases: list[Case], number: int) -> list[Case]:
    """Return every variant with one kind of model, another one for the next number; `benchmarks.gradient_table` tries
    every variant with every kind."""
    num_kinds = len(cases) // len(VARIANTS)
    places = [divmod(place, len(VARIANTS)) for place in range(len(cases))]
    return [case for case, place in zip(cases, places, strict=True) if (sum(place) + number) % num_kinds == 0]


def assert_exact(errors: dict[tuple[str, str], float]) -> None:
    (case, parameter), error = max(errors.items(), key=lambda item: item[1])
    assert error <= BOUND, f"{parameter}: relative error {error:.2e} ({case})"


def test_variants_cover_what_they_say(cases: dict[str, list[Case]]) -> None:
    configs = [case.config for case in cases["halves"]]
    assert {c.model.recompute for c in configs} == {"none", "selective", "full"}
    assert {c.algorithm.aggregation for c in configs} == {"token_mean", "seq_mean_token_mean", "dr_grpo"}
    assert {(c.algorithm.clip, c.algorithm.importance) for c in configs} == {
        ("ppo", "truncate"), ("gspo", "truncate"), ("cispo", "mask")
    }  # fmt: skip
    assert {c.algorithm.advantage for c in configs} == ESTIMATORS.keys()
    assert {c.algorithm.kl_estimator for c in configs} == {"k2", "k3"}
    assert {c.contrastive.mode for c in configs} == {"loss", "reward"}
    assert {(c.contrastive.negatives, c.contrastive.denominator) for c in configs} == {
        ("pool", "negatives"), ("domain", "all")
    }  # fmt: skip
    assert {(c.contrastive.head, c.contrastive.pool) for c in configs} == {("linear", "mean"), ("mlp", "last")}
    counts = []
    for case in cases["halves"]:
        batch = make_batch(case.groups, num_data_ranks=1, data_rank=0, share_prompts=case.share_prompts)
        limit = case.config.batch.micro_batch_tokens
        counts.append(num_micro_batches(batch, max_tokens=limit, layout=Layout(tensor=2, context=2, sequence=True)))
    few = [counts[1], counts[3], counts[4]]
    assert counts == [18, few[0], 1, *few[1:]] * 2 and all(1 < count < 18 for count in few)
    assert {case.share_prompts for case in cases["halves"]} == {False, True}


def test_a_data_rank_without_a_rollout_takes_part(tmp_path: Path) -> None:
    """One group, two data-parallel ranks: shared prompts keep it on one of them, in a pipeline too."""
    model = tiny_models.save_model(tmp_path, "tied")
    groups = tiny_models.rollout_groups(num_prompts=1, num_samples=4)
    assert groups[0].rewards == (1.0, 0.0, 1.0, 0.0), "a pair, and negatives for it"
    config = make_config(tmp_path, {})
    expected = expected_gradients(model, groups, config)
    case = Case(name="one group", config=config, groups=groups, share_prompts=True, expected=expected)
    for layout in (Layout(data=2), Layout(pipeline=2, data=2)):
        assert_exact(check(layout, [case]))


def without_responses(groups: list[RolloutGroup], empty: set[tuple[int, int]]) -> list[RolloutGroup]:
    """Return the groups with empty responses at these places (group, sample)."""
    return [
        replace(
            group,
            completions=tuple(
                replace(completion, token_ids=(), logprobs=()) if (number, sample) in empty else completion
                for sample, completion in enumerate(group.completions)
            ),
        )
        for number, group in enumerate(groups)
    ]


def test_empty_responses_are_zero_vectors_that_take_part(tmp_path: Path) -> None:
    """A whole group of them, right and wrong ones of others; with every way to pool and to average."""
    model = tiny_models.save_model(tmp_path, "tied")
    full = tiny_models.rollout_groups(num_prompts=6, num_samples=3)
    groups = without_responses(full, {(0, 0), (0, 1), (0, 2), (1, 0), (3, 0), (3, 1), (5, 2)})
    empty = {r for g in groups for c, r in zip(g.completions, g.rewards, strict=True) if not c.token_ids}
    assert empty == {0.0, 1.0} and groups[0].rewards == (1.0, 1.0, 1.0), "anchors and negatives"
    cases = []
    for variant in VARIANTS:
        config = make_config(tmp_path, variant.sections)
        expected = expected_gradients(model, groups, config)
        assert all(gradient.isfinite().all() for gradient in expected.values())
        assert not torch.equal(expected[f"{HEAD}.weight"], expected_gradients(model, full, config)[f"{HEAD}.weight"])
        cases.append(
            Case(
                name=variant.name,
                config=config,
                groups=groups,
                share_prompts=variant.share_prompts,
                expected=expected,
            )
        )
    assert_exact(check(LAYOUTS["dp2"], cases))


class Multiplied(Objective):
    """The mistake of a gather whose gradient counts the ranks once too often."""

    factor = 2.0

    def contrast(self, scored: Scored, *, step: int) -> Contrasted | None:
        found = super().contrast(scored, step=step)
        assert found is not None
        contrast = replace(found.contrast, grad_z_MD=found.contrast.grad_z_MD * self.factor)
        return replace(found, contrast=contrast)


class Divided(Multiplied):
    """The mistake of a mean over ranks that each hold the whole loss."""

    factor = 0.5


class Local(Objective):
    """The mistake of a loss over this rank's own rollouts alone."""

    def contrast(self, scored: Scored, *, step: int) -> Contrasted | None:
        found = super().contrast(scored, step=step)
        assert found is not None
        rows, labels = scored.batch.rows_N, scored.batch.labels
        own = RolloutLabels(
            domain_M=labels.domain_M[rows], prompt_M=labels.prompt_M[rows], correct_M=labels.correct_M[rows]
        )
        local = contrastive(found.z_MD[rows], own, self.config.contrastive)
        grad_MD = torch.zeros_like(found.z_MD)
        grad_MD[rows] = local.grad_z_MD
        return replace(found, contrast=replace(found.contrast, grad_z_MD=grad_MD))


@pytest.mark.parametrize("mistake", [Multiplied, Divided, Local])
def test_a_wrong_factor_and_a_local_loss_are_caught(cases: dict[str, list[Case]], mistake: type[Objective]) -> None:
    case = cases["halves"][0]
    errors = check(LAYOUTS["dp2"], [case], mistake)
    assert errors[case.name, f"{HEAD}.weight"] > 0.1
    assert sum(error > 1000 * BOUND for error in errors.values()) > len(errors) / 2


def test_one_rank_can_not_make_these_mistakes(cases: dict[str, list[Case]]) -> None:
    """What fails above fails for the division over ranks and for nothing else."""
    assert_exact(check(LAYOUTS["dp1"], cases["halves"][:1], Local))


def trunk_gradient(model: PreTrainedModel, groups: list[RolloutGroup], config: Config) -> Tensor:
    found = expected_gradients(model, groups, config)
    return torch.cat([gradient.flatten() for name, gradient in found.items() if HEAD not in name])


def domain_gradient(model: PreTrainedModel, groups: list[RolloutGroup], config: Config, domain: int) -> Tensor:
    """Return the gradient of a batch of this domain alone: that of its share of the whole batch, up to a factor."""
    owner = [group.prompt.domain for group in groups for _ in group.completions]
    old, ref = (
        [
            logprobs
            for logprobs, d in zip(tiny_models.other_logprobs(groups, seed=seed), owner, strict=True)
            if d == domain
        ]
        for seed in (1, 2)
    )
    own = [group for group in groups if group.prompt.domain == domain]
    found = reference.gradients(model, {}, own, old, ref, config)
    return torch.cat([gradient.flatten() for gradient in tiny_models.as_saved(found).values()])


def diagnose(layout: Layout, config: Config, groups: list[RolloutGroup]) -> dict[str, float]:
    ranks = parallel.init(layout, seed=0, timeout_seconds=240)
    policy = Policy(config, from_folder(Path(config.model.path)), ranks)
    objective = Objective(config, policy, ranks)
    scored = score(policy, config, groups, share_prompts=True)
    prepared = objective.prepare(scored, step=1)
    return term_gradients(objective, policy, prepared) | domain_gradients(objective, policy, prepared)


@pytest.mark.parametrize(
    ("kind", "layouts"),
    [("tied", ["dp1", "dp2", "tp2_sp", "pp2"]), ("experts", ["dp1", "ep2", "ep2_tp2", "tp2_sp"])],
)
def test_norms_and_cosines_of_gradients_are_those_of_the_reference_in_every_layout(
    tmp_path: Path, kind: tiny_models.Kind, layouts: list[str]
) -> None:
    """With tied embeddings, which two pipeline stages hold; what a term adds to a gradient is its own."""
    model, groups = tiny_models.save_model(tmp_path, kind), tiny_models.rollout_groups(num_prompts=6, num_samples=3)
    without = {"cross_domain": {"in_domain_weight": 0.0}, "in_domain": {"cross_domain_weight": 0.0}}
    plain = make_config(tmp_path, {"contrastive": without["cross_domain"] | without["in_domain"]})
    own = trunk_gradient(model, groups, plain)
    expected = {"gradient/trunk_policy": own.norm().item()}
    for term, weights in without.items():
        added = trunk_gradient(model, groups, make_config(tmp_path, {"contrastive": weights})) - own
        expected[f"gradient/trunk_{term}"] = added.norm().item()
        expected[f"gradient/cos_{term}"] = torch.cosine_similarity(added, own, dim=0).item()
    by_domain = [domain_gradient(model, groups, plain, domain) for domain in range(3)]
    pairs = [torch.cosine_similarity(a, b, dim=0).item() for a, b in combinations(by_domain, 2)]
    assert len(pairs) == 3
    expected["gradient/cos_domains"] = sum(pairs) / len(pairs)
    assert all(abs(figure) > 0.001 for figure in expected.values()), expected
    on_representations = {}
    for name in layouts:
        layout = LAYOUTS[name]
        for found in run_ranks(layout.world_size, diagnose, layout, make_config(tmp_path, {}), groups):
            assert {key: found[key] for key in expected} == pytest.approx(expected, rel=BOUND), name
            rest = {key: figure for key, figure in found.items() if key not in expected}
            on_representations = on_representations or rest
            assert rest == pytest.approx(on_representations, rel=BOUND), name
    assert set(on_representations) == {"gradient/z_cross_domain", "gradient/z_in_domain"}
