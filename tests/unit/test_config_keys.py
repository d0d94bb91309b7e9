"""The list of all keys and `mcpo config keys`: complete, as the schema has it, and true of what `load` accepts.

Not covered: the page of the documentation that is made from the list.
"""

import json
import subprocess
import sys
import tomllib

import pytest

from megatron_mcpo.cli.main import main
from megatron_mcpo.config.config import ConfigError, dump, load
from megatron_mcpo.config.reference import REQUIRED, UNSET, Key, keys, tables
from tests.support.paths import ROOT

QUICKSTART = ROOT / "examples" / "quickstart" / "config.toml"
ALL = {(key.section, key.name): key for key in keys()}
UNSET_KEYS = {
    ("", "extends"),
    ("model", "init_from"),
    ("parallel", "data"),
    ("contrastive", "dim"),
    ("engine", "oversample"),
}


def test_every_key_of_a_resolved_configuration_is_listed() -> None:
    values = tomllib.loads(dump(load(QUICKSTART)))
    domain = values.pop("domain")[0]
    found = {(section, name) for section, table in values.items() for name in table}
    found |= {("domain", name) for name in domain} | {("domain.sources", name) for name in domain["sources"][0]}
    assert found - ALL.keys() == set()
    unset = {key for key in ALL if ALL[key].default == UNSET and not key[0].startswith("domain")}
    listed = {key for key in ALL if not key[0].startswith("domain")}
    assert listed - found == unset == UNSET_KEYS
    assert [table.name for table in tables()][:3] == ["run", "model", "parallel"]
    assert [table.heading for table in tables()][-3:] == ["[[domain]]", "[[domain.sources]]", "[[domain.verifiers]]"]
    assert {key.section for key in keys()} == {table.name for table in tables()} | {""}


@pytest.mark.parametrize(
    ("section", "name", "expected"),
    [
        ("run", "steps", ("integer", REQUIRED, "> 0")),
        ("run", "seed", ("integer", "0", ">= 0, < 9223372036854775808")),
        ("run", "dir", ("text", '"runs"', "not empty")),
        ("run", "trackers", ("list of texts", "[]", 'each one of "wandb", "mlflow", "trackio"')),
        ("model", "dtype", ("text", '"bf16"', 'one of "bf16", "fp32", "auto"')),
        ("model", "fp8", ("text", '"off"', 'one of "off", "blockwise", "tensorwise"')),
        ("parallel", "data", ("integer", UNSET, "> 0")),
        ("parallel", "sequence", ("true or false", "true", "")),
        ("engine", "gpu_memory_utilization", ("number", "0.5", "> 0, <= 1")),
        ("contrastive", "threshold", ("number", "0.5", ">= -1, <= 1")),
        ("optimizer", "beta1", ("number", "0.9", ">= 0, < 1")),
        ("domain", "sources", ("list of tables", REQUIRED, "not empty")),
        ("domain", "verifiers", ("list of tables", "[]", "")),
        ("domain", "samples", ("integer", UNSET, "> 1")),
        ("domain.sources", "options", ("table", "{}", "")),
        ("domain.verifiers", "pattern", ("text", UNSET, "")),
    ],
)
def test_type_default_and_range(section: str, name: str, expected: tuple[str, str, str]) -> None:
    key = ALL[section, name]
    assert (key.type, key.default, key.range) == expected


def test_defaults_are_those_of_a_run() -> None:
    """Each default that is listed may be written into the file and changes nothing."""
    written = [key for key in keys() if key.default not in (REQUIRED, UNSET) and not key.section.startswith("domain")]
    assert len(written) > 60
    plain, same = load(QUICKSTART), 0
    for key in written:
        default = json.loads(key.default)
        if getattr(getattr(plain, key.section), key.name) == default:
            same += 1
            text = default if isinstance(default, str) else key.default
            assert load(QUICKSTART, [f"--{key.section}.{key.name}={text}"]) == plain, key
    assert same > 50


def _outside(key: Key) -> list[str]:
    """Return values that the range of a key rules out, as TOML."""
    if key.range.startswith("one of"):
        return ['"nothing of these"']
    bounds = [part.split() for part in key.range.split(", ") if key.type in ("integer", "number") and part]
    step = {">": 0, ">=": -1, "<": 0, "<=": 1}
    number = int if key.type == "integer" else float
    return [str(number(bound) + step[sign]) for sign, bound in bounds]


def test_what_a_range_rules_out_is_refused() -> None:
    tried = 0
    for key in keys():
        for value in _outside(key) if key.section and not key.section.startswith("domain") else []:
            tried += 1
            with pytest.raises(ConfigError) as refused:
                load(QUICKSTART, [f"--{key.section}.{key.name}={value}"])
            assert refused.value.problems[0].startswith(f"{key.section}.{key.name} = "), (key, value)
    assert tried > 60


def test_meanings_are_words_for_people() -> None:
    for key in keys():
        assert len(key.meaning.split()) >= 3 or key.meaning == "peak learning rate", key
        assert not key.meaning.endswith("."), f"{key}: tables and messages add what follows"
    assert all(table.meaning.endswith(".") for table in tables())
    with_meanings = [key.meaning for key in keys()]
    assert len(set(with_meanings)) == len(with_meanings)


def test_the_page(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    assert main(["config", "keys", "domain"]) == 0
    page = capsys.readouterr().out
    assert [line for line in page.splitlines() if line.startswith("[")] == [
        "[[domain]]",
        "[[domain.sources]]",
        "[[domain.verifiers]]",
    ]
    assert (
        "\n  shots = 2\n      integer, >= 0\n      number of worked examples (few-shot) before every question\n" in page
    )
    assert max(map(len, page.splitlines())) <= 70
    assert main(["config", "keys"]) == 0
    whole = capsys.readouterr().out
    assert whole.startswith("  extends = unset\n") and page in whole
    assert main(["config", "keys", "domain.sources"]) == 0
    assert capsys.readouterr().out.startswith("[[domain.sources]]\n")


def test_json_is_one_object_per_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "keys", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Key(**line) for line in lines] == keys()
    assert main(["config", "keys", "data", "--json"]) == 0
    assert {json.loads(line)["section"] for line in capsys.readouterr().out.splitlines()} == {"data"}


@pytest.mark.parametrize(("section", "near"), [("contrasive", "contrastive"), ("domain.source", "domain.sources")])
def test_an_unknown_section_is_refused_with_the_nearest(
    capsys: pytest.CaptureFixture[str], section: str, near: str
) -> None:
    assert main(["config", "keys", section]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(
        f"SECTION = {section!r}: must be a section. Did you mean {near!r}? Sections: run, model,"
    )
    assert main(["config", "keys", "q"]) == 2
    assert "Did you mean" not in capsys.readouterr().err


def test_listing_needs_no_torch() -> None:
    code = (
        "import sys; from megatron_mcpo.cli.main import main; main(['config', 'keys']);"
        "assert not {'torch', 'numpy', 'transformers', 'megatron', 'vllm'} & sys.modules.keys()"
    )
    finished = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=400, capture_output=True)
    assert b"cross_domain_weight = 0.1" in finished.stdout


def test_one_key_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "keys", "contrastive.top_k", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["name"] == "top_k" and json.loads(line)["section"] == "contrastive"
    assert main(["config", "keys", "contrastive.topk"]) == 2
