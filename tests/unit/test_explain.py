"""Errors of pydantic in plain words: every kind that the schema can produce, as key, value, rule and fix.

Not covered: rules between keys (test_config), the files that a value comes from (test_extends).
"""

import datetime
from typing import Any

import pytest
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatron_mcpo.config.config import Config
from megatron_mcpo.config.explain import RULES, explain

SOURCE = ("domain", 0, "sources", 0)

# Place of the value, the value, pydantic's kind of error, the line up to the meaning of the key.
CASES: list[tuple[tuple[str | int, ...], Any, str, str]] = [
    (
        ("run", "steps"),
        "many",
        "int_type",
        "run.steps = 'many': must be an integer. Write it without quotes and without a decimal point, such as 8.",
    ),
    (
        ("parallel", "data"),
        True,
        "int_type",
        "parallel.data = true: must be an integer. Write it without quotes and without a decimal point, such as 8.",
    ),
    (("optimizer", "lr"), "1e-5", "float_type",
     "optimizer.lr = '1e-5': must be a number. Write it without quotes, such as 0.5."),
    (("optimizer", "lr"), float("nan"), "finite_number",
     "optimizer.lr = nan: must be finite. Write a number, such as 0.5."),
    (
        ("parallel", "sequence"),
        "yes",
        "bool_type",
        "parallel.sequence = 'yes': must be true or false. Write one of them, without quotes.",
    ),
    (("run", "name"), 3, "string_type", "run.name = 3: must be a text. Put it in quotes."),
    (
        ("run", "name"),
        datetime.date(2026, 1, 2),
        "string_type",
        "run.name = 2026-01-02: must be a text. Put it in quotes.",
    ),
    (
        ("run", "name"),
        "\udcff",
        "string_unicode",
        r"run.name = '\udcff': must be valid Unicode. Write it with valid characters.",
    ),
    (("model", "path"), "", "string_too_short", "model.path = '': must not be empty. Fill it in."),
    (
        ("run", "name"),
        "a/b",
        "string_pattern_mismatch",
        "run.name = 'a/b': must match ^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$. Write it like 'math_1'.",
    ),
    (
        (*SOURCE, "subset"),
        "a b",
        "string_pattern_mismatch",
        "domain[0].sources[0].subset = 'a b': must match ^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$. Write it like 'math_1'.",
    ),
    (
        ("engine", "servers"),
        ["here"],
        "string_pattern_mismatch",
        "engine.servers[0] = 'here': must match ^http://[A-Za-z0-9._-]+:[0-9]{1,5}$. Write it like 'http://10.0.0.1:8000'.",
    ),
    (("run", "trackers"), "wandb", "list_type", "run.trackers = 'wandb': must be a list. Put it in square brackets."),
    (("domain",), {}, "list_type", "domain = {}: must be a list of tables. Write [[domain]], in double brackets."),
    (("domain", 0, "sources"), [], "too_short", "domain[0].sources = []: must not be empty. Add [[domain.sources]]."),
    (
        ("run", "trackers"),
        ["wandb", 1],
        "literal_error",
        "run.trackers[1] = 1: must be 'wandb', 'mlflow' or 'trackio'. Choose one of the allowed values.",
    ),
    (("run", "steps"), 0, "greater_than", "run.steps = 0: must be greater than 0. Raise it."),
    (("optimizer", "lr"), 0.0, "greater_than", "optimizer.lr = 0.0: must be greater than 0. Raise it."),
    (("run", "keep_every"), -1, "greater_than_equal", "run.keep_every = -1: must be at least 0. Raise it."),
    (("optimizer", "beta1"), 1.0, "less_than", "optimizer.beta1 = 1.0: must be less than 1. Lower it."),
    (("contrastive", "threshold"), 1.5, "less_than_equal", "contrastive.threshold = 1.5: must be at most 1. Lower it."),
    (("run",), 3, "model_type", "run = 3: must be a table. Write it with its keys as [run]."),
    (("domain", 0), 3, "model_type", "domain[0] = 3: must be a table. Write it with its keys as [[domain]]."),
    (
        (*SOURCE, "options"),
        3,
        "dict_type",
        "domain[0].sources[0].options = 3: must be a table. Write it with its keys as [domain.sources.options].",
    ),
    (
        (*SOURCE, "options"),
        {"dict": {"list": [datetime.time(1)]}},
        "invalid-json-value",
        "domain[0].sources[0].options.dict.list[0] = 01:00:00: must be a text, a number, true or false, a list or a "
        "table. Put a date or a time in quotes.",
    ),
    (("run", "stepz"), 1, "extra_forbidden", "run.stepz: unknown key. Did you mean 'steps'?"),
    (("domain", 0), {"name": "a"}, "missing", "domain[0].sources: missing. Add a table [[domain.sources]]."),
    (("model",), {}, "missing", "model.path: missing. Add it."),
    (
        ("model", "fp8"),
        "mxfp8",
        "value_error",
        "model.fp8 = 'mxfp8': must be 'off', 'blockwise' or 'tensorwise' (MXFP8 needs a Blackwell GPU, compute "
        "capability 10.0, and is not supported). Set it to one of them.",
    ),
]  # fmt: skip


