"""Count the rows of the data that cannot be used, and say why: all are read and tokenized, as at the start of a run.

This needs no GPU and no weights: of the model's folder it reads config.json and the tokenizer. The table has a line per
source: its rows, those that repeat a question (they are left out), the bad ones, and how many are bad for which reason
(megatron_mcpo/data/rows.py), with the first of each. Exit code 1: a run would be refused, for too many bad rows, too
few good ones, or tokens that the model has not; 2: the configuration is bad or data can't be read.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_mcpo.cli import options
from megatron_mcpo.config.config import ConfigError, load
from megatron_mcpo.config.domain_rules import missing_files
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.data.row_statistics import RowStatistics
from megatron_mcpo.rewards import allowlist


def main(arguments: Sequence[str]) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser = options.parser("data check", __doc__, example="examples/five_domains/config.toml")
    options.add_config(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object per source instead of a table")
    known, overrides = parser.parse_known_args(arguments)
    try:
        config = load(known.config, overrides)
        if problems := allowlist.problems(config) + missing_files(config):
            raise ConfigError(problems)
        # Late: a bad configuration is refused before torch is imported.
        from megatron_mcpo.data.inspection import inspect

        inspection, problems = inspect(config, from_folder(Path(config.model.path), with_weights=False))
    except ConfigError as error:
        return options.refuse(error)
    if known.json:
        for row_statistics in inspection.row_statistics:
            print(json.dumps(row_statistics.as_json()))
    else:
        _print_table(inspection.row_statistics)
        for note in [note for domain in inspection.domains for note in domain.notes]:
            print(note)
    if problems:
        print("\n".join(problems), file=sys.stderr)
    return options.FAILED if problems else 0


def _print_table(counted: Sequence[RowStatistics]) -> None:
    table = Table()
    for name in ("domain", "source", "rows", "repeated", "bad", "reasons, with the first row of each"):
        table.add_column(name, justify="right" if name in ("rows", "repeated", "bad") else "left", overflow="fold")
    for row_statistics in counted:
        reasons = "\n".join(
            f"{count} {reason}: {row_statistics.first[reason]}" for reason, count in row_statistics.reasons.items()
        )
        counts = [f"{n:,}" for n in (row_statistics.rows, row_statistics.repeated, row_statistics.bad)]
        table.add_row(row_statistics.domain, row_statistics.source, *counts, reasons)
    Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False, emoji=False).print(table)
