"""Comparing runs: which of them are one method, the figures against those worked out by hand, and what is refused.

The folders are written by the package's own writers, which need no model. Not covered: how the plots look.
"""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_mcpo.cli.compare import main
from megatron_mcpo.config.config import load
from megatron_mcpo.reporting.accuracy import Item, accuracy_metrics
from megatron_mcpo.reporting.change import Sample, average, change
from megatron_mcpo.reporting.compare import compare
from megatron_mcpo.reporting.loggers import MetricsLog
from megatron_mcpo.storage.run_folder import RunFolder

FILE = """
[run]
steps = 6
[model]
path = "model"
[batch]
prompts = 4
samples = 4
[optimizer]
lr = 1e-5
[[domain]]
name = "sums"
sources = [{ generator = "chain_sum" }]
[[domain]]
name = "logic"
sources = [{ generator = "syllogism" }]
"""
PLAIN = ("--contrastive.cross_domain_weight", "0")
OTHERWISE = ("--evaluation.samples", "4", "--evaluation.temperature", "1", "--evaluation.items", "9")
PNG = b"\x89PNG\r\n\x1a\n"


def items(correct: int, of: int = 8) -> list[Item]:
    return [Item(correct=(number < correct,), answers=("a",)) for number in range(of)]


def write_run(
    folder: Path,
    name: str,
    *overrides: str,
    seed: int = 0,
    reward: float = 0.5,
    right: Sequence[tuple[int, int]] = ((2, 4), (4, 6)),
    steps: int = 6,
    finished: bool = True,
) -> Path:
    """A run of `steps`, whose rewards of sums rise by 0.1 in the last two; right: of 8 items, at steps 0 and 6."""
    file = folder / "config.toml"
    file.write_text(FILE)
    names = ["--run.dir", str(folder / "runs"), "--run.name", name, "--run.seed", str(seed)]
    opened = RunFolder.open(load(file, [*names, *overrides]))
    log = MetricsLog(opened.path, [])
    for step in range(1, steps + 1):
        sums, logic = reward + 0.1 * (step > 4), 0.5 * reward
        log.log(step, {"reward/sums": sums, "reward/logic": logic, "reward/mean": (sums + logic) / 2})
    for number, (sums_right, logic_right) in enumerate(right):
        log.log_eval(6 * number, accuracy_metrics({"sums": items(sums_right), "logic": items(logic_right)}))
    log.close()
    if finished:
        opened.finish()
    opened.close()
    return opened.path


