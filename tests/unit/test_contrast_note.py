"""The warning that a contrastive term does not act, and the line of a finished run that says what it did."""

from typing import Any

from megatron_mcpo.config.config import Config
from megatron_mcpo.reporting.contrast_note import contrast_note
from megatron_mcpo.reporting.summary import mechanism_line

CONFIG: dict[str, Any] = {
    "run": {"steps": 12},
    "model": {"path": "model"},
    "batch": {"prompts": 4, "samples": 4},
    "optimizer": {"lr": 1e-5, "head_lr": 2e-4},
    "domain": [{"name": name, "sources": [{"generator": "chain_sum"}]} for name in ("red", "green")],
}


def rows(*gains: float | None) -> list[dict[str, Any]]:
    return [
        {"step": step, "contrast/gain_cross_domain": gain, "contrast/gain_in_domain": 1.0}
        for step, gain in enumerate(gains, 1)
    ]


def note(steps: list[dict[str, Any]], **contrastive: float) -> str | None:
    return contrast_note(Config.model_validate(CONFIG | {"contrastive": contrastive}), steps)


def test_a_term_at_its_chance_level_is_named_with_what_to_change() -> None:
    text = note(rows(*[1.0] * 5, -0.1, -0.2, 0.0, -0.1, -0.1))
    assert text is not None
    assert "contrast/gain_cross_domain = -0.10 (mean of steps 6 to 10): must be above 0" in text
    assert "Raise optimizer.head_lr (it is 0.0002)" in text and "gain_in_domain" not in text


def test_only_the_last_five_steps_count_and_steps_without_an_anchor_do_not() -> None:
    assert note(rows(*[-1.0] * 5, *[0.1] * 5)) is None
    assert note(rows(*[-1.0] * 5, 0.1, None, None, None, None)) is None
    assert note(rows(*[None] * 10)) is None


def test_a_term_without_a_weight_is_not_judged() -> None:
    assert note(rows(*[-1.0] * 10), cross_domain_weight=0.0) is None


def test_a_finished_run_says_what_the_cross_domain_term_did() -> None:
    steps = [
        {"step": step, "contrast/auc_cross_domain": 0.5 + step / 100, "contrast/gain_cross_domain": step / 10 - 0.6}
        for step in range(1, 12)
    ]
    assert mechanism_line(steps) == (
        "mechanism   ranking of correct above incorrect rollouts across domains 0.52 -> 0.60 (chance 0.5), "
        "gain in nats -0.40 -> 0.40 (chance 0)"
    )
    assert mechanism_line([{"step": 1, "reward/mean": 0.5}]) is None
