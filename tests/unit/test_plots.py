"""Plots: which are written from which files, the arithmetic behind them, and the run folders that are awkward.

Not covered: how they look; that was judged by eye.
"""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_mcpo.reporting.loggers import write_representations
from megatron_mcpo.reporting.plots import principal_plane, similarity_matrix, smoothed, write_plots

NAMES = ["arithmetic", "logic"]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("plots", "representations"):
        (tmp_path / name).mkdir()
    return tmp_path


def write_rewards(folder: Path, rewards: list[float | None], *, similarities: bool = False) -> None:
    rows: list[dict[str, Any]] = [
        {"step": i + 1, "reward/mean": r, "reward/arithmetic": r, "reward/logic": 0.5} for i, r in enumerate(rewards)
    ]
    for row in rows if similarities else ():
        row |= {"contrast/similarity/arithmetic/logic": 0.1 * row["step"], "contrast/similarity/logic/logic": -0.5}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_map(folder: Path, step: int, seed: int, num: int = 16) -> None:
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(num, 8)).astype(np.float16)
    write_representations(
        folder, step, z=z, domain=np.arange(num) % 2, prompt=np.arange(num) // 4, correct=rng.random(num) < 0.5
    )


def names_of(files: tuple[Path, ...]) -> list[str]:
    assert all(path.read_bytes().startswith(PNG) and path.stat().st_size > 5000 for path in files)
    return [path.name for path in files]


def test_a_whole_run_gives_all_plots_and_only_from_its_folder(folder: Path) -> None:
    write_rewards(folder, [0.1 * i for i in range(10)], similarities=True)
    (folder / "eval.jsonl").write_text(
        '{"step": 0, "arithmetic": 0.1, "logic": 0.2, "mean": 0.15, "worst": 0.1}\n'
        '{"step": 10, "arithmetic": 0.5, "logic": 0.4, "mean": 0.45, "worst": 0.4}\n'
    )
    for step in (1, 5, 10):
        write_map(folder, step, seed=step)
    plots = write_plots(folder, NAMES, contrastive=True)
    assert names_of(plots.files) == [
        "reward_by_domain.png",
        "held_out_by_domain.png",
        "representations.png",
        "similarity.png",
    ]
    assert plots.notes == ()
    moved = folder.rename(folder.parent / "moved")
    assert len(write_plots(moved, NAMES, contrastive=True).files) == 4
    assert sorted(p.name for p in (moved / "plots").iterdir()) == sorted(p.name for p in plots.files)


def test_the_map_shows_the_first_and_the_last_step(folder: Path) -> None:
    write_map(folder, 2, seed=0)
    write_map(folder, 12, seed=1)
    write_plots(folder, NAMES, contrastive=True)
    picture = (folder / "plots" / "representations.png").read_bytes()
    write_map(folder, 7, seed=2)
    write_plots(folder, NAMES, contrastive=True)
    assert (folder / "plots" / "representations.png").read_bytes() == picture
    write_map(folder, 100, seed=2)
    write_plots(folder, NAMES, contrastive=True)
    assert (folder / "plots" / "representations.png").read_bytes() != picture


def test_without_representations_it_says_so(folder: Path) -> None:
    write_rewards(folder, [0.1, 0.2])
    plots = write_plots(folder, NAMES, contrastive=False)
    assert names_of(plots.files) == ["reward_by_domain.png"]
    assert len(plots.notes) == 3
    assert "contrastive" in plots.notes[1] and "contrastive" in plots.notes[2]
    with_terms = write_plots(folder, NAMES, contrastive=True).notes
    assert with_terms[2] == "no similarity.png: no step had two correct rollouts to compare"


def test_an_empty_run_has_no_plots_and_four_reasons(tmp_path: Path) -> None:
    plots = write_plots(tmp_path, NAMES, contrastive=True)
    assert plots.files == ()
    assert len(plots.notes) == 4


@pytest.mark.parametrize("rewards", [[0.5], [None, 0.5], [0.5, None, 0.25], [None, -2.0, 3.0]])
def test_short_runs_and_missing_figures(folder: Path, rewards: list[float | None]) -> None:
    write_rewards(folder, rewards)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "half')
    assert names_of(write_plots(folder, NAMES, contrastive=True).files) == ["reward_by_domain.png"]


def test_the_similarity_matrix_is_symmetric_and_a_mean_of_what_is_there() -> None:
    rows: list[dict[str, Any]] = [
        {"contrast/similarity/b/c": 0.2, "contrast/similarity/a/a": 0.5, "contrast/similarity/c/b": 9.0},
        {"contrast/similarity/b/c": 0.4, "contrast/similarity/a/c": None},
    ]
    expected = [[0.5, math.nan, math.nan], [math.nan, math.nan, 0.3], [math.nan, 0.3, math.nan]]
    np.testing.assert_allclose(similarity_matrix(rows, ["a", "b", "c"]), np.array(expected))
    assert np.isnan(similarity_matrix([], ["a", "b"])).all()


