"""The study: its arms, the line that a run leaves, what is still to do, the statistics, tables and pictures.

Not covered: runs themselves, and that a run that is interrupted goes on (tests/system/test_preemption.py has the latter
for a single run).
"""

import itertools
import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from benchmarks.study import plots, run
from benchmarks.study.arms import (
    CENTRE,
    MAIN,
    MEASURED,
    REFERENCES,
    TUNING,
    Arm,
    arms,
    configuration,
)
from benchmarks.study.record import Job, append, chosen_settings, finished, measured, read, results_file
from benchmarks.study.statistics import difference, figures_of, last_fifth, summaries
from benchmarks.study.table import cell, failures, main, sheets
from docs.generator import study as pages
from megatron_mcpo.config.config import Config, ConfigError, dump, load
from megatron_mcpo.storage.run_lock import RunLock
from tests.support.report_runs import OFF, config_of

ARMS = arms("a")
DOMAINS = [arm.domains[0] for arm in ARMS.values() if arm.domains]
by_arm = pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS)


# Arms


@by_arm
def test_an_arm_is_a_configuration_and_differs_from_the_base_in_its_own_keys_only(arm: Arm, tmp_path: Path) -> None:
    config, base = configuration("a", arm), configuration("a", Arm(name="base", meaning="", settings={}))
    for key, value in arm.settings.items():
        section, _, name = key.partition(".")
        assert getattr(getattr(config, section), name) == value, key
    assert config.domain_names == list(arm.domains or DOMAINS)
    plain = {f"{section}.{key}" for section, table in config if section != "domain" for key in type(table).model_fields}
    differing = {key for key in plain if _value(config, key) != _value(base, key)}
    assert differing <= arm.settings.keys()
    (tmp_path / "arm.toml").write_text(dump(config))
    assert load(tmp_path / "arm.toml") == config


