"""Configurations that are based on others: what the merge gives, what is refused, and which file a problem names.

Not covered: that the examples resolve to what they should (test_examples.py).
"""

from pathlib import Path

import pytest

from megatron_mcpo.config.config import Config, ConfigError, dump, load

BASE = """
[run]
name = "base"
steps = 3
trackers = ["wandb", "mlflow"]
[model]
path = "m"
[batch]
prompts = 4
samples = 2
[optimizer]
lr = 0.1
warmup_steps = 7
"""
DOMAINS = "".join(f'[[domain]]\nname = "{name}"\n[[domain.sources]]\ngenerator = "g"\n' for name in ("a", "b"))


def write(folder: Path, **files: str) -> Path:
    """Write NAME.toml for each of `files`; return the path of `child`."""
    folder.mkdir(exist_ok=True)
    for name, text in ({"base": BASE + DOMAINS} | files).items():
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    return folder / "child.toml"


def problems_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return caught.value.problems


def test_tables_are_merged_key_by_key_and_the_later_wins(tmp_path: Path) -> None:
    child = write(tmp_path, child='extends = "base.toml"\n[run]\nsteps = 5\n[rollout]\ntemperature = 0.5\n')
    config = load(child, ["--run.steps", "9", "--optimizer.lr=0.2"])
    assert (config.run.name, config.run.steps, config.run.trackers) == ("base", 9, ["wandb", "mlflow"])
    assert (config.optimizer.lr, config.optimizer.warmup_steps) == (0.2, 7)
    assert config.rollout.temperature == 0.5
    assert config.domain_names == ["a", "b"]
    assert load(child).run.steps == 5 and load(tmp_path / "base.toml").run.steps == 3


def test_lists_are_replaced_as_a_whole(tmp_path: Path) -> None:
    own = '[[domain]]\nname = "b"\nshots = 0\n[[domain.sources]]\nfile = "x.jsonl"\n'
    config = load(write(tmp_path, child=f'extends = "base.toml"\n[run]\ntrackers = ["trackio"]\n{own}'))
    assert config.run.trackers == ["trackio"]
    [domain] = config.domain
    assert (domain.name, domain.shots, domain.sources[0].generator) == ("b", 0, None)


def test_a_chain_of_bases_relative_to_each_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, middle='extends = "base.toml"\n[run]\nsteps = 4\nseed = 4\n[batch]\nsamples = 4\n')
    child = write(tmp_path / "deep", base="not TOML", child='extends = "../middle.toml"\n[run]\nsteps = 5\n')
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for path in (child, Path("../deep/child.toml")):
        config = load(path)
        assert (config.run.steps, config.run.seed, config.run.name) == (5, 4, "base")
        assert (config.batch.samples, config.batch.prompts) == (4, 4)
    absolute = write(tmp_path, child=f'extends = "{tmp_path / "middle.toml"}"\n')
    assert load(absolute).run.steps == 4


def test_the_resolved_configuration_is_complete(tmp_path: Path) -> None:
    config = load(write(tmp_path, child='extends = "base.toml"\n[run]\nsteps = 5\n'))
    resolved = tmp_path / "elsewhere" / "config.toml"
    resolved.parent.mkdir()
    resolved.write_text(dump(config), encoding="utf-8")
    assert load(resolved) == config
    assert "extends" not in resolved.read_text() and "extends" not in Config.model_fields


def test_a_file_without_values_of_its_own(tmp_path: Path) -> None:
    assert load(write(tmp_path, child='extends = "base.toml"\n')) == load(tmp_path / "base.toml")


def test_files_of_one_name_in_two_folders_are_no_cycle(tmp_path: Path) -> None:
    write(tmp_path, child='extends = "base.toml"\n[run]\nseed = 1\n')
    deep = write(tmp_path / "deep", child='extends = "../child.toml"\n[run]\nsteps = 5\n')
    assert (load(deep).run.seed, load(deep).run.steps) == (1, 5)


@pytest.mark.parametrize(
    ("files", "chain"),
    [
        ({"child": 'extends = "child.toml"'}, ["child", "child"]),
        ({"child": 'extends = "base.toml"', "base": 'extends = "./child.toml"'}, ["child", "base", "child"]),
        (
            {"child": 'extends = "middle.toml"', "middle": 'extends = "base.toml"', "base": 'extends = "middle.toml"'},
            ["middle", "base", "middle"],
        ),
    ],
    ids=["itself", "its base", "behind it"],
)
def test_a_cycle_is_refused_with_its_chain(tmp_path: Path, files: dict[str, str], chain: list[str]) -> None:
    path = write(tmp_path, **files)
    names = " -> ".join(str(tmp_path / f"{name}.toml") for name in chain)
    assert problems_of(path) == [f"extends: {names}: must not lead back to the same file. Remove one extends of these."]