def told(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    assert main(["--json", *map(str, arguments)]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_two_runs_domain_by_domain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_run(tmp_path, "mcpo", reward=0.5)
    second = write_run(tmp_path, "grpo", *PLAIN, reward=0.3, right=((2, 4), (6, 5)))
    found = told(capsys, first, second, "--out", tmp_path / "plots")
    assert (found["window"], found["notes"]) == (2, [])
    mcpo, grpo = found["methods"]
    assert (mcpo["name"], grpo["name"]) == ("cross_domain_weight=0.1", "cross_domain_weight=0")
    assert (mcpo["runs"], mcpo["seeds"], mcpo["differences"]) == ([str(first)], [0], [])
    assert grpo["differences"] == ["contrastive.cross_domain_weight 0.1 there, 0.0 here"]
    assert mcpo["domains"]["sums"]["reward"]["mean"] == pytest.approx(0.6), "of the last two steps"
    assert mcpo["reward"]["mean"] == pytest.approx((0.6 + 0.25) / 2)
    logged = accuracy_metrics({"sums": items(4), "logic": items(6)})
    assert mcpo["domains"]["sums"]["accuracy"] == {
        "mean": 0.5, "low": logged["accuracy_low/sums"], "high": logged["accuracy_high/sums"],
    }  # fmt: skip
    assert (mcpo["mean"]["mean"], mcpo["worst"]) == (0.625, {"mean": 0.5, "low": None, "high": None})
    assert [grpo["domains"][name]["change"] for name in ("sums", "logic")] == [0.25, -0.125]
    assert (grpo["backward_transfer"], grpo["forgetting"], grpo["fell"]) == (0.0625, 0.0625, ["logic"])
    assert (mcpo["backward_transfer"], mcpo["fell"]) == (0.0, [])
    assert found["plots"] == [str(tmp_path / "plots" / name) for name in ("reward.png", "accuracy.png")]
    assert all(Path(path).read_bytes().startswith(PNG) for path in found["plots"])


def test_seeds_of_one_method_are_a_mean_and_a_band(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the layout or how often checkpoints are written is another."""
    runs = [
        write_run(tmp_path, "a", seed=0, reward=0.2, right=((2, 4), (3, 8))),
        write_run(tmp_path, "b", *PLAIN, seed=0, right=((2, 4), (8, 2))),
        write_run(tmp_path, "c", "--parallel.tensor", "2", seed=1, reward=0.4, right=((4, 4), (6, 8))),
        write_run(tmp_path, "d", "--run.checkpoint_every", "2", seed=2, reward=0.3, right=((6, 4), (6, 2))),
        write_run(tmp_path, "e", *PLAIN, seed=1, right=((2, 4), (6, 2))),
    ]
    found = told(capsys, *runs, "--out", tmp_path)
    a, b = found["methods"]
    assert (a["seeds"], b["seeds"]) == ([0, 1, 2], [0, 1])
    assert (a["name"], b["name"]) == ("cross_domain_weight=0.1", "cross_domain_weight=0")
    assert a["domains"]["sums"]["accuracy"] == {"mean": pytest.approx(5 / 8), "low": 3 / 8, "high": 6 / 8}
    assert a["domains"]["sums"]["reward"] == pytest.approx({"mean": 0.4, "low": 0.3, "high": 0.5})
    assert a["worst"] == {"mean": pytest.approx((3 + 6 + 2) / 24), "low": 2 / 8, "high": 6 / 8}
    assert b["domains"]["sums"]["change"] == pytest.approx(7 / 8 - 5 / 8)
    assert b["fell"] == ["logic"]
    curve = compare(runs).methods[0].accuracy_curve("sums")
    assert (list(curve.steps), list(curve.low), list(curve.high)) == ([0, 6], [2 / 8, 3 / 8], [6 / 8, 6 / 8])
    assert list(curve.values) == pytest.approx([4 / 8, 5 / 8])


def test_a_table_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path, "mcpo"), write_run(tmp_path, "grpo", *PLAIN, right=((2, 4), (6, 5)), finished=False)]
    assert main([*map(str, runs), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    rows = [line.split("│")[1:-1] for line in printed.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in row] for row in rows]
    mcpo, grpo = "cross_domain_weight=0.1", "cross_domain_weight=0"
    assert [(row[0], row[1]) for row in cells] == [
        ("sums", mcpo), ("", grpo), ("logic", mcpo), ("", grpo),
        ("mean", mcpo), ("", grpo), ("worst", mcpo), ("", grpo),
    ]  # fmt: skip
    assert [row[-2] for row in cells] == ["", "+0.250", "", "-0.125", "", "+0.062", "", ""]
    assert [bool(row[-1]) for row in cells] == [bool(row[-2]) for row in cells]
    assert all(row[-1].endswith(", has 0") for row in cells if row[-1]), "8 items say little"
    assert (cells[1][3], cells[1][5]) == ("0.600", "0.750")
    assert "fell: logic (0 is in its interval)" in printed and "over held-out items" in printed
    assert f"{grpo}: {runs[1]} (seed 0)" in printed and f"WARNING: {runs[1]} is not finished: 6 steps" in printed


def test_what_makes_figures_hard_to_compare_is_said(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path, "whole"),
        write_run(tmp_path, "again"),
        write_run(tmp_path, "short", *PLAIN, right=((2, 4),), steps=3, finished=False),
        write_run(
            tmp_path,
            "none",
            "--evaluation.samples",
            "4",
            "--evaluation.temperature",
            "1",
            "--evaluation.items",
            "9",
            right=(),
        ),
    ]
    comparison = compare(runs)
    assert comparison.window == 1, "a third of the shortest run"
    notes = "\n".join(comparison.notes())
    for words in (
        "short is not finished: 3 steps",
        "none has no evaluation",
        "of different steps: 0, 6",
        "1 at temperature 0, 4 at temperature 1",
        "of different questions",
        ": several runs have the same seed: 0, 0",
    ):
        assert words in notes, words
    none = comparison.methods[2]
    assert math.isnan(none.accuracy("mean").mean) and math.isnan(comparison.transfer(none).mean)
    comparison.write_plots(tmp_path / "plots")


def test_domains_that_only_one_run_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = write_run(tmp_path, "mcpo"), write_run(tmp_path, "other", *PLAIN)
    for path in second.iterdir():
        if path.suffix in (".toml", ".jsonl"):
            path.write_text(path.read_text().replace("logic", "code"))
    found = told(capsys, first, second, "--out", tmp_path)
    assert list(found["methods"][1]["domains"]) == ["sums", "logic", "code"]
    assert found["methods"][1]["domains"]["logic"]["accuracy"]["mean"] is None
    assert found["methods"][1]["backward_transfer"] == 0.0, "over sums alone"


def test_methods_that_differ_in_much_are_called_by_their_folders(tmp_path: Path) -> None:
    """With the path where two folders have one name."""
    much = [*PLAIN, "--optimizer.lr", "2e-5", "--batch.prompts", "6", "--batch.samples", "6"]
    first, second, third = (
        write_run(tmp_path, "mcpo"),
        write_run(tmp_path, "grpo", *much),
        write_run(tmp_path, "other", *much, *OTHERWISE),
    )
    moved = tmp_path / "elsewhere" / "mcpo"
    shutil.copytree(second, moved)
    assert [method.name for method in compare([first, moved, third]).methods] == [str(first), str(moved), "other"]
    assert [method.name for method in compare([first]).methods] == ["mcpo"]


def test_names_say_where_several_methods_differ(tmp_path: Path) -> None:
    path = "models/" + 30 * "x" + "-8b"
    runs = [
        write_run(tmp_path, "a", "--optimizer.lr", "2e-5"),
        write_run(tmp_path, "b", *PLAIN, "--optimizer.lr", "2e-5"),
        write_run(tmp_path, "c", *PLAIN, "--model.path", path),
    ]
    assert [method.name for method in compare(runs).methods] == [
        "path=model cross_domain_weight=0.1 lr=2e-05",
        "path=model cross_domain_weight=0 lr=2e-05",
        f"path=...{path[-21:]} cross_domain_weight=0 lr=1e-05",
    ]


def test_a_change_has_an_interval_over_items_or_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of one run each that of the logged intervals, combined; of several that of Welch, whatever the items say."""
    one = write_run(tmp_path, "one")
    other = write_run(tmp_path, "other", *PLAIN, right=((2, 4), (6, 5)))
    now, before = (accuracy_metrics({"sums": items(n), "logic": items(m)}) for n, m in ((6, 5), (4, 6)))
    found = told(capsys, one, other, "--out", tmp_path)["methods"][1]
    assert found["domains"]["sums"]["change_interval"] == {
        "low": pytest.approx(0.25 - math.hypot(0.75 - now["accuracy_low/sums"], before["accuracy_high/sums"] - 0.5)),
        "high": pytest.approx(0.25 + math.hypot(now["accuracy_high/sums"] - 0.75, 0.5 - before["accuracy_low/sums"])),
        "over": "items",
    }
    mean = found["backward_transfer_interval"]
    assert mean["low"] < found["backward_transfer"] < mean["high"] and mean["over"] == "items"
    seeds = [write_run(tmp_path, f"s{n}", seed=n, right=((2, 4), (3 + n, 4))) for n in (1, 2)]
    seeds += [write_run(tmp_path, f"o{n}", *PLAIN, seed=n, right=((2, 4), (5 + n, 4))) for n in (1, 2)]
    found = told(capsys, *seeds, "--out", tmp_path)["methods"][1]
    # 2.5 / 8 each way: standard error sqrt(2 (1/16)^2), two degrees of freedom, whose t quantile is 4.303.
    margin = 4.302653 * math.sqrt(2) / 16
    assert found["domains"]["sums"]["change_interval"] == {
        "low": pytest.approx(0.25 - margin), "high": pytest.approx(0.25 + margin), "over": "seeds",
    }  # fmt: skip
    assert found["domains"]["logic"]["change_interval"]["over"] == "items", "all seeds are equal there"
    assert found["backward_transfer_interval"]["over"] == "seeds"


def drawn(share: float, num_items: int, generator: np.random.Generator) -> Sample:
    logged = accuracy_metrics(
        {"sums": [Item(correct=(bool(right),), answers=("a",)) for right in generator.random(num_items) < share]}
    )
    keys = ("sums", "accuracy_low/sums", "accuracy_high/sums")
    values, low, high = (np.array([logged[key]]) for key in keys)
    return Sample(values_R=values, low_R=low, high_R=high)


def test_95_of_100_intervals_over_items_hold_the_true_change() -> None:
    generator = np.random.default_rng(0)
    covered = []
    for _ in range(200):
        found = change(drawn(0.3, 100, generator), drawn(0.45, 100, generator))
        covered.append(found.low <= 0.15 <= found.high)
    assert 0.90 <= np.mean(covered) <= 0.99


def test_the_mean_over_domains_of_two_equal_ones_is_surer_by_the_root_of_two() -> None:
    one = Sample(values_R=np.array([0.5]), low_R=np.array([0.4]), high_R=np.array([0.7]))
    both = average([one, one])
    assert both.values_R == 0.5
    assert [both.low_R[0], both.high_R[0]] == pytest.approx([0.5 - 0.1 / math.sqrt(2), 0.5 + 0.2 / math.sqrt(2)])
    unknown = Sample(values_R=np.array([math.nan]), low_R=np.array([math.nan]), high_R=np.array([math.nan]))
    assert change(one, unknown).basis == change(unknown, one).basis == "unknown"


def test_folders_that_are_no_runs_are_named_all_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path, "mcpo")
    empty, strange = tmp_path / "empty", tmp_path / "strange"
    for folder in (empty, strange):
        shutil.copytree(run, folder)
    (empty / "metrics.jsonl").write_text("")
    (strange / "config.toml").write_text("[run]\nsteps = 0\n")
    given = [run, tmp_path / "runs", tmp_path / "nowhere", empty, strange, tmp_path / "runs" / "latest"]
    assert main([*map(str, given), "--out", str(tmp_path / "plots")]) == 2
    said = capsys.readouterr().err
    for words in (
        "runs: must be the folder of a run (config.toml and metrics.jsonl missing). Give runs/NAME",
        "nowhere: must be the folder of a run (no such folder)",
        "empty: must have logged a step (metrics.jsonl holds none)",
        "strange/config.toml: run.steps = 0",
        "latest: must be given once (they are the same run)",
    ):
        assert words in said, words
    assert not (tmp_path / "plots").exists()


def test_plots_that_can_not_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path, "mcpo")
    assert main([str(run), "--out", str(run / "config.toml")]) == 2
    assert "--out" in capsys.readouterr().err