def _value(config: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def test_no_two_arms_of_a_group_are_the_same() -> None:
    for kind in REFERENCES:
        settings = [configuration("a", arm) for arm in ARMS.values() if arm.kind == kind]
        assert all(one != other for one, other in itertools.combinations(settings, 2))


def test_tuning_varies_one_choice_of_the_centre_at_a_time() -> None:
    tuned = [arm for arm in ARMS.values() if arm.kind == TUNING]
    assert {arm.group.partition("/")[2] for arm in tuned} >= {"weight", "temperature", "negatives", "center", "head_lr"}
    for arm in tuned:
        varied = {key.partition(".")[2] for key, value in arm.settings.items() if CENTRE.get(key) != value}
        choice = arm.group.partition("/")[2]
        assert varied == ({"cross_domain_weight", "in_domain_weight"} if choice == "weight" else {choice} - {""})
    assert ARMS[REFERENCES[TUNING]].settings == CENTRE


def test_what_only_measures_changes_no_reward() -> None:
    """No term can be larger than that of a positive opposite to its anchor, which equals all negatives."""
    config = configuration("a", ARMS[MEASURED])
    contrastive = config.contrastive
    most = math.log(config.batch.prompts * config.batch.samples) + 2 / contrastive.temperature
    penalty = np.float32((contrastive.cross_domain_weight + contrastive.in_domain_weight) * most)
    assert penalty > 0 and np.float32(1.0) - penalty == np.float32(1.0)
    assert contrastive.mode == "reward"


def test_tuning_and_claims_share_no_seed() -> None:
    assert all(arm.seeds and all(map(arm.has_seed, arm.seeds)) for arm in ARMS.values())
    by_use = [
        {seed for arm in ARMS.values() if (arm.kind == MAIN) == is_main for seed in arm.seeds}
        for is_main in (True, False)
    ]
    assert not set.intersection(*by_use)
    assert {len(arms(level)["mcpo"].seeds) for level in ("a", "b")} == {10, 5}


def test_a_level_without_a_base_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(run.BASES, "b", tmp_path / "none.toml")
    with pytest.raises(ConfigError, match=r"--level = 'b': must have a base file"):
        arms("b")


# What is to do


def test_all_arms_of_a_seed_come_before_the_next_seed() -> None:
    chosen = [ARMS["grpo"], ARMS["mcpo"], ARMS["worst"]]
    jobs = run.missing("a", chosen, (4, 2), [line_of("mcpo", 2, two(0.5, 0.5))], again=False)
    assert [(job.seed, job.arm) for job in jobs] == [
        (2, "grpo"), (2, "worst"), (4, "grpo"), (4, "mcpo"), (4, "worst"),
    ]  # fmt: skip
    assert run.missing("a", chosen[:1], None, [], again=False) == [
        Job(level="a", arm="grpo", seed=seed) for seed in ARMS["grpo"].seeds
    ]


def test_a_failed_run_is_done_unless_it_is_to_be_repeated() -> None:
    lines = [{"arm": "grpo", "seed": 0}, {"arm": "mcpo", "seed": 0, "error": "exit code 1"}]
    assert finished(lines, again=False) == {("grpo", 0), ("mcpo", 0)}
    assert finished(lines, again=True) == {("grpo", 0)}


def test_arms_are_selected_by_name_and_group() -> None:
    assert [arm.name for arm in run.selected(ARMS, ["mcpo", "grpo"], None)] == ["grpo", "mcpo"]
    assert {arm.name for arm in run.selected(ARMS, None, "tuning/pool")} == {"pool_last"}
    assert sum(len(run.selected(ARMS, None, kind)) for kind in REFERENCES) == len(ARMS)
    with pytest.raises(ConfigError, match="--arms = nothing: must be among grpo"):
        run.selected(ARMS, ["nothing"], None)
    with pytest.raises(ConfigError, match="--group = 'all': must have one of the arms"):
        run.selected(ARMS, None, "all")


def test_a_seed_is_for_the_arms_that_it_counts_for() -> None:
    both = [ARMS["centre"], ARMS["grpo"]]
    assert [job.name for job in run.missing("a", both, [100, 3], [], again=False)] == ["grpo_3", "centre_100"]
    with pytest.raises(
        ConfigError, match=r"--seeds = \[3\]: must count for an arm \(such as \(100, 101, 102\) of tuning"
    ):
        run.missing("a", both[:1], [3], [], again=False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--run.steps", "3"], "--run.steps: needs --out FOLDER"),
        (["--out", "{folder}", "--run.stepz", "3"], "run.stepz"),
        (["--device", "cuda"], "--device = 'cuda': must be usable"),
    ],
)
def test_a_wrong_command_starts_no_run(arguments: list[str], said: str, tmp_path: Path, capsys: Any) -> None:
    if "cuda" in arguments and run._device_problem("cuda") is None:
        pytest.skip("there is a GPU")
    assert run.main([argument.format(folder=tmp_path) for argument in arguments]) == 2
    assert said in capsys.readouterr().err


# The line of a run


