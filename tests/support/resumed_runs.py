"""Runs that are interrupted and resumed, and what they must have in common with undisturbed ones."""

import json
from pathlib import Path
from typing import Any

from tests.support import program
from tests.support.program import lasting, metrics, train_forked

PIPELINE = (
    *("--parallel.pipeline", "2", "--model.dtype", "bf16"),
    *("--run.checkpoint_every", "1", "--run.keep_every", "1"),
)


EPOCH = 3
"""Steps: each takes 4 prompts from either domain."""


Figures = tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, str]]


def figures(run: Path) -> Figures:
    """Return what two equal runs agree on: metrics, held-out accuracies, every rollout."""
    evaluations = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    rollouts = {path.name: path.read_text() for path in (run / "rollouts").iterdir()}
    return lasting(metrics(run)), evaluations, rollouts


def write_config(model: Path, folder: Path) -> Path:
    path = program.write_config(model, folder)
    path.write_text(path.read_text().replace("items = 60", f"items = {4 * EPOCH}"))
    return path


def go_on(model: Path, folder: Path, *overrides: str) -> str:
    """Start the run in `folder` again, to its end; returns what it printed."""
    resumed = train_forked(write_config(model, folder), *overrides, ranks=2)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    return resumed.stdout