def test_a_cycle_through_a_link_is_found(tmp_path: Path) -> None:
    path = write(tmp_path, child='extends = "alias.toml"\n')
    (tmp_path / "alias.toml").symlink_to("child.toml")
    [problem] = problems_of(path)
    assert problem.startswith(f"extends: {path} -> {tmp_path / 'alias.toml'}: must not lead back to the same file.")


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        ("gone.toml", "no such file"),
        ("../gone/../gone.toml", "no such file"),
        (".", "is a folder"),
        ("", "is a folder"),
        ("bad.toml", "not valid TOML"),
        ("loop.toml", "cannot be read"),
        ("nul\\u0000.toml", "cannot be read"),
    ],
)
def test_a_base_that_cannot_be_read_is_named_with_the_file_that_wants_it(
    tmp_path: Path, base: str, reason: str
) -> None:
    middle = write(tmp_path, middle=f'extends = "{base}"\n', bad="[run\n").with_name("middle.toml")
    (tmp_path / "loop.toml").symlink_to("loop.toml")
    write(tmp_path, child='extends = "middle.toml"\n')
    first, second = problems_of(tmp_path / "child.toml", "--bad")
    assert first.startswith(f"{middle}: extends = ") and f": must be a TOML file ({tmp_path}" in first, first
    assert f": {reason}" in first and f"relative path starts at the folder of {middle}" in first, first
    assert second.startswith("--bad: not an override")


@pytest.mark.parametrize("value", ["3", '["base.toml"]', "true", "false", "{ file = 1 }"])
def test_extends_is_one_text(tmp_path: Path, value: str) -> None:
    path = write(tmp_path, child=f"extends = {value}\n")
    [problem] = problems_of(path)
    assert problem.startswith(f"{path}: extends = ") and "must be the path of one TOML file, as text" in problem


def test_extends_below_a_table_says_where_it_belongs(tmp_path: Path) -> None:
    (problem,) = problems_of(write(tmp_path, child=BASE + 'extends = "base.toml"\n' + DOMAINS))
    assert problem == (
        "optimizer.extends: must be a key of the whole file. Move it to the top, above the first [table]."
    )
    missing = problems_of(write(tmp_path, child='extend = "base.toml"\n'))
    assert "extend: unknown key. Did you mean 'extends'?" in missing


def test_extends_is_no_override(tmp_path: Path) -> None:
    (problem,) = problems_of(write(tmp_path).with_name("base.toml"), "--extends", "child.toml")
    assert problem.startswith("--extends: not an override")


def test_each_problem_says_which_file_it_is_in(tmp_path: Path) -> None:
    base = BASE.replace("samples = 2", "samples = 1").replace("warmup_steps", "warmup") + DOMAINS.replace('"b"', '"a"')
    child = write(
        tmp_path,
        base=base,
        child='extends = "base.toml"\nextras = 1\n[run]\nsteps = 0\n[model]\nfp8 = "blockwise"\ndtype = "fp32"\n',
    )
    found = {problem.partition(":")[0].partition(" ")[0]: problem for problem in problems_of(child, "--run.seed=-1")}
    origins = {
        "extras": child,
        "run.steps": child,
        "model.fp8": child,
        "run.seed": "the command line",
        "batch.samples": tmp_path / "base.toml",
        "optimizer.warmup": tmp_path / "base.toml",
        "domain.name": tmp_path / "base.toml",
    }
    assert {key: problem.rpartition(" [")[2] for key, problem in found.items()} == {
        key: f"{origin}]" for key, origin in origins.items()
    }


def test_what_is_missing_is_in_no_file_and_one_file_is_not_named(tmp_path: Path) -> None:
    child = write(tmp_path, child='extends = "base.toml"\n', base=BASE.replace("steps = 3", "") + DOMAINS)
    (problem,) = problems_of(child)
    assert problem.startswith("run.steps: missing. Add it.") and "[" not in problem
    (problem,) = problems_of(write(tmp_path).with_name("base.toml"), "--run.steps=0")
    assert "[" not in problem


def test_an_unknown_table_names_every_file_that_has_it(tmp_path: Path) -> None:
    child = write(tmp_path, child='extends = "base.toml"\n[runs]\na = 1\n', base=f"[runs]\nb = 1\n{BASE}{DOMAINS}")
    (problem,) = problems_of(child)
    assert problem == f"runs: unknown key. Did you mean 'run'? [{tmp_path / 'base.toml'} and {child}]"
    child = write(tmp_path, child='extends = "base.toml"\n[domain]\nname = "a"\n')
    (problem,) = problems_of(child)
    assert "write [[domain]]" in problem.lower() and problem.endswith(f"[{child}]")
