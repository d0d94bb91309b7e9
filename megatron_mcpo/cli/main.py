"""The command `mcpo`: find the subcommand, import its module, run it. Imports no torch, so that help is immediate.

Exit codes of all subcommands: 0: done; 1: a check or a run failed; 2: bad input, which is explained on stderr; 130:
ended by Ctrl-C.
"""

import difflib
import importlib
import os
import select
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_mcpo import __version__

REFUSED = 2
INTERRUPTED = 130


@dataclass(frozen=True)
class Command:
    """One subcommand.

    module: within megatron_mcpo.cli; its function `main` takes the arguments and returns the exit code
    on_cpu: computes on the CPU even where there is a GPU
    """

    module: str
    summary: str
    on_cpu: bool = False


COMMANDS = {
    "train": Command("train", "train a model"),
    "evaluate": Command("evaluate", "measure held-out accuracy of a model or a checkpoint"),
    "serve": Command("serve", "start vLLM as a server for the rollouts of a run"),
    "plan": Command("plan", "predict memory, traffic and seconds of a run on GPUs, before any is booked"),
    "push-plan": Command("push_plan", "show which rank sends which weights to which engine"),
    # Logits are compared in fp32, which kernels of a GPU may round to TF32.
    "convert to-megatron": Command("convert_to_megatron", "convert a Hugging Face folder to Megatron", on_cpu=True),
    "convert to-hf": Command("convert_to_hf", "convert a Megatron checkpoint to a Hugging Face folder", on_cpu=True),
    "convert check": Command("convert_check", "convert there and back in several layouts, compare bits", on_cpu=True),
    "doctor": Command("doctor", "say what this machine and environment have, what is wrong, and what mends it"),
    "report": Command("report", "write the HTML report of a run again"),
    "compare": Command("compare", "compare runs: a table, and curves with bands over seeds"),
    "config keys": Command("config_keys", "list the keys of a configuration with type, default, range and meaning"),
    "data check": Command("data_check", "count the rows of a configuration's data that cannot be used, and say why"),
    "data prepare": Command("data_prepare", "convert public data sets to rows for training"),
    "submit": Command("submit", "check a configuration for the nodes of a Slurm job, then queue it"),
    "requeue": Command("requeue", "tell a job script whether a run was preempted and wants to be restarted"),
    "reward try": Command("reward_try", "score responses with a verifier, and show what it takes for the answer"),
    "sandbox check": Command("sandbox_check", "attack the code sandbox and watch the host"),
}
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_WITH_RANKS = ("train", "evaluate", "convert to-megatron", "convert to-hf", "convert check")
"""Subcommands whose process may be one of several that torchrun started."""

_EXAMPLE = "example: mcpo train examples/quickstart/config.toml --run.steps 5"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the subcommand that the arguments name; return its exit code.

    Ctrl-C, or a reader that closes the output, as `head` does, is not an error of the program.
    """
    try:
        code = _main(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        if not _output_is_closed():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _main(given: list[str]) -> int:
    # `python -m` does this; the console script does not, and a reward function often lies in the current folder.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    if given[:1] == ["--version"]:
        print(__version__)
        return 0
    if given[:1] in (["-h"], ["--help"]):
        print(_overview(COMMANDS))
        return 0
    for num_words in (1, 2):
        name = " ".join(given[:num_words])
        if len(given) >= num_words and name in COMMANDS:
            return _run(name, given[num_words:])
    group = {name: command for name, command in COMMANDS.items() if given and name.startswith(f"{given[0]} ")}
    if group and given[1:2] in (["-h"], ["--help"]):
        print(_overview(group))
        return 0
    print(_refusal(given, group), file=sys.stderr)
    return REFUSED


def _run(name: str, arguments: Sequence[str]) -> int:
    if name in _WITH_RANKS and (problem := _rank_problem()):
        print(problem, file=sys.stderr)
        return REFUSED
    return _function(COMMANDS[name])(arguments)


def _rank_problem() -> str | None:
    """Return a line where the variables by which torchrun numbers its processes are not all set, or not by it.

    With one of them left over in a shell, a process would take itself for a rank: it would wait for others, or print
    nothing.
    """
    given = {name: os.environ[name] for name in _RANK_VARIABLES if os.environ.get(name)}
    if not given:
        return None
    missing = [name for name in _RANK_VARIABLES if name not in given]
    rank, size, local_rank = (given.get(name, "") for name in _RANK_VARIABLES)
    reason = f"{', '.join(missing)} not set"
    if not missing:
        are_numbers = all(value.isascii() and value.isdecimal() for value in (rank, size, local_rank))
        if are_numbers and max(int(rank), int(local_rank)) < int(size):
            return None
        reason = "must be numbers from 0 to WORLD_SIZE - 1"
    shown = ", ".join(f"{name} = {value!r}" for name, value in given.items())
    return (
        f"{shown}: torchrun sets {', '.join(_RANK_VARIABLES)} together ({reason}). Unset them, or start with torchrun"
    )


def _output_is_closed() -> bool:
    """Return whether nobody reads stdout any more; another pipe may be the broken one."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _function(command: Command) -> Callable[[Sequence[str]], int]:
    """Import a subcommand's module, with the GPU hidden first where it must not be used."""
    if command.on_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    function: Callable[[Sequence[str]], int] = importlib.import_module(f"megatron_mcpo.cli.{command.module}").main
    return function


def _overview(commands: dict[str, Command]) -> str:
    width = max(map(len, COMMANDS)) + 2
    listed = [f"  {name:<{width}}{command.summary}" for name, command in commands.items()]
    title = "mcpo: train language models on several domains with contrastive policy optimization"
    usage = "usage: mcpo SUBCOMMAND [ARGUMENTS]    mcpo SUBCOMMAND --help    mcpo --version"
    return "\n".join([title, "", usage, "", *listed, "", _EXAMPLE])


def _refusal(given: Sequence[str], group: dict[str, Command]) -> str:
    if not given:
        return _overview(COMMANDS)
    if group:
        return f"mcpo {given[0]}: needs one of: {', '.join(name.partition(' ')[2] for name in group)}"
    near = difflib.get_close_matches(given[0], [name.partition(" ")[0] for name in COMMANDS], n=1)
    hint = f"did you mean `mcpo {near[0]}`?" if near else "`mcpo --help` lists them."
    return f"mcpo: {given[0]!r} is not a subcommand. {hint}"
