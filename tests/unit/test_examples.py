"""The example configurations load, and those of one folder differ only in what they are there to show.

Not covered: that the recipes fit their GPUs (test_recipes.py).
"""

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_mcpo.config.config import load
from tests.support.paths import ROOT

EXAMPLES = ROOT / "examples"
METHODS = sorted((EXAMPLES / "methods").glob("*.toml"))
BASES = sorted((EXAMPLES / "base").glob("*.toml"))
WHOLE = sorted(set(EXAMPLES.rglob("*.toml")) - set(BASES))


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_example_loads(path: Path) -> None:
    assert load(path).domain


def test_bases_are_what_examples_share() -> None:
    """Each is extended by two examples or more, which repeat no setting in all of them: that one is in the base."""
    used: dict[Path, list[dict[str, Any]]] = {}
    for path in WHOLE:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        if "extends" in values:
            used.setdefault((path.parent / values["extends"]).resolve(), []).append(values)
    assert {base for base in used if base.parent == EXAMPLES / "base"} == set(BASES)
    for base in BASES:
        assert len(used[base]) > 1
        settings = [{(name, key, str(value)) for name, key, value in _settings(values)} for values in used[base]]
        assert {name for name, *_ in set.intersection(*settings)} == {"extends"}


def _settings(values: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    for name, table in values.items():
        for key, value in table.items() if isinstance(table, dict) else [("", table)]:
            yield name, key, value


def test_the_first_example_is_one_whole_file() -> None:
    """A newcomer reads all of it in one place."""
    assert "extends" not in tomllib.loads((EXAMPLES / "quickstart" / "config.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_a_method_is_a_few_lines(path: Path) -> None:
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    assert values.keys() == {"extends", "run", "contrastive"} and values["run"] == {"name": path.stem}


def test_methods_differ_in_the_contrastive_terms_alone() -> None:
    assert [path.stem for path in METHODS] == ["clipo", "cross_only", "grpo", "in_only", "mcpo"]
    whole = {path.stem: load(path) for path in METHODS}
    rest = [config.model_dump(exclude={"run": {"name"}, "contrastive": True}) for config in whole.values()]
    assert all(values == rest[0] for values in rest)
    assert {name: config.run.name for name, config in whole.items()} == {name: name for name in whole}
    weights = {name: (c.contrastive.cross_domain_weight, c.contrastive.in_domain_weight) for name, c in whole.items()}
    expected = {"mcpo": (0.1, 0.1), "grpo": (0, 0), "clipo": (0, 0.2), "cross_only": (0.1, 0), "in_only": (0, 0.1)}
    assert weights == expected
    clipo = whole["clipo"].contrastive
    assert (clipo.mode, clipo.temperature, clipo.denominator) == ("reward", 0.05, "all")
    assert (clipo.in_domain_scope, clipo.negatives) == ("prompt", "prompt")
