"""The comparison of benchmarks with what was recorded. Not covered: the benchmarks themselves, which take minutes."""

import json
from pathlib import Path

import pytest

from benchmarks import guard


@pytest.mark.parametrize(
    ("recorded", "measured", "band", "verdict"),
    [
        (10.0, 14.9, 1.5, "good"),
        (10.0, 15.1, 1.5, "worse"),
        (10.0, 6.7, 1.5, "good"),
        (10.0, 6.6, 1.5, "better"),
        (10.0, 10.0, guard.EXACT, "good"),
        (10.0, 9.0, guard.EXACT, "worse"),
        (None, 9.0, guard.EXACT, "new"),
    ],
)
def test_a_figure_is_held_against_its_band(recorded: float | None, measured: float, band: float, verdict: str) -> None:
    assert guard.verdict(recorded, measured, band) == verdict


def test_every_figure_that_is_compared_was_recorded() -> None:
    for check in guard.CHECKS:
        rows = json.loads((guard.RESULTS / check.file).read_text())[check.name]
        cases = [tuple(row.get(key) for key in check.case) for row in rows]
        assert len(cases) == len(set(cases)), f"{check.name}: {check.case} does not tell the rows apart"
        for figure in check.bands:
            part, _, inner = figure.partition(".")
            found = [row[part] for row in rows if row.get(part) is not None]
            assert found, f"{check.name}: no row has {figure}"
            assert not inner or any(inner in each for each in found), f"{check.name}: no row has {figure}"


def test_a_prediction_that_became_worse_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hold the real benchmark against figures of which one is half of what it was."""
    content = json.loads((guard.RESULTS / "cost.json").read_text())
    content["cost"][-1]["step"] /= 2
    (tmp_path / "cost.json").write_text(json.dumps(content))
    monkeypatch.setattr(guard, "RESULTS", tmp_path)
    assert guard.main(["--only", "cost", "--json"]) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["case"], row["figure"]) for row in rows if row["verdict"] == "worse"] == [("MCPO", "step")]
    assert len(rows) == 12