def made_folder(folder: Path, *, steps: int = 3) -> Path:
    """Write the files of a run that a line is made from."""
    folder.mkdir(parents=True)
    rows = [
        {
            "step": step,
            "reward/mean": 0.1 * step,
            "time/step": float(step),
            "contrast/auc_cross_domain": None if step == 1 else 0.5 + step / 100,
            "contrast/gain_cross_domain": 0.25,
        }
        for step in range(1, steps + 1)
    ]
    rows[1]["gradient/cos_cross_domain"], rows[2]["gradient/cos_cross_domain"] = 0.1, 0.4
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    evaluations: list[dict[str, Any]] = [
        {"step": 0, "mean": 0.25, "worst": 0.2, "arithmetic": 0.2, "logic": 0.3, "items/logic": 10.0},
        {"step": 3, "mean": 0.45, "worst": 0.4, "arithmetic": 0.4, "logic": 0.5, "accuracy_low/mean": 0.3},
    ]
    evaluations[1] |= {"contrast/probe_transfer": 2 / 3, "contrast/probe_centered": 0.75}
    (folder / "eval.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in evaluations))
    return folder


def test_the_line_of_a_run(tmp_path: Path) -> None:
    line = measured(made_folder(tmp_path / "run"), config_of(tmp_path, num_steps=3))
    assert line == {
        "final": {"mean": 0.45, "worst": 0.4, "arithmetic": 0.4, "logic": 0.5},
        "curve": [
            [0, 0.25, 0.2, {"arithmetic": 0.2, "logic": 0.3}],
            [3, 0.45, 0.4, {"arithmetic": 0.4, "logic": 0.5}],
        ],
        "reward": [0.1, 0.2, 0.3],
        "auc_cross_domain": [None, 0.52, 0.53],
        "gain_cross_domain": [0.25, 0.25, 0.25],
        "gain_in_domain": [None, None, None],
        "probe": [[3, 0.66667, 0.75]],
        "gradient_cos": {"cross_domain": 0.25},
        "seconds": {"step": 2.0},
    }


def test_a_folder_that_lacks_a_step_or_the_last_evaluation_has_no_line(tmp_path: Path) -> None:
    folder = made_folder(tmp_path / "run")
    with pytest.raises(ValueError, match="must have the steps 1 to 4"):
        measured(folder, config_of(tmp_path, num_steps=4))
    (folder / "eval.jsonl").write_text('{"step": 0, "mean": 0.5, "worst": 0.5}\n')
    with pytest.raises(ValueError, match="must end with an evaluation after step 3"):
        measured(folder, config_of(tmp_path, num_steps=3))


def test_settings_are_those_that_differ_from_the_defaults(tmp_path: Path) -> None:
    assert chosen_settings(config_of(tmp_path, num_steps=3, temperature=0.5, **OFF)) == {
        "model.path": "model",
        "batch.prompts": 6,
        "batch.samples": 4,
        "contrastive.cross_domain_weight": 0.0,
        "contrastive.in_domain_weight": 0.0,
        "contrastive.temperature": 0.5,
        "optimizer.lr": 1e-5,
        "domains": ["arithmetic", "logic", "cognition"],
    }


def study_of(folder: Path) -> run.Study:
    return run.Study(
        level="a", arms=ARMS, overrides=("--run.steps=3",), results=folder / "level_a.jsonl", folder=folder / "runs",
        threads=1, device="cpu", keep=False,
    )  # fmt: skip


def test_a_run_that_was_finished_but_not_recorded_is_recorded_and_removed(tmp_path: Path) -> None:
    study, job = study_of(tmp_path), Job(level="a", arm="grpo", seed=7)
    folder = study.folder / job.name
    made_folder(folder / "run")
    (folder / "run" / "FINISHED").touch()
    assert study.run(job)
    (line,) = read(study.results)
    assert {key: line[key] for key in ("level", "arm", "seed", "steps", "device", "threads")} == {
        "level": "a", "arm": "grpo", "seed": 7, "steps": 3, "device": "cpu", "threads": 1,
    }  # fmt: skip
    assert line["final"]["mean"] == 0.45 and line["settings"]["domains"] == DOMAINS and len(line["commit"]) >= 7
    assert not folder.exists()


def test_a_run_that_fails_leaves_the_end_of_its_log(tmp_path: Path) -> None:
    """The run refuses itself: a folder stands where the model should be."""
    study, job = study_of(tmp_path), Job(level="a", arm="grpo", seed=7)
    study.overrides = ("--run.steps=3", f"--model.path={tmp_path}")
    assert not study.run(job)
    (line,) = read(study.results)
    assert line["error"].startswith("exit code 2\n") and "model.path" in line["error"]
    assert line["seconds"]["total"] > 0 and "final" not in line
    assert not (study.folder / job.name).exists()


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="this kernel does not schedule by session")
def test_the_priority_is_that_of_sessions_below_the_run_too() -> None:
    script = "import subprocess, time; print(subprocess.Popen(['sleep', '60'], start_new_session=True).pid, flush=True)"
    program = psutil.Popen(
        [sys.executable, "-c", f"{script}; time.sleep(60)"], start_new_session=True, stdout=subprocess.PIPE, text=True
    )
    below = psutil.Process(int(program.stdout.readline()))
    try:
        run._lower_priority(program)
        for process in (program, below):
            assert Path(f"/proc/{process.pid}/autogroup").read_text().endswith("nice 19\n")
    finally:
        below.kill()
        program.kill()
        program.wait()


