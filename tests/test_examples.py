"""The example configurations load, and those of one folder differ only in what they are there to show."""

from pathlib import Path

import pytest

from megatron_mcpo.config import load

ROOT = Path(__file__).parent.parent
METHODS = sorted((ROOT / "examples" / "methods").glob("*.toml"))


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.toml")), ids=lambda path: path.stem)
def test_every_example_loads(path: Path) -> None:
    assert load(path).domain


def test_methods_differ_in_the_contrastive_terms_alone() -> None:
    assert [path.stem for path in METHODS] == ["clipo", "cross_only", "grpo", "in_only", "mcpo"]
    whole = {path.stem: load(path) for path in METHODS}
    rest = [config.model_dump(exclude={"run": {"name"}, "contrastive": True}) for config in whole.values()]
    assert all(values == rest[0] for values in rest)
    assert {name: config.run.name for name, config in whole.items()} == {name: name for name in whole}
    weights = {name: (c.contrastive.share_weight, c.contrastive.consolidate_weight) for name, c in whole.items()}
    expected = {"mcpo": (0.1, 0.1), "grpo": (0, 0), "clipo": (0, 0.2), "cross_only": (0.1, 0), "in_only": (0, 0.1)}
    assert weights == expected
    clipo = whole["clipo"].contrastive
    assert (clipo.mode, clipo.temperature, clipo.denominator) == ("reward", 0.05, "all")
    assert (clipo.consolidate, clipo.negatives) == ("prompt", "prompt")
