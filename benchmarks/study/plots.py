"""Draw the study's results as SVG texts, from its lines of results and from nothing else.

Every arm has a panel of its own, in which the arm that it is compared with is grey: bands of many arms in one panel
could not be told apart. The colours are those of Okabe and Ito, which colour-blind readers tell apart.
"""

import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.study.arms import MAIN, MEASURED, REFERENCES, Arm
from benchmarks.study.statistics import Summary, domains_of, summaries
from megatron_mcpo.reporting.plots import COLOURS, Curve, smoothed, smoothing_window

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GREY = "#7F7F7F"
_COLUMNS = 3
_BANDS = "line: mean over seeds, band: lowest to highest seed"

Lines = Sequence[Mapping[str, Any]]


def accuracy(lines: Lines, known: Mapping[str, Arm]) -> str | None:
    """Draw mean held-out accuracy over steps, a panel for each method; None without a run of one."""
    panels = _against(lines, known, REFERENCES[MAIN], _accuracies)
    if not panels:
        return None
    title = f"Held-out accuracy, mean over domains (grey: {REFERENCES[MAIN]})\n{_BANDS}"
    return _curves(panels, title=title, ylabel="share correct", chance=None)


def ranking(lines: Lines, known: Mapping[str, Arm]) -> str | None:
    """Draw contrast/auc_cross_domain over steps, a panel for each method that has it; None without one."""
    panels = _against(lines, known, MEASURED, _rankings)
    if not panels:
        return None
    title = f"Ranking across domains (grey: {MEASURED}; dotted: chance)\n{_BANDS}"
    return _curves(panels, title=title, ylabel="contrast/auc_cross_domain", chance=0.5)


def domain_differences(lines: Lines, known: Mapping[str, Arm]) -> str | None:
    """Draw the difference of every domain's final accuracy with its interval, a panel for each method, or None."""
    rows = [*domains_of(lines), "mean"]
    shown = [s for s in summaries(lines, known) if s.arm.kind == MAIN and "mean" in s.differences]
    if not shown:
        return None
    figure, cells = _grid(len(shown), height=0.6 + 0.28 * len(rows), sharey=True)
    for axes, summary in zip(cells, shown, strict=True):
        _draw_forest(axes, summary, rows)
    figure.suptitle(
        f"Final held-out accuracy less that of {REFERENCES[MAIN]}, with 95 % intervals over pairs of seeds", fontsize=12
    )
    return _svg(figure)


def _against(
    lines: Lines, known: Mapping[str, Arm], reference: str, curve: Callable[[str, Lines], Curve | None]
) -> dict[str, list[Curve]]:
    """Return by method the curves of its panel, the reference first; a single-domain run is no method on all."""
    found: dict[str, Curve] = {}
    for name, arm in known.items():
        own = [line for line in lines if line["arm"] == name and "error" not in line and arm.has_seed(line["seed"])]
        made = curve(name, own) if own and arm.kind == MAIN and not arm.domains else None
        if made is not None:
            found[name] = made
    grey = [found.pop(reference)] if reference in found else []
    return {name: [*grey, own] for name, own in found.items()} or {each.label: [each] for each in grey}


def _accuracies(name: str, lines: Lines) -> Curve | None:
    return _band(name, [{row[0]: row[1] for row in line["curve"]} for line in lines], window=1)


def _rankings(name: str, lines: Lines) -> Curve | None:
    by_step = [dict(enumerate(line["auc_cross_domain"], 1)) for line in lines]
    if all(value is None for steps in by_step for value in steps.values()):
        return None
    return _band(name, by_step, window=smoothing_window(len(by_step[0])))


def _band(name: str, by_step: Sequence[Mapping[int, float | None]], *, window: int) -> Curve:
    """Return the mean over runs between the lowest and the highest of them, over the steps that all runs have."""
    steps = sorted(set.intersection(*(set(values) for values in by_step)))
    values_RS = np.array([[math.nan if v[s] is None else v[s] for s in steps] for v in by_step], dtype=np.float64)
    smooth_RS = np.array([smoothed(values_S.tolist(), window) for values_S in values_RS])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a step at which no run has a value is NaN, and left out
        middle, low, high = (reduce(smooth_RS, axis=0).tolist() for reduce in (np.nanmean, np.nanmin, np.nanmax))
    return Curve(label=name, steps=steps, values=middle, low=low, high=high)


def _curves(panels: Mapping[str, Sequence[Curve]], *, title: str, ylabel: str, chance: float | None) -> str:
    figure, cells = _grid(len(panels), height=2.5, sharey=True)
    for axes, (name, curves) in zip(cells, panels.items(), strict=True):
        for number, curve in enumerate(reversed(curves)):
            colour = _GREY if number else COLOURS[0]
            axes.plot(curve.steps, curve.values, color=colour, linewidth=1.6, zorder=3 - number)
            axes.fill_between(curve.steps, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0)
        if chance is not None:
            axes.axhline(chance, color="black", linewidth=1, linestyle=":")
        axes.set_title(name, fontsize=11)
        _finish(axes)
    figure.supxlabel("step", fontsize=10)
    cells[0].set_ylabel(ylabel)
    figure.suptitle(title, fontsize=12)
    return _svg(figure)


def _draw_forest(axes: "Axes", summary: Summary, rows: Sequence[str]) -> None:
    for place, name in enumerate(rows):
        found = summary.differences.get(name)
        if found is None:
            continue
        colour = COLOURS[0] if found.low > 0 else COLOURS[1] if found.high < 0 else _GREY
        axes.plot([found.low, found.high], [place, place], color=colour, linewidth=2)
        axes.plot([found.value], [place], color=colour, marker="o", markersize=5)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_title(summary.arm.name, fontsize=11)
    _finish(axes)


def _finish(axes: "Axes") -> None:
    axes.locator_params(axis="x", nbins=5)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _grid(num_panels: int, *, height: float, sharey: bool) -> "tuple[Figure, list[Axes]]":
    """Return a figure and the axes of its panels, in rows of _COLUMNS."""
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, num_panels)
    rows = math.ceil(num_panels / columns)
    figure = Figure(figsize=(3.4 * columns + 0.6, height * rows + 0.7), layout="constrained")
    cells = list(figure.subplots(rows, columns, sharex=True, sharey=sharey, squeeze=False).flat)
    for axes in cells[num_panels:]:
        axes.set_visible(False)
    for axes in cells[max(0, num_panels - columns) : num_panels]:  # an invisible one below would hide the labels
        axes.tick_params(labelbottom=True)
    return figure, cells[:num_panels]


def _svg(figure: "Figure") -> str:
    """Return a figure as SVG with real text, the same for the same figure."""
    from matplotlib import rc_context

    content = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "study"}):
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    return "".join(f"{line.rstrip()}\n" for line in content.getvalue().splitlines())