def test_what_a_run_with_other_settings_left_is_dropped(tmp_path: Path) -> None:
    study, job = study_of(tmp_path), Job(level="a", arm="grpo", seed=7)
    folder = study.folder / job.name
    study._prepare(study._configuration(job, folder), folder)
    (folder / "progress").touch()
    study._prepare(study._configuration(job, folder), folder)
    assert (folder / "progress").exists()
    study.overrides = ("--run.steps=4",)
    study._prepare(study._configuration(job, folder), folder)
    assert not (folder / "progress").exists() and load(folder / "config.toml").run.steps == 4


def test_a_run_that_another_process_makes_is_left_to_it(tmp_path: Path, capsys: Any) -> None:
    study, job = study_of(tmp_path), Job(level="a", arm="grpo", seed=7)
    held = RunLock(made_folder(study.folder / job.name / "run"))
    assert not study.run(job)
    held.close()
    assert read(study.results) == [] and "in use by another process" in capsys.readouterr().out


def test_a_study_that_is_stopped_starts_no_run(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    study.stop()
    assert not study.run(Job(level="a", arm="grpo", seed=7))
    assert read(study.results) == [] and list(study.folder.iterdir()) == []


def test_lines_are_appended_whole_and_never_hold_nan(tmp_path: Path) -> None:
    path = results_file("a", tmp_path / "new")
    append(path, {"arm": "grpo"}, tmp_path)
    append(path, {"arm": "mcpo"}, tmp_path)
    with pytest.raises(ValueError, match="JSON compliant"):
        append(path, {"arm": math.nan}, tmp_path)
    assert read(path) == [{"arm": "grpo"}, {"arm": "mcpo"}]
    assert read(tmp_path / "none.jsonl") == []


# Statistics


def line_of(arm: str, seed: int, finals: dict[str, float], *, auc: float | None = None) -> dict[str, Any]:
    """A line whose accuracy rises from 0.2 over 0.3 to its final values."""
    mean, worst = sum(finals.values()) / len(finals), min(finals.values())
    nothing: list[None] = [None] * 10
    return {
        "level": "a", "arm": arm, "seed": seed, "settings": {"domains": list(finals)},
        "final": {"mean": mean, "worst": worst, **finals},
        "curve": [[0, 0.2, 0.2, {}], [5, 0.3, 0.3, {}], [10, mean, worst, finals]],
        "auc_cross_domain": [0.0] * 8 + [auc, None], "gain_cross_domain": nothing, "gain_in_domain": nothing,
        "gradient_cos": {}, "probe": [],
    }  # fmt: skip


def two(digits: float, words: float) -> dict[str, float]:
    return {"digits": digits, "words": words}


def test_the_interval_is_that_of_all_resamples() -> None:
    """Compare 10,000 drawn resamples with the list of all 256 that four pairs have."""
    pairs = [0.01, 0.05, -0.02, 0.12]
    found = difference({s: 0.3 + p for s, p in enumerate(pairs)}, dict.fromkeys(range(5), 0.3))
    means = np.sort([np.mean(chosen) for chosen in itertools.product(pairs, repeat=4)])
    assert found.value == pytest.approx(np.mean(pairs)) and found.num_seeds == 4
    low, high = np.quantile(means, [0.025, 0.975])
    step = 0.0076  # between neighbouring means in the tails
    assert found.low == pytest.approx(low, abs=step) and found.high == pytest.approx(high, abs=step)


def test_the_interval_of_many_pairs_is_that_of_the_normal_law() -> None:
    pairs = np.random.default_rng(1).normal(0.1, 1.0, size=400)
    found = difference(dict(enumerate(pairs)), dict.fromkeys(range(400), 0.0))
    half = 1.96 * pairs.std() / 20
    assert (found.low, found.high) == pytest.approx((pairs.mean() - half, pairs.mean() + half), abs=0.006)


def test_pairs_and_not_arms_are_resampled() -> None:
    """Seeds that differ much, but in both arms alike, leave no doubt about the difference."""
    found = difference({0: 0.11, 1: 0.51, 2: 0.91}, {2: 0.9, 1: 0.5, 0: 0.1, 9: 0.0})
    assert (found.value, found.low, found.high, found.num_seeds) == (*[pytest.approx(0.01)] * 3, 3)
    assert found.is_clear


def test_two_pairs_have_no_interval() -> None:
    found = difference({0: 0.2, 1: 0.4}, {0: 0.1, 1: 0.1, 2: 0.1})
    assert found.value == pytest.approx(0.2) and math.isnan(found.low) and math.isnan(found.high) and not found.is_clear
    assert math.isnan(difference({0: 1.0}, {}).value)


def test_figures_of_a_run() -> None:
    line = line_of("mcpo", 3, two(0.4, 0.6), auc=0.8)
    found = figures_of(line, ["digits", "words"], {("digits", 3): 0.5, ("words", 3): 0.4, ("words", 4): 0.0})
    expected = {"digits": 0.4, "words": 0.6, "mean": 0.5, "worst": 0.4, "area": 0.4, "transfer": 0.05, "auc": 0.8}
    assert found == pytest.approx(expected)
    assert "transfer" not in figures_of(line, ["digits", "words"], {("digits", 3): 0.5})
    line |= {"gradient_cos": {"in_domain": -0.5, "domains": 0.25}, "probe": [[5, 0.6, 0.7], [10, 0.8, None]]}
    found = figures_of(line, ["digits", "words"], {("digits", 3): 0.5, ("words", 3): 0.4})
    more = {"cos_in_domain": -0.5, "cos_domains": 0.25, "probe_transfer": 0.8}
    assert found == pytest.approx(expected | more)
    alone = figures_of(line_of("single_words", 3, {"words": 0.6}), ["digits", "words"], {})
    assert alone == {"words": 0.6}


def test_the_last_fifth() -> None:
    assert last_fifth([0.0] * 8 + [1.0, 2.0]) == 1.5
    assert last_fifth([0.0, None, 3.0]) == 3.0
    assert math.isnan(last_fifth([1.0, None]))


def lines_of_a_study() -> list[dict[str, Any]]:
    lines = [line_of("grpo", seed, two(0.3 + seed / 100, 0.4)) for seed in range(4)]
    lines += [line_of("mcpo", seed, two(0.4 + seed / 100, 0.4), auc=0.7) for seed in range(3)]
    lines += [line_of(f"single_{name}", seed, {name: 0.35}) for name in two(0, 0) for seed in range(4)]
    lines += [line_of("grpo", 100, two(0.9, 0.9)), line_of("centre", 100, two(0.5, 0.5), auc=0.6)]
    lines += [line_of("weight_0.1", 100, two(0.6, 0.5), auc=0.7), line_of("weight_0.1", 1, two(0.0, 0.0))]
    lines += [{"arm": "worst", "seed": 0, "error": "exit code 1\nit broke\n", "settings": {"domains": ["digits"]}}]
    return [*lines, {**lines[0], "arm": "an arm that is no more"}]


def test_summaries() -> None:
    found = {summary.arm.name: summary for summary in summaries(lines_of_a_study(), ARMS)}
    assert list(found) == ["grpo", "mcpo", "worst", "single_digits", "single_words", "centre", "weight_0.1"]
    assert found["grpo"].seeds == (0, 1, 2, 3) and found["grpo"].differences == {}  # seed 100 counts for no claim
    mcpo = found["mcpo"]
    assert mcpo.average("digits") == pytest.approx(0.41) and mcpo.average("auc") == pytest.approx(0.7)
    assert mcpo.average("transfer") == pytest.approx(0.055)
    assert [mcpo.differences[name].value for name in ("digits", "words", "mean")] == pytest.approx([0.1, 0.0, 0.05])
    assert mcpo.differences["mean"].num_seeds == 3 and "auc" not in mcpo.differences  # grpo has none
    assert (found["worst"].seeds, found["worst"].failed, found["worst"].figures) == ((), (0,), {})
    assert found["weight_0.1"].seeds == (100,)
    assert found["weight_0.1"].differences["mean"].value == pytest.approx(0.05)
    assert found["single_digits"].differences["digits"].value == pytest.approx(0.35 - 0.315)


def test_a_repeated_run_counts_once_and_its_failure_stays_visible() -> None:
    lines = [
        {"arm": "grpo", "seed": 0, "error": "killed", "settings": {"domains": []}},
        line_of("grpo", 0, two(0.5, 0.5)),
    ]
    (summary,) = summaries(lines, ARMS)
    assert (summary.seeds, summary.failed, summary.average("mean")) == ((0,), (0,), 0.5)


# Tables and pictures


def test_the_tables_say_what_the_summaries_say() -> None:
    lines = lines_of_a_study()
    overall, by_domain, mechanism, tuning, choices = sheets(lines, ARMS)
    assert overall.header == ["arm", "runs", "mean", "worst", "area", "transfer"]
    assert [row[:2] for row in overall.rows] == [["grpo", "4"], ["mcpo", "3"], ["worst", "0"]]
    assert overall.rows[1][2] == "0.405, +0.050 [+0.050, +0.050]*"
    assert overall.rows[2][2:] == ["-"] * 4
    assert [row[0] for row in by_domain.rows] == ["grpo", "mcpo", "worst", "single_digits", "single_words"]
    assert [row[0] for row in mechanism.rows] == ["mcpo", "worst"]
    assert tuning.rows[1][:3] == ["weight_0.1", "1", "0.550, +0.050"]
    assert choices.rows == [["weight_0.1", "1", "+0.025", "-", "no"]]
    assert failures(lines) == ["failed: worst, seed 0: it broke"]
    assert cell(summaries(lines, ARMS)[0], "nothing") == "-"


def test_the_table_is_printed_from_the_file(tmp_path: Path, capsys: Any) -> None:
    path = results_file("a", tmp_path)
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines_of_a_study()))
    assert main(["--out", str(tmp_path), "--level", "a"]) == 0
    out = capsys.readouterr().out
    assert "+0.050 [+0.050, +0.050]" in out and "failed: worst, seed 0: it broke" in out
    assert main(["--out", str(tmp_path), "--json"]) == 0
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert objects[1]["arm"] == "mcpo" and objects[1]["differences"]["mean"]["value"] == pytest.approx(0.05)
    assert objects[-1]["differences"]["mean"]["low"] is None


