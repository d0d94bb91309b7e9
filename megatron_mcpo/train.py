"""The program: `python -m megatron_mcpo.train CONFIG [--dry-run] [--section.key VALUE ...]`.

Started by itself it checks the configuration and is torchrun for as many ranks as the layout needs; started by torchrun
(or srun torchrun) it is one of these ranks. Exit code 2: the configuration or its files are bad.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_mcpo.config import Config, ConfigError, load
from megatron_mcpo.hf_config import from_folder
from megatron_mcpo.layout import Layout
from megatron_mcpo.metrics import check_trackers
from megatron_mcpo.model_config import ModelConfig, engine_problems, layout_problems, vllm_on_cpu
from megatron_mcpo.plan import arithmetic, empty_terms
from megatron_mcpo.rewards import allowlist
from megatron_mcpo.weights.mapping import tensor_problems

FAILED = 1
REFUSED = 2
INTERRUPTED = 130


def main(arguments: Sequence[str]) -> int:
    """Run with command-line arguments; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m megatron_mcpo.train", description="Train with MCPO.")
    parser.add_argument("config", type=Path, help="TOML configuration; overrides follow as --section.key VALUE")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the layout and stop")
    known, overrides = parser.parse_known_args(arguments)
    world_size = os.environ.get("WORLD_SIZE")
    try:
        config = load(known.config, overrides)
        layout, model = check(config, int(world_size) if world_size else None)
    except ConfigError as error:
        return _refuse(error)
    if os.environ.get("RANK", "0") == "0" and (known.dry_run or world_size):
        # A run says by itself which terms are empty.
        notes = empty_terms(config) if known.dry_run else []
        print("\n".join([arithmetic(config, layout, model), *notes]), flush=True)
    if known.dry_run:
        return 0
    if world_size is None:
        return _launch(arguments, layout.world_size)
    from megatron_mcpo.run import run

    try:
        run(config, layout, model)
    except ConfigError as error:
        return _refuse(error)
    except FloatingPointError as error:  # the same one on every rank
        if os.environ.get("RANK", "0") == "0":
            print(error, file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def check(config: Config, world_size: int | None) -> tuple[Layout, ModelConfig]:
    """Everything that can be known to be wrong before torch is imported. Raises ConfigError with all problems."""
    problems = allowlist.problems(config) + check_trackers(config)
    layout, model = None, None
    try:
        layout = config.layout(world_size)
    except ConfigError as error:
        problems += error.problems
    path = Path(config.model.path)
    try:
        model = from_folder(path)
        problems += tensor_problems(model, path)
    except ConfigError as error:
        problems += error.problems
    if model is not None:
        problems += _head_problems(config, model)
        problems += engine_problems(
            model,
            max_prompt_tokens=config.rollout.max_prompt_tokens,
            max_response_tokens=config.rollout.max_response_tokens,
            on_cpu=vllm_on_cpu(),
        )
    if layout is not None and model is not None:
        problems += layout_problems(model, layout, config.engine.tensor_parallel)
    if problems or layout is None or model is None:
        raise ConfigError(problems)
    return layout, model


def _head_problems(config: Config, model: ModelConfig) -> list[str]:
    dim = config.contrastive.dim
    if dim is None or dim <= model.hidden_size:
        return []
    return [
        f"contrastive.dim = {dim}: must be at most the model's hidden size, {model.hidden_size}; lower it, or leave it "
        "out"
    ]


def _refuse(error: ConfigError) -> int:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("\n".join(error.problems), file=sys.stderr)
    return REFUSED


def _launch(arguments: Sequence[str], num_ranks: int) -> int:
    """Run torchrun in this process; returns the exit code of the rank that failed first, which torchrun would hide."""
    # Ranks that share the cores must not each start a thread for every core.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_ranks)))
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # The rank that fails says why; the agent's account of it, and of the ranks it then ends, would bury that.
    logging.disable(logging.ERROR)
    options = ["--standalone", f"--nproc-per-node={num_ranks}", "-m", "megatron_mcpo.train"]
    try:
        torchrun.run(torchrun.parse_args([*options, *arguments]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        if code not in (REFUSED, INTERRUPTED):
            print(f"rank {rank} of {num_ranks} failed with exit code {code}: see above", file=sys.stderr)
        return code
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
