"""Draw a run from the files of its folder and from nothing else, so that plots can be drawn again.

Domains differ in colour and in marker: the colours are Okabe and Ito's, which colour-blind readers tell apart
(https://jfly.uni-koeln.de/color/).
"""

import io
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_mcpo.reporting.summary import summary_window
from megatron_mcpo.storage.files import read_jsonl, step_files, write_atomically
from megatron_mcpo.storage.run_folder import EVALUATIONS, METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "h")
MARKERS_A_CURVE = 15
DOTS_PER_INCH = 150


@dataclass(frozen=True, kw_only=True)
class Plots:
    """The files that `write_plots` wrote, and notes on those that it did not write."""

    files: tuple[Path, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Values over steps, and a band around them; NaN counts as absent. All four have the same length."""

    label: str
    steps: Sequence[int]
    values: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class _Map:
    """The representations of one step on the plane. xy: [M, 2]; domain, correct: [M]."""

    step: int
    xy: np.ndarray
    domain: np.ndarray
    correct: np.ndarray


def write_plots(folder: Path, domain_names: Sequence[str], *, contrastive: bool) -> Plots:
    """Write reward_by_domain.png, held_out_by_domain.png, representations.png and similarity.png under folder/plots.

    A plot that has no data is not written; a note says why. Raises OSError if the folder cannot be written.

    contrastive: whether the run has a contrastive term
    """
    steps = read_jsonl(folder / METRICS)
    evaluations = read_jsonl(folder / EVALUATIONS)
    maps, shares = _project(folder / "representations", len(domain_names))
    (folder / "plots").mkdir(exist_ok=True)
    files: list[Path] = []
    notes: list[str] = []
    for name, figure, missing in (
        ("reward_by_domain", _draw_rewards(steps, domain_names), "metrics.jsonl holds no rewards"),
        ("held_out_by_domain", _draw_evaluations(evaluations, domain_names), "eval.jsonl holds no evaluations"),
        (
            "representations",
            _draw_maps(maps, shares, domain_names),
            "there are no representations" + ("" if contrastive else " without a contrastive term"),
        ),
        (
            "similarity",
            _draw_similarity(steps, domain_names),
            "no step had two correct rollouts to compare"
            if contrastive
            else "there are no representations without a contrastive term",
        ),
    ):
        if figure is None:
            notes.append(f"no {name}.png: {missing}")
            continue
        files.append(folder / "plots" / f"{name}.png")
        _save(figure, files[-1])
    return Plots(files=tuple(files), notes=tuple(notes))


def write_curves(path: Path, panels: Mapping[str, Sequence[Curve]], *, title: str, ylabel: str) -> None:
    """Write a PNG with a panel for each entry; curves of one label look the same in all. Raises OSError."""
    labels = list(dict.fromkeys(curve.label for curves in panels.values() for curve in curves))
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = _figure(4.5 * columns + 1.5, 3.2 * rows + 0.6)
    cells = figure.subplots(rows, columns, sharex=True, squeeze=False).flat
    for axes, (name, curves) in zip(cells, panels.items(), strict=False):
        for curve in curves:
            colour, marker = _style(labels.index(curve.label))
            every = 1 + len(curve.steps) // MARKERS_A_CURVE
            axes.plot(
                curve.steps, curve.values, color=colour, linewidth=1.6, marker=marker, markevery=every, markersize=5
            )
            axes.fill_between(curve.steps, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0)
        axes.set_title(name, fontsize=11)
        _finish_axes(axes, ylabel=ylabel)
    for axes in cells:  # of the last row, what no panel is left for
        axes.set_visible(False)
    _curve_legend(figure, labels)
    figure.suptitle(title, fontsize=13)
    _save(figure, path)


def principal_plane(z_MD: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the plane through the mean along which the rows vary most (principal component analysis).

    The result is the mean [D], two unit axes [2, D], and each axis' share of the variance [2]. Signs are fixed by
    making the largest entry of an axis positive. Axes that the rows do not determine (one row, D = 1) are zero.
    """
    mean_D = z_MD.mean(axis=0)
    _, sizes, axes = np.linalg.svd(z_MD - mean_D, full_matrices=False)
    plane_2D = np.zeros((2, z_MD.shape[1]))
    share_2 = np.zeros(2)
    variance = float((sizes**2).sum())
    for i in range(min(2, len(sizes)) if variance > 0 else 0):
        largest = axes[i, np.abs(axes[i]).argmax()]
        plane_2D[i] = axes[i] * np.sign(largest)
        share_2[i] = sizes[i] ** 2 / variance
    return mean_D, plane_2D, share_2


def smoothed(values: Sequence[float], window: int) -> np.ndarray:
    """Return the mean of the `window` (odd) values around each one, fewer at the ends; NaN counts as absent."""
    series = np.asarray(values, dtype=float)
    result = np.full(len(series), np.nan)
    for i in range(len(series)):
        part = series[max(0, i - window // 2) : i + window // 2 + 1]
        if np.isfinite(part).any():
            result[i] = np.nanmean(part)
    return result


def similarity_matrix(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> np.ndarray:
    """Return the mean contrast/similarity/<a>/<b> of the rows for all pairs of names: [K, K], NaN if never measured."""
    matrix = np.full((len(names), len(names)), np.nan)
    for a, name in enumerate(names):
        for b in range(a, len(names)):
            found = [v for v in _series(rows, f"contrast/similarity/{name}/{names[b]}") if math.isfinite(v)]
            if found:
                matrix[a, b] = matrix[b, a] = np.mean(found)
    return matrix


def smoothing_window(num_steps: int) -> int:
    """Return the steps that a curve is smoothed over, odd: 1 for less than 6, 5 in a short run, 1/20 of a long one."""
    return 1 if num_steps < 6 else 3 if num_steps < 12 else 2 * max(2, num_steps // 40) + 1


def _style(domain: int) -> tuple[str, str]:
    """Return colour and marker; with seven colours and nine markers, 63 domains differ."""
    return COLOURS[domain % len(COLOURS)], MARKERS[domain % len(MARKERS)]


def _figure(width: float, height: float) -> "Figure":
    # The Figure class by itself draws with Agg: no window, no display, no state shared with the caller's pyplot.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: "Figure", path: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DOTS_PER_INCH)
    write_atomically(path, content.getvalue())


def _series(rows: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [math.nan if row.get(key) is None else float(row[key]) for row in rows]


def _draw_rewards(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> "Figure | None":
    present = [(i, name) for i, name in enumerate(names) if np.isfinite(_series(rows, f"reward/{name}")).any()]
    if not present:
        return None
    steps = [row["step"] for row in rows]
    window = smoothing_window(len(rows))
    every = 1 + len(rows) // MARKERS_A_CURVE
    figure = _figure(9.0, 5.0)
    axes = figure.subplots()
    for i, name in present:
        colour, marker = _style(i)
        raw = _series(rows, f"reward/{name}")
        line = smoothed(raw, window)
        axes.plot(steps, raw, linestyle="none", marker=marker, color=colour, alpha=0.25, markersize=4)
        axes.plot(steps, line, color=colour, linewidth=1.6, marker=marker, markevery=every, markersize=5, label=name)
    mean = _series(rows, "reward/mean")
    axes.plot(steps, mean, linestyle="none", marker=".", color="black", alpha=0.4)
    axes.plot(steps, smoothed(mean, window), color="black", linewidth=3, label="mean")
    title = "Training reward by domain"
    if window > 1:
        title += f"\n(lines: mean of {window} steps; faint markers: single steps)"
    axes.set_title(title, fontsize=12)
    _finish_curves(axes, ylabel="mean reward of the step's rollouts")
    return figure


def _draw_evaluations(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> "Figure | None":
    present = [(i, name) for i, name in enumerate(names) if np.isfinite(_series(rows, name)).any()]
    if not present:
        return None
    steps = [row["step"] for row in rows]
    figure = _figure(9.0, 5.0)
    axes = figure.subplots()
    for i, name in present:
        colour, marker = _style(i)
        axes.plot(steps, _series(rows, name), color=colour, linewidth=1.6, marker=marker, markersize=7, label=name)
    axes.plot(steps, _series(rows, "mean"), color="black", linewidth=3, marker=".", markersize=10, label="mean")
    axes.set_title("Held-out accuracy by domain", fontsize=12)
    _finish_curves(axes, ylabel="share of held-out items answered correctly")
    return figure


def _finish_curves(axes: "Axes", ylabel: str) -> None:
    _finish_axes(axes, ylabel)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _curve_legend(figure: "Figure", labels: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for number, label in enumerate(labels):
        colour, marker = _style(number)
        handles.append(Line2D([], [], color=colour, marker=marker, linewidth=1.6, markersize=5, label=label))
    figure.legend(handles=handles, loc="outside right center", frameon=False)


def _finish_axes(axes: "Axes", ylabel: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    low, high = axes.dataLim.intervaly
    if low >= 0 and high <= 1:
        axes.set_ylim(-0.03, 1.03)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _project(folder: Path, num_domains: int) -> tuple[list[_Map], np.ndarray]:
    """Project the first and the last step on one plane, fitted on both, so that movement in it is real."""
    files = step_files(folder)
    parts = []
    for step, path in dict([files[0], files[-1]]).items() if files else ():
        loaded = load_representations(path, num_domains)
        if loaded is not None:
            parts.append((step, *loaded[1:]))
    if not parts:
        return [], np.zeros(2)
    mean_D, plane_2D, share_2 = principal_plane(np.concatenate([z for _, z, _, _ in parts]))
    maps = [
        _Map(step=step, xy=(z - mean_D) @ plane_2D.T, domain=domain, correct=correct)
        for step, z, domain, correct in parts
    ]
    return maps, share_2


def load_representations(path: Path, num_domains: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """Load row numbers in the file, representations as float64, domains and correctness of the rows that are finite.

    None without such a row, and for a damaged file.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            z, domain, correct = data["z"].astype(np.float64), data["domain"], data["correct"].astype(bool)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None
    keep = np.isfinite(z).all(axis=1) & (domain >= 0) & (domain < num_domains)
    return (keep.nonzero()[0], z[keep], domain[keep], correct[keep]) if keep.any() else None


def _draw_maps(maps: Sequence[_Map], share_2: np.ndarray, names: Sequence[str]) -> "Figure | None":
    if not maps:
        return None
    figure = _figure(6.0 * len(maps) + 1.2, 6.0)
    panels = figure.subplots(1, len(maps), sharex=True, sharey=True, squeeze=False)[0]
    for panel, part in zip(panels, maps, strict=True):
        _draw_map(panel, part, len(names))
        panel.set_title(
            f"step {part.step}: {len(part.domain)} rollouts, {part.correct.mean():.0%} correct", fontsize=12
        )
        panel.set_xlabel(f"first principal axis ({share_2[0]:.0%} of the variance)")
    panels[0].set_ylabel(f"second principal axis ({share_2[1]:.0%})")
    figure.suptitle("Rollout representations" + (", one map for both steps" if len(maps) > 1 else ""), fontsize=13)
    seen = sorted({int(d) for part in maps for d in part.domain})
    _map_legend(figure, [(i, names[i]) for i in seen])
    return figure


def _draw_map(panel: "Axes", part: _Map, num_domains: int) -> None:
    # Many points hide each other: smaller and more transparent as they become more.
    size = float(np.clip(6000 / max(1, len(part.domain)), 8, 45))
    for domain in range(num_domains):
        colour, marker = _style(domain)
        for correct in (False, True):
            rows = (part.domain == domain) & (part.correct == correct)
            panel.scatter(
                part.xy[rows, 0],
                part.xy[rows, 1],
                s=size,
                marker=marker,
                facecolors=colour if correct else "none",
                edgecolors=colour,
                linewidths=1.0,
                alpha=0.75,
            )
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def _map_legend(figure: "Figure", domains: Sequence[tuple[int, str]]) -> None:
    from matplotlib.lines import Line2D

    def entry(label: str, colour: str, marker: str, face: str) -> Line2D:
        return Line2D(
            [], [], linestyle="none", marker=marker, color=colour, markerfacecolor=face, markersize=7, label=label
        )

    handles = []
    for i, name in domains:
        colour, marker = _style(i)
        handles.append(entry(name, colour, marker, colour))
    handles.append(entry("filled: correct", "black", "o", "black"))
    handles.append(entry("hollow: incorrect", "black", "o", "none"))
    figure.legend(handles=handles, loc="outside right center", frameon=False)


def _draw_similarity(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> "Figure | None":
    """Draw the similarities of the first steps beside those of the last ones, or those of the only step."""
    steps = [row for row in rows if np.isfinite(similarity_matrix([row], names)).any()]
    if not steps:
        return None
    window = summary_window(len(steps))
    parts = [steps] if len(steps) == 1 else [steps[:window], steps[-window:]]
    size = max(3.5, 0.8 * len(names))
    figure = _figure((size + 0.6) * len(parts) + 2.2, size + 1.2)
    panels = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
    for panel, part in zip(panels, parts, strict=True):
        image = _draw_matrix(panel, similarity_matrix(part, names), names)
        first, last = part[0]["step"], part[-1]["step"]
        panel.set_title(f"step {first}" if first == last else f"mean of steps {first} to {last}", fontsize=12)
    figure.colorbar(image, ax=panels, label="mean similarity (cosine)")
    figure.suptitle("Similarity of correct rollouts by domain\n(diagonal: two different ones of a domain)", fontsize=13)
    return figure


def _draw_matrix(panel: "Axes", matrix: np.ndarray, names: Sequence[str]) -> "AxesImage":
    # The whole range of a cosine: a picture of small differences would not look like one of large ones.
    image = panel.imshow(matrix, vmin=-1, vmax=1, cmap="RdBu_r")
    places = range(len(names))
    panel.set_xticks(places, names, rotation=45, ha="right", rotation_mode="anchor")
    panel.set_yticks(places, names)
    for a in places:
        for b in places:
            value = matrix[a, b]
            text = f"{value:.2f}" if math.isfinite(value) else "-"
            panel.text(b, a, text, ha="center", va="center", color="white" if abs(value) > 0.6 else "black", fontsize=9)
    return image
