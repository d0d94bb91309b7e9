"""Write the study's tables and pictures from benchmarks/results/study/*.jsonl."""

from pathlib import Path

from benchmarks.study import plots
from benchmarks.study.arms import BASES, MAIN, REFERENCES, arms
from benchmarks.study.record import read, results_file
from benchmarks.study.statistics import figures_of
from benchmarks.study.table import NO_NUMBER, failures, sheets
from docs.generator.benchmarks import table
from docs.generator.figures import RESULTS

_ASSETS = Path("assets") / "study"
_PICTURES = {
    "accuracy": "Held-out accuracy over steps, by method",
    "ranking": "Ranking across domains over steps, by method",
    "domains": "Differences of final accuracy by domain",
}
"""What each picture shows, for those who do not see it."""
_FIRST_FIGURES = ("area", "mean", "auc", "probe_transfer")
_NOTHING = "No run is recorded yet.\n"


def results_a(results: Path) -> str:
    """Return the tables and pictures of level a."""
    return _results("a", results)


def results_b(results: Path) -> str:
    """Return the tables and pictures of level b."""
    return _results("b", results)


def first_base(results: Path) -> str:
    """Return the tuning runs on the first base model of level a, which is lost."""
    lines = read(results_file("a_first_base", results / "study"))
    rows = []
    for line in lines:
        figures = figures_of(line, line["settings"]["domains"], {})
        cells = [f"{figures[name]:.3f}" if name in figures else NO_NUMBER for name in _FIRST_FIGURES]
        rows.append([f"`{line['arm']}`", *cells])
    return table(["arm", *(name.replace("_", " ") for name in _FIRST_FIGURES)], rows)


def methods(_: Path) -> str:
    """Return the arms of the group `main`, and what each of them is; the settings are in benchmarks/study/arms.py."""
    return table(
        ["arm", "what it is"], [[f"`{arm.name}`", arm.meaning] for arm in arms("a").values() if arm.group == MAIN]
    )


def tuning(_: Path) -> str:
    """Return what is varied one at a time, around which arm, and the values."""
    values: dict[tuple[str, str], list[str]] = {}
    for arm in arms("a").values():
        choice = arm.group.partition("/")[2]
        if choice:
            value = arm.name.partition(f"{choice}_")[2]
            values.setdefault((REFERENCES[arm.kind], choice), []).append(f"`{value}`")
    rows = [[f"`{around}`", f"`{choice}`", ", ".join(found)] for (around, choice), found in values.items()]
    return table(["around the arm", "choice", "other values"], rows)


def pictures(docs: Path, results: Path = RESULTS) -> dict[Path, str]:
    """Return the SVG text of every picture that there are results for, by its path in the documentation."""
    return {docs / _file(name, level): text for level in BASES for name, text in _drawn(level, results).items()}


def _results(level: str, results: Path) -> str:
    lines = read(results_file(level, results / "study"))
    if not lines:
        return _NOTHING
    parts = [
        f"**{sheet.title[0].upper()}{sheet.title[1:]}**\n\n{table(sheet.header, sheet.rows)}"
        for sheet in sheets(lines, arms(level))
    ]
    parts += [f"![{_PICTURES[name]}]({_file(name, level)})\n" for name in _drawn(level, results)]
    failed = [f"- {line}\n" for line in failures(lines)]
    return "\n".join([*parts, *(["".join(failed)] if failed else [])])


def _drawn(level: str, results: Path) -> dict[str, str]:
    lines = read(results_file(level, results / "study"))
    if not lines:
        return {}
    known = arms(level)
    texts = {
        "accuracy": plots.accuracy(lines, known),
        "ranking": plots.ranking(lines, known),
        "domains": plots.domain_differences(lines, known),
    }
    return {name: text for name, text in texts.items() if text is not None}


def _file(name: str, level: str) -> Path:
    return _ASSETS / f"{name}_{level}.svg"
