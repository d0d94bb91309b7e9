"""Check a configuration for the nodes that a job will have, then queue it (examples/launch/train.sbatch).

`mcpo submit [[--gpu h100] [OPTIONS OF sbatch] --] CONFIG [--section.key VALUE ...]`, from the root of the checkout.
Errors would otherwise show when the job starts. --gpu, as `mcpo plan` takes it, also refuses what does not fit into
the memory of these GPUs. The nodes and their GPUs are read from --nodes and --gpus-per-node, or --gres. Exit code 1:
it does not fit.
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

from megatron_mcpo.cli import plan, train
from megatron_mcpo.cli.options import refuse
from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.planner import hardware

SCRIPT = "examples/launch/train.sbatch"
NOT_QUEUED = 1


@dataclass(frozen=True, kw_only=True)
class Request:
    """gpu: a name for the plan, None: no plan; gpus_per_node: None where no option says it

    options: of sbatch, as they were given; run: the configuration and its overrides
    """

    gpu: str | None
    nodes: int
    gpus_per_node: int | None
    options: list[str]
    run: list[str]


def parse(arguments: Sequence[str], script: str) -> Request:
    """script: text of the job script, whose #SBATCH lines hold where no option replaces them.

    Ends the program, as argparse does, where the options leave open how many ranks there will be.
    """
    ours = argparse.ArgumentParser(
        prog="mcpo submit",
        usage="%(prog)s [[--gpu GPU] [OPTIONS OF sbatch] --] CONFIG [--section.key VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    ours.add_argument("--gpu", help="h100, h200, a100, b200, or a JSON file of measured rates")
    end = arguments.index("--") if "--" in arguments else len(arguments)
    known, options = ours.parse_known_args(arguments[:end])
    run = list(arguments[end + 1 :])
    if end == len(arguments):
        run, options = options, []
    if not run or run[0].startswith("-"):
        ours.error("no CONFIG: it comes first, after the options of sbatch and --")
    written = [word for line in re.findall(r"^#SBATCH\s+(.*)", script, re.MULTILINE) for word in shlex.split(line)]
    read, _ = _sbatch().parse_known_args([*written, *options])
    return Request(
        gpu=known.gpu,
        nodes=read.nodes,
        gpus_per_node=read.gpus_per_node if read.gpus_per_node is not None else read.gres,
        options=options,
        run=run,
    )


def _sbatch() -> argparse.ArgumentParser:
    """What of sbatch's options says how many ranks there will be, in all forms that sbatch takes."""
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
            f"{text!r}: the ranks are divided before the job starts; give one number of nodes, such as --nodes=4"
        )
    return int(text)


def _gpus(text: str) -> int:
    """[TYPE:]NUMBER"""
    number = text.rpartition(":")[2]
    if "," in text or not number.isdecimal() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give one number of GPUs, such as --gpus-per-node=8")
    return int(number)


def _gres(text: str) -> int | None:
    """GPUs in gpu[:TYPE][:NUMBER], among other resources; None: no GPUs are asked for."""
    asked = [each.partition("(")[0] for each in text.split(",") if each.split(":")[0] == "gpu"]
    if not asked:
        return None
    number = asked[0].rpartition(":")[2]
    return _gpus(number if number.isdecimal() and len(asked) == 1 else "1" if asked == ["gpu"] else text)


def _not_by_node(text: str) -> int:
    raise argparse.ArgumentTypeError(f"{text!r}: every node has equally many ranks; say --gpus-per-node=N instead")


def check(request: Request) -> int:
    """Everything that can be known before the job is queued, said on stderr; returns the exit code, 0: queue it."""
    gpus = request.gpus_per_node
    try:
        if gpus is None and request.gpu is not None:
            gpus = hardware.load(request.gpu).per_node
    except ConfigError as error:
        return refuse(error)
    ranks = [] if gpus is None else ["--ranks", str(request.nodes * gpus)]
    with redirect_stdout(sys.stderr):
        refused = train.main([*request.run, "--dry-run", *ranks])
        if refused:
            return refused
        if gpus is None:
            print("For how many ranks is not known: say --gpus-per-node=N. The fewest that do were checked.")
        if request.gpu is None:
            print("Whether it fits into the GPUs' memory is not checked: name them with --gpu.")
            return 0
        where = ["--gpu", request.gpu, "--nodes", str(request.nodes), "--gpus-per-node", str(gpus)]
        if plan.main([*request.run, *where]):
            print(f"Not queued: on {request.nodes} node(s) it does not fit, or the plan can't be made; see above.")
            return NOT_QUEUED
    return 0


def main(arguments: Sequence[str]) -> int:
    request = parse(arguments, Path(SCRIPT).read_text(encoding="utf-8"))
    refused = check(request)
    if refused:
        return refused
    sys.stderr.flush()
    try:
        os.execvp("sbatch", ["sbatch", *request.options, SCRIPT, *request.run])
    except FileNotFoundError:
        print("sbatch: not found; submit from a host that has Slurm's commands", file=sys.stderr)
        return NOT_QUEUED
