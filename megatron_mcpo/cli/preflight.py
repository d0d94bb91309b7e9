"""Collect everything that can be known to be wrong with a run before torch is imported."""

import resource
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_mcpo.config import model_rules
from megatron_mcpo.config.config import Config, ConfigError
from megatron_mcpo.config.domain_rules import missing_files
from megatron_mcpo.config.environment import queue_in_order, vllm_on_cpu, vllm_problems
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.hf_files import tokenizer_problems
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import ModelConfig, layout_problems
from megatron_mcpo.reporting.loggers import check_trackers
from megatron_mcpo.rewards import allowlist, functions, rules
from megatron_mcpo.rollout.server_client import server_problems
from megatron_mcpo.rollout.vllm_fields import option_problems
from megatron_mcpo.storage import checkpoint_files, run_folder
from megatron_mcpo.weights.mapping import tensor_problems

_LEAST_OPEN_FILES = 1024
"""Of a rank; the tiny models of the tests need about 130."""


def open_file_problems() -> list[str]:
    """Return a line if processes of this user may open too few files."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY or most >= _LEAST_OPEN_FILES:
        return []
    return [
        f"ulimit -n = {most}: must be at least {_LEAST_OPEN_FILES} (every rank has open files and connections to all "
        "others). Raise the hard limit of the shell or the job."
    ]


# A check returns a line (key, value, rule, fix) per problem. A new check of a folder is a line in one of these tables.
OF_CONFIG: tuple[Callable[[Config], list[str]], ...] = (
    allowlist.problems,
    rules.problems,
    missing_files,
    check_trackers,
    run_folder.resume_problems,
    checkpoint_files.init_from_problems,
    lambda _: open_file_problems(),
    lambda config: [] if config.engine.servers else vllm_problems(),
    lambda config: option_problems(config.engine.options, on_cpu=vllm_on_cpu()),
)
OF_MODEL: tuple[Callable[[Config, ModelConfig], list[str]], ...] = (
    lambda config, model: tensor_problems(model, Path(config.model.path)),
    lambda config, _: tokenizer_problems(Path(config.model.path)),
    lambda config, model: model_rules.problems(config, model, on_cpu=vllm_on_cpu()),
)
OF_LAYOUT: tuple[Callable[[Config, ModelConfig, Layout], list[str]], ...] = (
    lambda config, model, layout: layout_problems(
        model, layout, config.engine.tensor_parallel, engine_in_ranks=not config.engine.servers
    ),
)


def check(config: Config, world_size: int | None) -> tuple[Layout, ModelConfig]:
    """Return the layout and the model of a run in which nothing is known to be wrong.

    Sets the variable of `queue_in_order`, because nothing that comes later is early enough.

    Args:
        config: A valid configuration.
        world_size: The number of ranks; None for the fewest that the configuration needs.

    Raises:
        ConfigError: It holds all problems, but for those of servers, which are asked only if nothing else is wrong.
    """
    queue_in_order(tensor=config.parallel.tensor, context=config.parallel.context)
    problems = _found(OF_CONFIG, config)
    if not problems:
        problems += functions.problems(config)  # whose modules are known to be there
    layout, model = None, None
    try:
        layout = config.layout(world_size)
    except ConfigError as error:
        problems += error.problems
    try:
        model = from_folder(Path(config.model.path))
    except ConfigError as error:
        problems += error.problems
    if model is not None:
        problems += _found(OF_MODEL, config, model)
    if model is not None and layout is not None:
        problems += _found(OF_LAYOUT, config, model, layout)
    if model is not None and not problems:
        # This asks other machines, which may take long.
        problems += server_problems(config, model)
    if problems or layout is None or model is None:
        raise ConfigError(problems)
    return layout, model


def _found[*Known](checks: Sequence[Callable[[*Known], list[str]]], *known: *Known) -> list[str]:
    """Return the problems that all checks find, also of those that raise ConfigError instead."""
    problems: list[str] = []
    for each in checks:
        try:
            problems += each(*known)
        except ConfigError as error:
            problems += error.problems
    return problems
