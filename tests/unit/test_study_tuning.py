"""The tuning runs of the study: who takes part in the second round, and what is chosen."""

import math
from typing import Any

import pytest

from benchmarks.study import run
from benchmarks.study.arms import REFERENCES, TUNING, TUNING_GRPO, TUNING_SEEDS, arms
from benchmarks.study.tuning import bests, second_round

ARMS = {name: arm for name, arm in arms("a").items() if arm.kind == TUNING}
AREA = {"centre": 0.5, "weight_0.1": 0.6, "weight_1.0": 0.55, "pool_last": 0.4}
"""Area of the first seed; arms that are not named have 0.45."""


def line(arm: str, seed: int, area: float) -> dict[str, Any]:
    nothing: list[None] = [None]
    return {
        "level": "a", "arm": arm, "seed": seed, "settings": {"domains": ["digits"]},
        "final": {"mean": 1.0, "worst": 1.0, "digits": 1.0},  # decides nothing
        "curve": [[0, 0.9, 0.9, {}], [10, area, area, {}]],  # nor does the accuracy before the first step
        "auc_cross_domain": nothing, "gain_cross_domain": nothing, "gain_in_domain": nothing,
        "gradient_cos": {}, "probe": [],
    }  # fmt: skip


def first_round() -> list[dict[str, Any]]:
    return [line(name, 100, AREA.get(name, 0.45)) for name in ARMS]


def test_the_second_round_has_the_reference_and_what_was_better() -> None:
    assert second_round(first_round(), ARMS) == {"centre", "weight_0.1"}


def test_there_is_no_second_round_before_the_first_is_over() -> None:
    lines = first_round()
    assert second_round(lines[:-1], ARMS) == second_round([], ARMS) == set()
    failed = {"arm": lines[-1]["arm"], "seed": 100, "error": "killed", "settings": {"domains": []}}
    assert second_round([*lines[:-1], failed], ARMS) == {"centre", "weight_0.1"}


def test_the_rounds_of_the_two_groups_wait_for_themselves() -> None:
    everything = arms("a")
    assert second_round(first_round(), everything) == {"centre", "weight_0.1"}
    grpo = [line(name, 100, 0.5) for name, arm in everything.items() if arm.kind == TUNING_GRPO]
    assert second_round(grpo, everything) == {REFERENCES[TUNING_GRPO]}  # an equal value is not better


def test_what_is_to_do_follows_the_rounds() -> None:
    chosen = list(ARMS.values())
    assert {job.seed for job in run.missing("a", chosen, None, [], again=False)} == {100}
    later = run.missing("a", chosen, None, first_round(), again=False)
    assert [job.name for job in later] == ["centre_101", "weight_0.1_101", "centre_102", "weight_0.1_102"]
    asked = run.missing("a", chosen, TUNING_SEEDS, first_round(), again=False)
    assert len(asked) == 2 * len(chosen)  # seeds that are asked for are not left out


@pytest.mark.parametrize(
    "centre, ours, chosen",
    [
        ((0.5, 0.5), (0.6, 0.6), True),
        ((0.5, 0.5), (0.5, 0.55), True),  # 0.1, 0, 0.05: the mean 0.05 is larger than its standard error 0.029
        ((0.5, 0.5), (0.3, 0.45), False),  # 0.1, -0.2, -0.05
        ((0.5, 0.5), (0.5, 0.41), False),  # 0.1, 0, -0.09: mean 0.003
        ((0.7, 0.3), (0.8, 0.4), True),  # the differences are paired: the spread of the centre does not count
    ],
)
def test_a_value_is_chosen_where_its_paired_differences_exceed_their_standard_error(
    centre: tuple[float, float], ours: tuple[float, float], chosen: bool
) -> None:
    lines = first_round()
    for number, seed in enumerate((101, 102)):
        lines += [line("centre", seed, centre[number]), line("weight_0.1", seed, ours[number])]
    (best,) = (best for best in bests(lines, ARMS) if best.arm.group == f"{TUNING}/weight")
    assert best.arm.name == "weight_0.1" and best.is_chosen == chosen


def test_one_seed_chooses_nothing() -> None:
    best = {best.arm.group: best for best in bests(first_round(), ARMS)}
    weight = best[f"{TUNING}/weight"]
    assert weight.goes_on and math.isnan(weight.standard_error) and not weight.is_chosen
    assert not best[f"{TUNING}/pool"].goes_on