def errors_with(place: tuple[str | int, ...], value: Any) -> list[ErrorDetails]:
    """Return what pydantic says of a small configuration with one value replaced."""
    values: Any = {
        **{"run": {"steps": 1}, "model": {"path": "m"}, "batch": {"prompts": 4, "samples": 2}},
        **{"optimizer": {"lr": 0.1}, "domain": [{"name": "a", "sources": [{"generator": "g"}]}]},
        **{"parallel": {}, "engine": {}, "rollout": {}, "contrastive": {}},
    }
    assert Config.model_validate(values)
    table = values
    for part in place[:-1]:
        table = table[part]
    table[place[-1]] = value
    with pytest.raises(ValidationError) as caught:
        Config.model_validate(values)
    return caught.value.errors()


@pytest.mark.parametrize(("place", "value", "kind", "line"), CASES, ids=lambda value: str(value)[:40])
def test_a_wrong_value_is_explained_in_plain_words(
    place: tuple[str | int, ...], value: Any, kind: str, line: str
) -> None:
    (error,) = errors_with(place, value)
    assert error["type"] == kind
    explained = explain(error, Config)
    assert explained.startswith(line)
    assert explained[len(line) :].startswith(" Meaning: ") or explained == line


def test_a_value_that_is_nested_too_deep_is_named_by_its_table() -> None:
    value: list[Any] = []
    for _ in range(300):
        value = [value]
    (error,) = errors_with((*SOURCE, "options"), {"x": value})
    assert error["type"] == "recursion_depth_exceeded"
    assert explain(error, Config).startswith("domain[0].sources[0].options = ")
    assert "must nest lists and tables less than 250 deep. Flatten it." in explain(error, Config)


def test_the_default_is_written_as_in_the_file() -> None:
    (error,) = errors_with(("parallel", "sequence"), 1)
    assert explain(error, Config).endswith(" Default: true.")


BOUNDS = {"gt": {"greater_than"}, "ge": {"greater_than_equal"}, "lt": {"less_than"}, "le": {"less_than_equal"}}
# What a node of the schema refuses by itself, and with each of its constraints.
BY_NODE = {
    "str": {
        "": {"string_type", "string_unicode"},
        "pattern": {"string_pattern_mismatch"},
        "min_length": {"string_too_short"},
    },
    "int": {"": {"int_type"}, **BOUNDS},
    "float": {"": {"float_type"}, "allow_inf_nan": {"finite_number"}, **BOUNDS},
    "list": {"": {"list_type"}, "min_length": {"too_short"}},
    "bool": {"": {"bool_type"}},
    "dict": {"": {"dict_type"}},
    "literal": {"": {"literal_error"}},
    "model": {"": {"model_type"}},
    "model-fields": {"": {"missing", "extra_forbidden"}},
    "function-before": {"": {"value_error"}},
    "tagged-union": {"": {"invalid-json-value"}},
    "definition-ref": {"": {"recursion_depth_exceeded"}},
}  # fmt: skip
# These only hold other nodes, or take everything.
HOLDERS = {"any", "default", "definitions", "json-or-python", "model-field", "no-info", "none", "nullable"}


def kinds_of(node: Any) -> set[str]:
    """Return the kinds of error that a schema of pydantic-core can produce for values from TOML."""
    if isinstance(node, list | tuple):
        return {kind for part in node for kind in kinds_of(part)}
    if not isinstance(node, dict):
        return set()
    found = {kind for key, part in node.items() if key not in ("metadata", "serialization") for kind in kinds_of(part)}
    name = node.get("type")
    if isinstance(name, str) and name not in HOLDERS:
        found |= {kind for key, kinds in BY_NODE[name].items() if not key or key in node for kind in kinds}
        assert not {"max_length", "multiple_of", "strict"} & node.keys(), "a constraint that no case is for"
    return found


def test_every_kind_of_error_that_the_schema_can_produce_has_a_case() -> None:
    kinds = kinds_of(Config.__pydantic_core_schema__)
    assert kinds == {kind for _, _, kind, _ in CASES} | {"recursion_depth_exceeded"}
    assert kinds >= RULES.keys()
