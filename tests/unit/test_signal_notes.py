"""Warnings of runs in which nothing can be learned."""

from typing import Any

import pytest

from megatron_mcpo.config.config import Config
from megatron_mcpo.reporting.signal_notes import nothing_learned, signal_notes
from tests.unit.test_contrast_note import CONFIG

MCPO = Config.model_validate(CONFIG)
GRPO = Config.model_validate(CONFIG | {"contrastive": {"cross_domain_weight": 0, "in_domain_weight": 0}})


def row(step: int, *, advantage: float | None = 0.5, anchors: float = 4.0, truncated: float = 0.0) -> dict[str, Any]:
    return {
        "step": step, "nonzero_advantage": advantage, "truncated": truncated,
        "contrast/anchors_cross_domain": 0.0, "contrast/anchors_in_domain": anchors,
    }  # fmt: skip


def said(config: Config, *rows: dict[str, Any]) -> list[list[str]]:
    """What is said after each of these steps."""
    return [signal_notes(config, rows[max(0, i - 5) : i + 1], ["<eos>", "<end>"]) for i in range(len(rows))]


@pytest.mark.parametrize(("truncated", "warned"), [(0.5, True), (0.49, False), (None, False)])
def test_half_of_the_responses_cut_off_in_the_first_step_is_said(truncated: float | None, warned: bool) -> None:
    first, second = said(MCPO, row(1) | {"truncated": truncated}, row(2) | {"truncated": truncated})
    assert [("cut off at max_response_tokens = 16: a" in note) for note in first] == [True] * warned
    assert second == []


def test_responses_that_are_all_cut_off_are_said_with_the_tokens_that_would_end_them() -> None:
    notes = said(MCPO, *(row(i, truncated=share) for i, share in enumerate([1, 1, 0.9, 1, 1], 1)))
    assert [len(found) for found in notes] == [1, 0, 0, 1, 0]
    assert "all responses were cut off at max_response_tokens = 16, none ended with '<eos>' or '<end>'." in notes[0][0]


def test_three_steps_without_an_advantage_are_said_once_for_every_span() -> None:
    steps = [row(i, advantage=a) for i, a in enumerate([0.5, 0, 0, 0, 0, 0, 0, 0.1, 0, 0, 0, None, 0, 0], 1)]
    notes = said(GRPO, *steps)
    assert [i for i, found in enumerate(notes, 1) if found] == [4, 11]
    assert notes[3][0].startswith("WARNING: for 3 steps every group has equal rewards")


def test_five_steps_without_an_anchor_are_said_where_there_are_terms() -> None:
    steps = [row(i, anchors=0.0) for i in range(1, 9)]
    assert [i for i, found in enumerate(said(MCPO, *steps), 1) if found] == [5]
    assert said(GRPO, *steps) == [[]] * 8


def test_importance_weights_that_drop_all_tokens_are_said() -> None:
    config = MCPO.model_copy(update={"algorithm": MCPO.algorithm.model_copy(update={"importance": "reject"})})
    steps = [row(i) | {"importance/effective": share} for i, share in enumerate([1.0, 0.0, 0.0, 0.5, 0.0], 1)]
    notes = said(config, *steps)
    assert [len(found) for found in notes] == [0, 1, 0, 0, 1]
    assert "algorithm.importance = 'reject' has dropped every token" in notes[1][0]


def test_experts_that_nothing_is_given_to_are_said() -> None:
    steps = [
        row(i) | {"moe/unused_experts": share} for i, share in enumerate([0.1, 0, 0.2, 0.2, 0.1, 0.1, 0.3, 0.3], 1)
    ]
    notes = said(GRPO, *steps)
    assert [i for i, found in enumerate(notes, 1) if found] == [7]
    assert "for 5 steps some experts were given no token (30.0% of them now)" in notes[6][0]


def test_a_run_without_any_signal_says_so() -> None:
    dead = [row(i, advantage=0, anchors=0.0) for i in range(1, 4)]
    text = nothing_learned(GRPO, dead)
    assert text is not None and text.startswith("WARNING: nothing was learned: in all 3 steps every group has equal")
    assert nothing_learned(MCPO, dead) is not None
    assert nothing_learned(MCPO, [*dead, row(4, advantage=0.1, anchors=0.0)]) is None
    assert nothing_learned(MCPO, [*dead, row(4, advantage=0, anchors=1.0)]) is None, "a contrastive term learned"
    assert nothing_learned(GRPO, []) is None