def picture_of_similarities(folder: Path, values: list[float | None], names: list[str]) -> bytes:
    rows = [{"step": i + 1, f"contrast/similarity/{names[0]}/{names[-1]}": v} for i, v in enumerate(values)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "similarity.png" in names_of(write_plots(folder, names, contrastive=True).files)
    return (folder / "plots" / "similarity.png").read_bytes()


def test_similarities_of_the_first_steps_stand_beside_those_of_the_last(folder: Path) -> None:
    values: list[float | None] = [0.1, None, 0.2, 0.3, None, 0.7, 0.8]  # five steps with figures: one at either end
    before = picture_of_similarities(folder, values, NAMES)
    assert picture_of_similarities(folder, [0.1, None, 0.9, -0.9, None, 0.0, 0.8], NAMES) == before
    assert picture_of_similarities(folder, [0.2, *values[1:]], NAMES) != before
    assert picture_of_similarities(folder, [*values[:-1], 0.9], NAMES) != before


@pytest.mark.parametrize("num_domains", [1, 2, 12])
@pytest.mark.parametrize("num_steps", [1, 2, 20])
def test_similarities_of_any_number_of_domains_and_steps(folder: Path, num_domains: int, num_steps: int) -> None:
    assert picture_of_similarities(folder, [0.5] * num_steps, [f"domain_{i}" for i in range(num_domains)])


def test_domains_without_a_figure_and_unknown_rows_are_left_out(folder: Path) -> None:
    write_rewards(folder, [0.5, 0.6])
    write_map(folder, 1, seed=0)
    plots = write_plots(folder, ["never_sampled", "arithmetic"], contrastive=True)
    assert names_of(plots.files) == ["reward_by_domain.png", "representations.png"]


def test_awkward_representations_do_not_stop_a_run(folder: Path) -> None:
    z = np.full((4, 8), np.nan, dtype=np.float32)
    z[0] = 1.0
    write_representations(folder, 1, z=z, domain=np.zeros(4, int), prompt=np.zeros(4, int), correct=np.ones(4, bool))
    (folder / "representations" / "step_000002.npz").write_bytes(b"PK half a file")
    assert names_of(write_plots(folder, NAMES, contrastive=True).files) == ["representations.png"]
    write_representations(
        folder, 1, z=z[1:], domain=np.zeros(3, int), prompt=np.zeros(3, int), correct=np.ones(3, bool)
    )
    assert write_plots(folder, NAMES, contrastive=True).files == ()


def test_more_domains_than_colours(folder: Path) -> None:
    names = [f"domain_{i}" for i in range(12)]
    rows = [{"step": s, "reward/mean": 0.5, **{f"reward/{n}": s / 10 for n in names}} for s in range(1, 4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert names_of(write_plots(folder, names, contrastive=True).files) == ["reward_by_domain.png"]


def test_the_plane_is_that_of_the_covariance() -> None:
    rng = np.random.default_rng(3)
    z = rng.normal(size=(50, 5)) * np.array([0.1, 5.0, 0.2, 2.0, 0.3]) + 7.0
    mean, plane, share = principal_plane(z)
    np.testing.assert_allclose(mean, z.mean(axis=0))
    np.testing.assert_allclose(plane @ plane.T, np.eye(2), atol=1e-12)
    values, vectors = np.linalg.eigh(np.cov(z.T))
    np.testing.assert_allclose(share, values[::-1][:2] / values.sum())
    np.testing.assert_allclose(np.abs(np.sum(plane * vectors.T[::-1][:2], axis=1)), 1.0)


@pytest.mark.parametrize("z", [np.ones((1, 4)), np.ones((3, 4)), np.array([[1.0], [2.0]])])
def test_the_plane_of_too_little_is_finite(z: np.ndarray) -> None:
    _, plane, share = principal_plane(z)
    assert plane.shape == (2, z.shape[1])
    assert np.isfinite(plane).all()
    assert np.isfinite(share).all()


def test_smoothing_is_a_centred_mean_without_the_missing() -> None:
    values = smoothed([1.0, math.nan, 4.0, 7.0, math.nan, math.nan, math.nan], window=3)
    np.testing.assert_allclose(values, [1.0, 2.5, 5.5, 5.5, 7.0, math.nan, math.nan])
    np.testing.assert_allclose(smoothed([1.0, 2.0], window=1), [1.0, 2.0])


def test_importing_the_module_imports_no_matplotlib() -> None:
    code = "import sys, megatron_mcpo.reporting.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=180).returncode == 0
