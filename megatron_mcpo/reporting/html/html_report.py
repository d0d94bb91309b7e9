"""Write a run as one HTML file that needs no network and no server, from the files of the run's folder alone.

Text that a model wrote cannot act in the page: it is embedded as JSON in which every "<" is escaped, the page makes
text nodes of it, and the Content-Security-Policy runs only the one script whose hash it names, and fetches nothing.
"""

import base64
import hashlib
import html
import importlib.resources
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mcpo import __version__
from megatron_mcpo.config.config import Config
from megatron_mcpo.config.schema import Section
from megatron_mcpo.reporting.html.rollout_sample import coarse_to_fine, sample_rollouts, shortened
from megatron_mcpo.reporting.plots import load_representations, principal_plane
from megatron_mcpo.reporting.signal_notes import nothing_learned
from megatron_mcpo.reporting.summary import SUMMARY_WINDOW
from megatron_mcpo.storage.files import iterate_jsonl, read_jsonl, step_files, write_atomically
from megatron_mcpo.storage.run_folder import EVALUATIONS, METRICS, NOTES, PREEMPTED

REPORT = "report.html"

# With MOST_BYTES of rollouts, these bound the size of the file to 20 MB.
MOST_NUMBERS = 400_000
MOST_POINTS = 150_000
MOST_POINTS_A_STEP = 1024
FIRST_NOTES, LAST_NOTES = 200, 800
NOTE_CHARACTERS = 1000

PLANE_STEPS, PLANE_ROWS = 8, 256
"""The plane is fitted on so many steps, spread over the run, and so many rollouts of each."""

SCRIPTS = (
    "dom.js", "ticks.js", "chart.js", "slider.js", "data.js", "overview.js", "curves.js", "matrix.js", "map.js",
    "pairs.js", "rollouts.js", "timings.js", "settings.js", "main.js",
)  # fmt: skip
"""In the order in which the page has them, as one script."""


def write_report(folder: Path, config: Config) -> Path:
    """Write report.html into a run's folder, finished or not. Raises OSError if it cannot be written."""
    path = folder / REPORT
    write_atomically(path, page(folder.name, collect(folder, config)))
    return path


def collect(folder: Path, config: Config) -> dict[str, Any]:
    """Collect the contents of the page as plain values without NaN. Missing or damaged files count as empty."""
    return {
        "name": folder.name,
        "version": __version__,
        "status": _status(folder),
        "planned": config.run.steps,
        "domains": config.domain_names,
        "contrastive": config.contrastive.enabled,
        "negatives": config.contrastive.negatives,
        "in_domain_scope": config.contrastive.in_domain_scope,
        "window": SUMMARY_WINDOW,
        "settings": _settings(config),
        "warning": nothing_learned(config, read_jsonl(folder / METRICS)),
        "notes": _notes(folder / NOTES),
        "metrics": columns(folder / METRICS),
        "evaluations": columns(folder / EVALUATIONS),
        "map": _map(folder / "representations", len(config.domain_names)),
        "rollouts": vars(sample_rollouts(folder, config)),
    }


def page(title: str, data: dict[str, Any]) -> bytes:
    """Return the HTML file; the data in it are ASCII."""
    files = importlib.resources.files("megatron_mcpo.reporting.html") / "page"
    texts = {name: (files / name).read_text(encoding="utf-8") for name in ("page.html", "style.css", *SCRIPTS)}
    script = '(() => {\n"use strict";\n' + "\n".join(texts[name] for name in SCRIPTS) + "})();\n"
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(texts['style.css'])}; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {
        "policy": policy,
        "title": html.escape(title),
        "style": texts["style.css"],
        "data": embeddable(data),
        "script": script,
    }
    # One pass over the template: what is inserted is not searched for further places.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], texts["page.html"]).encode()


