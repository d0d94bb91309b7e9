"""Draw which folders of the package import which, from the imports in its source, as an SVG."""

import ast
from collections.abc import Mapping
from functools import cache
from html import escape
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_mcpo"

WIDTH, BOX_WIDTH, BOX_HEIGHT, FLOOR_HEIGHT, MARGIN = 760, 118, 34, 84, 20

STYLE = (
    ".page{fill:#fff}.box{fill:#eef3fb;stroke:#4a6fa5}.name{fill:#1c2733}.arrow{stroke:#6b7a8c}.tip{fill:#6b7a8c}"
    "@media (prefers-color-scheme:dark){.page{fill:#161b22}.box{fill:#1f2d3d;stroke:#7fa3d1}.name{fill:#e6edf3}"
    ".arrow{stroke:#8b98a8}.tip{fill:#8b98a8}}"
)


def folder_imports(package: Path = PACKAGE) -> dict[str, set[str]]:
    """Return, for every folder (or loose module) of the package, the others that its source imports."""
    found: dict[str, set[str]] = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if parts[0] not in ("__init__", "__main__"):
            targets = found.setdefault(parts[0], set())
            targets |= _imported(path.read_text(encoding="utf-8"), package.name) - {parts[0]}
    return found


def _imported(source: str, package: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    inner = [name.split(".") for name in names]
    return {parts[1] for parts in inner if len(parts) > 1 and parts[0] == package and parts[1] != "__version__"}


def floors(graph: Mapping[str, set[str]]) -> dict[str, int]:
    """Return the floor of every folder: 0 imports nothing, others are one above the highest that they import."""

    @cache
    def floor(name: str) -> int:
        return 1 + max((floor(target) for target in graph[name]), default=-1)

    return {name: floor(name) for name in graph}


def direct(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Return the imports that no chain of other imports implies: what is drawn as an arrow."""

    @cache
    def below(name: str) -> frozenset[str]:
        return frozenset().union(*({target} | below(target) for target in graph[name]))

    return {
        name: {target for target in targets if not any(target in below(other) for other in targets - {target})}
        for name, targets in graph.items()
    }


def imports() -> str:
    """Return the picture of the package's imports."""
    graph = folder_imports()
    height_of = floors(graph)
    height = max(height_of.values()) * FLOOR_HEIGHT + BOX_HEIGHT + 2 * MARGIN
    places: dict[str, tuple[int, int]] = {}
    for floor in range(max(height_of.values()), -1, -1):
        row = _ordered([name for name in graph if height_of[name] == floor], graph, places)
        for number, name in enumerate(row):
            places[name] = (_column(number, len(row)), height - MARGIN - BOX_HEIGHT - floor * FLOOR_HEIGHT)
    arrows = [_arrow(places[name], places[target]) for name in sorted(graph) for target in sorted(direct(graph)[name])]
    boxes = [_box(name, *places[name]) for name in sorted(graph)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
            "<title>Imports between the folders of megatron_mcpo</title>",
            f"<style>{STYLE}</style>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto"><path class="tip" d="M0,0 L8,4 L0,8 z"/></marker></defs>',
            f'<rect class="page" width="{WIDTH}" height="{height}" rx="8"/>',
            *arrows,
            *boxes,
            "</svg>\n",
        ]
    )


def _ordered(row: list[str], graph: Mapping[str, set[str]], places: Mapping[str, tuple[int, int]]) -> list[str]:
    """Return the boxes of a floor in the order of those above that point to them, so that few arrows cross."""

    def centre(name: str) -> float:
        above = [x for other, (x, _) in places.items() if name in direct(graph)[other]]
        return sum(above) / len(above) if above else WIDTH / 2

    return sorted(row, key=lambda name: (centre(name), name))


def _column(number: int, num_in_row: int) -> int:
    return round((number + 0.5) * WIDTH / num_in_row - BOX_WIDTH / 2)


def _box(name: str, x: int, y: int) -> str:
    text = f'x="{x + BOX_WIDTH // 2}" y="{y + 22}" text-anchor="middle" font-family="sans-serif" font-size="14"'
    frame = f'<rect class="box" x="{x}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6"/>'
    return f'{frame}<text class="name" {text}>{escape(name)}</text>'


def _arrow(start: tuple[int, int], end: tuple[int, int]) -> str:
    x1, y1 = start[0] + BOX_WIDTH // 2, start[1] + BOX_HEIGHT
    x2, y2 = end[0] + BOX_WIDTH // 2, end[1] - 2
    bend = (y2 - y1) // 2
    path = f"M{x1},{y1} C{x1},{y1 + bend} {x2},{y2 - bend} {x2},{y2}"
    return f'<path class="arrow" d="{path}" fill="none" stroke-width="1.3" marker-end="url(#tip)"/>'
