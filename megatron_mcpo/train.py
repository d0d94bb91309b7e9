"""The program: `python -m megatron_mcpo.train CONFIG [--dry-run [--ranks N]] [--section.key VALUE ...]`.

Started by itself it checks the configuration and is torchrun for as many ranks as the layout needs; started by torchrun
(or srun torchrun) it is one of these ranks. Exit code 2: the configuration or its files are bad.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_mcpo.config import Config, ConfigError, load
from megatron_mcpo.domain_rules import missing_files
from megatron_mcpo.environment import vllm_on_cpu
from megatron_mcpo.hf_config import from_folder
from megatron_mcpo.hf_files import tokenizer_problems
from megatron_mcpo.launch import launch, on_rank, refuse, started_ranks
from megatron_mcpo.layout import Layout
from megatron_mcpo.metrics import check_trackers
from megatron_mcpo.model_config import ModelConfig, engine_problems, layout_problems, quantization_problems
from megatron_mcpo.plan import arithmetic, empty_terms, slow_arithmetic
from megatron_mcpo.preemption import hold_signals
from megatron_mcpo.rewards import allowlist, rules
from megatron_mcpo.rollout.server_client import server_problems
from megatron_mcpo.weights.mapping import tensor_problems


def main(arguments: Sequence[str]) -> int:
    """Run with command-line arguments; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m megatron_mcpo.train", description="Train with MCPO.")
    parser.add_argument("config", type=Path, help="TOML configuration; overrides follow as --section.key VALUE")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the layout and stop")
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="with --dry-run: the ranks that the job will have, nodes x GPUs a node; else the fewest that all sizes "
        "divide",
    )
    known, overrides = parser.parse_known_args(arguments)
    if known.ranks is not None and not known.dry_run:
        parser.error("--ranks: needs --dry-run; a run has the ranks that torchrun starts")
    world_size = started_ranks()
    if world_size:
        hold_signals()
    try:
        config = load(known.config, overrides)
        layout, model = check(config, world_size if known.ranks is None else known.ranks)
    except ConfigError as error:
        return refuse(error)
    if os.environ.get("RANK", "0") == "0" and (known.dry_run or world_size):
        # A run says by itself which terms are empty.
        notes = [*empty_terms(config), *slow_arithmetic(config)] if known.dry_run else []
        print("\n".join([arithmetic(config, layout, model), *notes]), flush=True)
    if known.dry_run:
        return 0
    if world_size is None:
        return launch("megatron_mcpo.train", arguments, layout.world_size)

    def train() -> None:
        from megatron_mcpo.run import run

        run(config, layout, model)

    return on_rank(train)


def check(config: Config, world_size: int | None) -> tuple[Layout, ModelConfig]:
    """Everything that can be known to be wrong before torch is imported. Raises ConfigError with all problems."""
    problems = allowlist.problems(config) + rules.problems(config) + missing_files(config) + check_trackers(config)
    layout, model = None, None
    try:
        layout = config.layout(world_size)
    except ConfigError as error:
        problems += error.problems
    path = Path(config.model.path)
    try:
        model = from_folder(path)
        problems += tensor_problems(model, path) + tokenizer_problems(path)
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
        if config.engine.quantization != "none":
            problems += quantization_problems(
                model,
                config.engine.tensor_parallel,
                in_servers=bool(config.engine.servers),
                on_cpu=vllm_on_cpu(),
            )
    if layout is not None and model is not None:
        in_ranks = not config.engine.servers
        problems += layout_problems(model, layout, config.engine.tensor_parallel, engine_in_ranks=in_ranks)
    if model is not None and not problems:
        problems += server_problems(config, model)
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