def test_a_page_shows_every_picture_that_there_are_results_for(tmp_path: Path) -> None:
    path = results_file("a", tmp_path / "study")
    for line in lines_of_a_study():
        append(path, line, tmp_path)
    drawn = pages.pictures(Path("docs"), tmp_path)
    assert sorted(path.name for path in drawn) == ["accuracy_a.svg", "domains_a.svg", "ranking_a.svg"]
    for svg in drawn.values():
        words = {element.text for element in ElementTree.fromstring(svg).iter() if element.text}
        assert "mcpo" in words and "single_digits" not in words
    page = pages.results_a(tmp_path)
    assert all(f"]({path.relative_to('docs')})" in page for path in drawn) and "+0.050" in page


def test_a_picture_is_the_same_for_the_same_lines_only() -> None:
    lines = lines_of_a_study()
    drawn = plots.accuracy(lines, ARMS)
    assert drawn == plots.accuracy(lines, ARMS)
    lines[4] = line_of("mcpo", 0, two(0.4, 0.5), auc=0.7)
    assert drawn != plots.accuracy(lines, ARMS)


def test_without_results_there_is_no_picture(tmp_path: Path) -> None:
    assert pages.pictures(Path("docs"), tmp_path) == {}
    assert pages.results_b(tmp_path) == "No run is recorded yet.\n"
    assert plots.accuracy([], ARMS) is plots.ranking([], ARMS) is plots.domain_differences([], ARMS) is None
