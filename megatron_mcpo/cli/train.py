"""Train a model: `mcpo train CONFIG [--verbose] [--dry-run [--ranks N]] [--section.key VALUE ...]`.

The same command again resumes a run that was interrupted. `--resume RUN` goes on with a run of your choice, a name, a
folder or `latest`, also with other settings; `--init-from CHECKPOINT` begins a new run with the weights of another.
Started by itself it checks the configuration and runs torchrun with as many ranks as the layout needs; started by
torchrun (or srun torchrun) it is one of these ranks.
"""

import os
import sys
from collections.abc import Sequence

from megatron_mcpo.cli import options
from megatron_mcpo.cli.launch import INTERRUPTED_CODES, become_rank, launch, on_rank, started_ranks
from megatron_mcpo.cli.preflight import check
from megatron_mcpo.config.config import Config, ConfigError, load
from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.config.summary import arithmetic, empty_terms, slow_arithmetic
from megatron_mcpo.distributed.preemption import hold_signals
from megatron_mcpo.storage import run_items
from megatron_mcpo.storage.run_folder import forecast, run_that_goes_on


def main(arguments: Sequence[str]) -> int:
    """Train with command-line arguments; return the exit code."""
    parser = options.parser("train", __doc__, example="examples/quickstart/config.toml --run.steps 5")
    options.add_config(parser)
    parser.add_argument("--verbose", action="store_true", help="print every metric of a step and of each domain")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check all that a start checks before it builds a model, rows too, say what it would do, and stop",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="with --dry-run: number of ranks of the job (nodes x GPUs per node); by default the fewest that all sizes "
        "of the layout divide",
    )
    known, overrides = parser.parse_known_args(arguments)
    if known.ranks is not None and not known.dry_run:
        parser.error("--ranks: needs --dry-run; a run has the ranks that torchrun starts")
    world_size = started_ranks()
    if world_size:
        become_rank()
        hold_signals()
    try:
        config = load(known.config, overrides)
        layout, model = check(config, world_size if known.ranks is None else known.ranks)
        outlook = [*_check_data(config, model), *forecast(config)] if known.dry_run else []
    except ConfigError as error:
        return options.refuse(error)
    if os.environ.get("RANK", "0") == "0" and (known.dry_run or world_size):
        # A run says by itself which terms are empty.
        notes = [*empty_terms(config), *slow_arithmetic(config), *outlook] if known.dry_run else []
        print("\n".join([arithmetic(config, layout, model), *notes]), flush=True)
    if known.dry_run:
        return 0
    if world_size is None:
        code = launch("train", arguments, layout.world_size)
        if code in INTERRUPTED_CODES:
            next_time = next(line for line in forecast(config) if line.startswith("would "))
            print(
                f"interrupted: steps after the last checkpoint are lost; the same command {next_time}", file=sys.stderr
            )
        return code

    def train() -> None:
        from megatron_mcpo.trainer.setup import run

        run(config, layout, model, verbose=known.verbose)

    return on_rank(train)


def _check_data(config: Config, model: ModelConfig) -> list[str]:
    """Read all data as a start does; return what a user should know of them. Raises ConfigError as a start does."""
    from megatron_mcpo.data.inspection import inspect
    from megatron_mcpo.data.stream import PromptStream

    run = run_that_goes_on(config)
    inspection, problems = inspect(config, model, splits=run_items.read_splits(run))
    if problems:
        raise ConfigError(problems)
    notes = [note for domain in inspection.domains for note in domain.notes]
    if run is None:
        return notes
    weights = [domain.weight for domain in config.domain]
    stream = PromptStream(inspection.domains, weights=weights, seed=config.run.seed, data=config.data)
    return [*run_items.notes_of_changes(run, stream.digests(), allowed=config.data.allow_changed), *notes]
