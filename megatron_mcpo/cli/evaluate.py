"""Measure held-out accuracy: `mcpo evaluate CONFIG [--checkpoint DIR | --hf DIR] [--baseline FILE] [--out FILE]`.

The model is that of the configuration, a checkpoint of a run, or a Hugging Face folder, and is measured as in a run.
The ranks are started as by `mcpo train`.
"""

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_mcpo.cli import options
from megatron_mcpo.cli.launch import become_rank, launch, on_rank, started_ranks
from megatron_mcpo.cli.preflight import check
from megatron_mcpo.config.config import Config, ConfigError, load
from megatron_mcpo.config.hf_files import is_sharded, read_json
from megatron_mcpo.reporting.accuracy import backward_transfer, domain_accuracies
from megatron_mcpo.storage.files import read_jsonl, write_atomically
from megatron_mcpo.storage.run_folder import CONFIG

_STATE = "state.json"


def main(arguments: Sequence[str]) -> int:
    """Evaluate with command-line arguments; return the exit code."""
    known, overrides = _parser().parse_known_args(arguments)
    world_size = started_ranks()
    if world_size:
        become_rank()
    try:
        step, model_path = _weights(known.checkpoint, known.hf)
        # Nothing is tracked, and the frozen model is all that there is on the device.
        overrides += [*model_path, "--run.trackers", "[]", "--model.offload_reference", "false"]
        config = load(known.config, overrides)
        _check_items(config, known.checkpoint)
        layout, model = check(config, world_size)
        baseline = None if known.baseline is None else read_baseline(known.baseline, config.domain_names)
        _check_out(known.out)
    except ConfigError as error:
        return options.refuse(error)
    if world_size is None:
        return launch("evaluate", arguments, layout.world_size)

    def evaluate() -> None:
        from megatron_mcpo.trainer.setup import measure

        metrics = measure(config, layout, model, _note, run=_run_of(known.checkpoint))
        if os.environ["RANK"] != "0":
            return
        row = _row(config, step, metrics, baseline)
        line = json.dumps(row, allow_nan=False)
        if known.json:
            print(line)
        else:
            _print_table(row, config, baseline)
        if known.out is not None:
            write_atomically(known.out, f"{line}\n".encode())

    return on_rank(evaluate)


def read_baseline(path: Path, domain_names: Sequence[str]) -> dict[str, Any]:
    """Return the last evaluation in an eval.jsonl, or the one in a file written with --out.

    Raises ConfigError if there is none, or if it has none of these domains.
    """
    wanted = "Give an eval.jsonl of a run, or a file written with --out"
    try:
        rows = read_jsonl(path) if path.exists() else None
    except OSError as error:
        raise ConfigError([f"--baseline = {str(path)!r}: must be readable ({error.strerror}). {wanted}."]) from error
    if not rows:
        reason = "no such file" if rows is None else "it is empty"
        raise ConfigError([f"--baseline = {str(path)!r}: must hold an evaluation ({reason}). {wanted}."])
    theirs = [key for key in rows[-1] if "/" not in key]
    if not set(theirs).intersection(domain_names):
        raise ConfigError(
            [f"--baseline = {str(path)!r}: must have a domain of {', '.join(domain_names)}. {wanted} of such domains."]
        )
    return rows[-1]


def _parser() -> options.Parser:
    parser = options.parser(
        "evaluate", __doc__, example="examples/quickstart/config.toml --checkpoint runs/latest/checkpoints/step_000020"
    )
    options.add_config(parser)
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", type=Path, help="of a run: runs/NAME/checkpoints/step_NNNNNN")
    weights.add_argument("--hf", type=Path, help="Hugging Face folder; without either, the configuration's model.path")
    parser.add_argument("--baseline", type=Path, help="eval.jsonl, or what --out wrote, to compare with")
    parser.add_argument("--out", type=Path, help="file for the metrics, as one line of an eval.jsonl")
    parser.add_argument("--json", action="store_true", help="print that line instead of a table")
    return parser


def _weights(checkpoint: Path | None, hf: Path | None) -> tuple[int, list[str]]:
    """Return the step of the weights, 0 for a model that is not of a run, and the override that names their folder."""
    if hf is not None:
        if is_sharded(hf):
            raise ConfigError([f"--hf = {str(hf)!r}: must not be a sharded checkpoint. Give it with --checkpoint."])
        return 0, ["--model.path", str(hf)]
    if checkpoint is None:
        return 0, []
    if not is_sharded(checkpoint) or not (checkpoint / _STATE).is_file():
        raise ConfigError(
            [
                f"--checkpoint = {str(checkpoint)!r}: must be a checkpoint of a run. Give runs/NAME/checkpoints/"
                "step_NNNNNN, or a Hugging Face folder with --hf."
            ]
        )
    problems: list[str] = []
    step = (read_json(checkpoint / _STATE, problems) or {}).get("step")
    if not isinstance(step, int):
        problem = f"{checkpoint / _STATE}: step = {step!r}: must be an integer. Copy the checkpoint again."
        raise ConfigError(problems or [problem])
    return step, ["--model.path", str(checkpoint)]


