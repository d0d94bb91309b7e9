"""The whole program on files, with mixing by pass rates, resampling and domains of different sizes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support import program
from tests.support.program import metrics, train_forked
from tests.support.resumed_runs import figures

DYNAMIC = """
[data]
mixing = "worst"
window = 2
item_curriculum = true
resample = 2
max_bad_rows = 0.1
"""
DOMAINS = """
[[domain]]
name = "digits"
shots = 1
samples = 6
items = 9
sources = [{{ file = "{folder}/digits.jsonl" }}]
[[domain]]
name = "letters"
shots = 0
max_response_tokens = 2
sources = [{{ file = "{folder}/letters.jsonl" }}]
"""


def write_config(model: Path, folder: Path) -> Path:
    digits = [{"question": f"The last of {n}?", "answer": n % 3, "verifier": "exact"} for n in range(30)]
    letters = [
        {"prompt": f"Say {n}.", "answer": str(n % 10) if n % 2 else "no", "verifier": "exact"} for n in range(30)
    ]
    for name, rows in (("digits", digits), ("letters", letters)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    path = program.write_config(model, folder)
    head, _, _ = path.read_text().partition("[[domain]]")
    path.write_text(head.replace("lr = 2e-3", "lr = 2e-4") + DYNAMIC + DOMAINS.format(folder=folder))
    return path


def run(model: Path, folder: Path) -> tuple[Path, str]:
    finished = train_forked(write_config(model, folder))
    assert finished.returncode == 0, finished.stderr[-3000:]
    return folder / "runs" / "tiny", finished.stdout


def rollouts(folder: Path) -> list[list[dict[str, Any]]]:
    """Of every step."""
    files = sorted((folder / "rollouts").iterdir())
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return run(model, tmp_path_factory.mktemp("whole"))


def test_domains_have_their_own_sizes_and_limits_and_resampling_is_accounted_for(whole: tuple[Path, str]) -> None:
    folder, output = whole
    assert "source 'letters.jsonl': 1 of 31 rows are skipped: 1 malformed (first: line 31 " in output
    rows = metrics(folder)
    for row, step in zip(rows, rollouts(folder), strict=True):
        groups: dict[tuple[str, int], int] = {}
        for rollout in step:
            key = (rollout["domain"], rollout["index"])
            groups[key] = groups.get(key, 0) + 1
        assert all(count % (6 if domain == "digits" else 4) == 0 for (domain, _), count in groups.items())
        assert {domain for domain, _ in groups} == {"digits", "letters"}
        assert row["resample/prompts"] == 8 + row["resample/replaced"] and row["resample/rounds"] <= 2
        assert row["response_tokens/letters"] <= 2
    assert sum(row["resample/replaced"] for row in rows) > 0


def test_killed_and_started_again_it_ends_with_the_same_figures(whole: tuple[Path, str], tmp_path: Path) -> None:
    """As if killed at the very end: what mixing and the items' curriculum knew after step 4 of 6 is in a checkpoint."""
    run = shutil.copytree(whole[0], tmp_path / "tiny")
    (run / "FINISHED").unlink()
    shutil.rmtree(run / "checkpoints" / "step_000006")
    resumed = train_forked(whole[0].parent.parent / "config.toml", "--run.dir", str(tmp_path))
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "resuming after step 4" in resumed.stdout
    assert "2 steps logged since the checkpoint: dropped and repeated" in resumed.stdout
    assert figures(run) == figures(whole[0])


def test_two_ranks_resample_what_one_does(whole: tuple[Path, str], tmp_path: Path) -> None:
    overrides = ("--run.dir", str(tmp_path), "--run.steps", "1", "--parallel.data", "2")
    two = train_forked(whole[0].parent.parent / "config.toml", *overrides, ranks=2)
    assert two.returncode == 0, two.stderr[-3000:]
    expected, (found,) = metrics(whole[0])[0], metrics(tmp_path / "tiny")
    assert found["resample/replaced"] > 0
    for name in (
        "resample/prompts",
        "resample/replaced",
        "resample/rounds",
        "reward/mean",
        "nonzero_advantage/letters",
    ):
        assert found[name] == expected[name], name
    keys = ("domain", "index", "completion", "reward")
    one, both = ([[each[key] for key in keys] for each in rollouts(run)[0]] for run in (whole[0], tmp_path / "tiny"))
    assert both == one