def embeddable(data: Any) -> str:
    """Return JSON for a <script> element: ASCII, and without a "<" that could end it or open a comment.

    Raises ValueError for NaN, which JSON does not have.
    """
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def columns(path: Path, *, most_numbers: int = MOST_NUMBERS) -> dict[str, Any]:
    """Read the metrics of a file of lines with a step: steps, one column per metric (None if missing), number of lines.

    The file is read twice, line by line. Of more lines than fit, the first, the last and some evenly spread
    ones are kept.
    """
    names: dict[str, None] = {}
    total = 0
    for row in iterate_jsonl(path):
        total += 1
        names |= dict.fromkeys(name for name, value in row.items() if isinstance(value, int | float | None))
    names.pop("step", None)
    chosen = set(_evenly(total, most_numbers // max(1, len(names))))
    kept = [row for number, row in enumerate(iterate_jsonl(path)) if number in chosen]
    return {
        "total": total,
        "steps": [row["step"] for row in kept],
        "columns": {name: [_number(row.get(name)) for row in kept] for name in sorted(names)},
    }


def _evenly(total: int, most: int) -> Iterator[int]:
    """Yield at most `most` of 0 .. total - 1 (at least the ends of the summary), ascending, evenly spread."""
    if total <= most:
        yield from range(total)
        return
    ends = min(SUMMARY_WINDOW, total)
    inner = max(2, most - 2 * ends)
    yield from sorted(
        {*range(ends), *range(total - ends, total), *(round(i * (total - 1) / (inner - 1)) for i in range(inner))}
    )


def _number(value: Any) -> float | int | None:
    """Round to five digits; None for anything but a finite number."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    rounded = float(f"{value:.5g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded


def _status(folder: Path) -> str:
    if (folder / "FINISHED").exists():
        return "finished"
    return "preempted" if (folder / PREEMPTED).exists() else "not finished"


def _settings(config: Config) -> list[dict[str, Any]]:
    """Return one table per section: name, meaning, and keys with value, meaning and whether it is the default."""
    tables = []
    for name, value in config:
        parts = [(name, value)] if isinstance(value, Section) else [(f"{name} {part.name}", part) for part in value]
        tables += [
            {"name": title, "about": (part.__doc__ or "").strip(), "keys": list(_keys(part))} for title, part in parts
        ]
    return tables


def _keys(section: Section) -> Iterator[dict[str, Any]]:
    values = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        yield {
            "key": name,
            "value": json.dumps(values[name], ensure_ascii=False),
            "about": field.description or "",
            "default": not field.is_required() and getattr(section, name) == default,
        }


def _notes(path: Path) -> dict[str, Any]:
    """Return the first and the last notes, and how many there are; of a long note its beginning and end."""
    total = sum(1 for _ in iterate_jsonl(path))
    kept = []
    for number, row in enumerate(iterate_jsonl(path)):
        if number < FIRST_NOTES or number >= total - LAST_NOTES:
            kept.append({"step": row["step"], "text": shortened(str(row.get("text", "")), NOTE_CHARACTERS)[0]})
    return {"total": total, "first": min(total, FIRST_NOTES), "notes": kept}


def _map(folder: Path, num_domains: int) -> dict[str, Any]:
    """Project the representations of the dumped steps on one plane, so that movement in it is real.

    points: per rollout its place in the step's file, x and y (in thousandths of the largest coordinate), and
    2 * domain + correct; shares: of the variance, per axis; total: dumped steps
    """
    files = step_files(folder)
    order = [files[place] for place in coarse_to_fine(len(files))]
    sample = [z[:: -(-len(z) // PLANE_ROWS)] for _, (_, z, _, _) in _loaded(order[:PLANE_STEPS], num_domains)]
    if not sample:
        return {"total": len(files), "shares": [], "steps": []}
    mean_D, plane_2D, share_2 = principal_plane(np.concatenate(sample))
    room = MOST_POINTS
    steps: list[tuple[int, np.ndarray, np.ndarray, np.ndarray, int]] = []
    most = 0.0
    for step, (rows, z, domain, correct) in _loaded(order, num_domains):
        stride = -(-len(rows) // MOST_POINTS_A_STEP)
        xy = ((z - mean_D) @ plane_2D.T)[::stride]
        room -= len(xy)
        if steps and room < 0:
            break
        steps.append((step, rows[::stride], xy, (2 * domain + correct)[::stride], len(rows)))
        most = max(most, float(np.abs(xy).max()))
    steps.sort(key=lambda entry: entry[0])
    scale = 1000 / most if most else 0.0
    return {
        "total": len(files),
        "shares": [_number(float(share)) for share in share_2],
        "steps": [
            {
                "step": step,
                "total": total,
                "points": np.column_stack([rows, np.rint(xy * scale), kind]).astype(int).ravel().tolist(),
            }
            for step, rows, xy, kind, total in steps
        ],
    }


def _loaded(files: Sequence[tuple[int, Path]], num_domains: int) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
    """Yield step and representations of every file that has some, one file at a time."""
    for step, path in files:
        loaded = load_representations(path, num_domains)
        if loaded is not None:
            yield step, loaded


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