def _check_items(config: Config, checkpoint: Path | None) -> None:
    """Refuse more held-out items than the run kept apart: the others are items that it trained on."""
    folder = _run_of(checkpoint)
    run = None if folder is None else folder / CONFIG
    own = [d.name for d in config.domain if any(not s.held_out_file and not s.held_out_split for s in d.sources)]
    if run is None or not run.is_file() or not own:
        return
    kept, asked = load(run).evaluation.items, config.evaluation.items
    if asked > kept:
        raise ConfigError(
            [
                f"evaluation.items = {asked}: must be at most {kept} (its run kept {kept} items per domain apart, "
                f"{run}, and trained on the others, at least of {', '.join(own)}). Lower it to {kept}, or give every "
                "source a held_out_file or held_out_split."
            ]
        )


def _run_of(checkpoint: Path | None) -> Path | None:
    """Return the folder of a checkpoint's run."""
    return None if checkpoint is None else checkpoint.resolve().parent.parent


def _check_out(path: Path | None) -> None:
    if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        raise ConfigError([f"--out = {str(path)!r}: must be writable. Give a file in a folder that exists."])


def _note(text: str) -> None:
    if os.environ["RANK"] == "0":
        print(text, file=sys.stderr, flush=True)


def _row(config: Config, step: int, metrics: Mapping[str, float], baseline: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a line of an eval.jsonl, with what it was measured on, and how it differs from the baseline."""
    row: dict[str, Any] = {"step": step, **metrics}
    if baseline is not None:
        transfer = backward_transfer(_accuracies(metrics, config), _accuracies(baseline, config))
        row |= {f"transfer/{name}": change for name, change in transfer.change.items()}
        row |= {"transfer/mean": transfer.mean, "forgetting/mean": transfer.forgetting}
    row = {key: value if math.isfinite(value) else None for key, value in row.items()}
    return row | {
        "about/model": config.model.path,
        "about/samples": config.evaluation.samples,
        "about/temperature": config.evaluation.temperature,
    }


def _accuracies(row: Mapping[str, Any], config: Config) -> dict[str, float]:
    return {name: value for name, value in domain_accuracies(row).items() if name in config.domain_names}


def _print_table(row: Mapping[str, Any], config: Config, baseline: Mapping[str, Any] | None) -> None:
    console = Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False, emoji=False)
    k = config.evaluation.samples
    how = "greedy" if config.evaluation.temperature == 0 else f"temperature {config.evaluation.temperature:g}"
    weights = f"{config.model.path}" + (f", step {row['step']}" if row["step"] else "")
    columns = ["domain", "items", f"avg@{k}", "95 % interval"]
    columns += [f"pass@{k}", f"maj@{k}"] if k > 1 else []
    columns += ["to baseline"] if baseline is not None else []
    console.print(f"held-out accuracy of {weights}: {how}, {k} per prompt", soft_wrap=True)
    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for name in [*config.domain_names, "mean"]:
        if name == "mean":
            table.add_section()
        items = f"{row[f'items/{name}']:.0f}" if f"items/{name}" in row else ""
        bounds = [_cell(row[f"accuracy_{bound}/{name}"]) for bound in ("low", "high")]
        cells = [name, items, _cell(row[name]), f"{bounds[0]} .. {bounds[1]}"]
        cells += [_cell(row[f"{measure}_at_{k}/{name}"]) for measure in ("pass", "maj")] if k > 1 else []
        cells += [_cell(row.get(f"transfer/{name}"), "+.3f")] if baseline is not None else []
        table.add_row(*cells)
    table.add_row("worst", "", _cell(row["worst"]))
    console.print(table)
    if baseline is not None:
        for line in _about_baseline(row, config, baseline):
            console.print(line, soft_wrap=True)


def _about_baseline(row: Mapping[str, Any], config: Config, baseline: Mapping[str, Any]) -> list[str]:
    """Return the lines below the table."""
    fell = [name for name in config.domain_names if (row.get(f"transfer/{name}") or 0) < 0]
    lines = [
        f"backward transfer {_cell(row['transfer/mean'], '+.3f')}, forgetting {_cell(row['forgetting/mean'])}; fell: "
        + (", ".join(fell) or "no domain")
    ]
    counts = {name: (row[key], baseline[key]) for name in config.domain_names if (key := f"items/{name}") in baseline}
    lines += [
        f"WARNING: {name}: {theirs:.0f} items in the baseline, {ours:.0f} here; the questions differ"
        for name, (ours, theirs) in counts.items()
        if ours != theirs
    ]
    theirs, ours = ({key.partition("/")[0] for key in found if key.startswith("maj_at_")} for found in (baseline, row))
    if theirs != ours:
        lines.append("WARNING: the baseline has another number of responses per item (evaluation.samples)")
    return lines


def _cell(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)
