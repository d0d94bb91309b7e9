"""Try every fault in every phase of a run, and say what became of it.

`.venv/bin/python -m benchmarks.faults [--only FAULT,...] [--phases PHASE,...] [--json] [--out FILE]`
Each row is a run of two ranks with a tiny model, in which one fault happens to one rank when a phase of step 2 begins.
A run that ends is started again without the fault. `same`: whether its metrics, evaluations and rollouts are in the end
those of a run without faults. Needs root, to mount small disks.
"""

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from signal import SIGKILL, SIGSTOP, SIGTERM
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.measure import options, write_rows
from tests.support import faults, tiny_run
from tests.support.disks import disk
from tests.support.faults import EVERY_STEP, PHASES
from tests.support.resumed_runs import Figures, figures, write_config

LONGEST_SECONDS = 900.0
_USUAL = re.compile(
    r"(model|layout|engine|step|rank|limits|run|domains:|weight sync|engine/trainer|held-out|resuming|mechanism) "
    r"|WATCHDOG: ( *File|Thread)|Thread |Traceback"
)
DISK_BYTES, TMP_BYTES = 64 << 20, 1 << 16

FAULTS: dict[str, Callable[[Path, Path], faults.Fault]] = {
    "SIGKILL": lambda run, tmp: partial(faults.signal_self, SIGKILL),
    "SIGSTOP": lambda run, tmp: partial(faults.signal_self, SIGSTOP),
    "SIGTERM": lambda run, tmp: partial(faults.signal_self, SIGTERM),
    "disk full": lambda run, tmp: partial(faults.fill, run),
    "NaN gradient": lambda run, tmp: faults.poison_gradient,
    "verifier death": lambda run, tmp: faults.kill_verifiers,
    "clock jump": lambda run, tmp: partial(faults.jump_clock, -86400.0),
    "full /tmp": lambda run, tmp: partial(faults.fill_tmp, tmp),
    "ulimit -n 64": lambda run, tmp: partial(faults.lower_file_limit, 64),
}
"""What happens, given the folder of the run and one for temporary files, each on a disk of its own."""

ONLY_IN = {"NaN gradient": ("update",), "verifier death": ("start", "score", "evaluate")}
"""Phases in which a fault can happen, where it can't in all of them."""


def measure(wanted: list[str], phases: list[str]) -> Iterator[dict[str, Any]]:
    """Yield a row per fault and phase."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        tiny_run.save_chat_model(folder / "model")
        (folder / "whole").mkdir()
        config = write_config(folder / "model", folder / "whole")
        codes, output = _run(config, None)
        assert codes == [0, 0], output
        whole = figures(folder / "whole" / "runs" / "tiny")
        for fault in wanted:
            for phase in [phase for phase in ONLY_IN.get(fault, tuple(PHASES)) if phase in phases]:
                yield _cell(fault, phase, folder, whole)


def _cell(fault: str, phase: str, folder: Path, whole: Figures) -> dict[str, Any]:
    with ExitStack() as closing:
        run = closing.enter_context(disk(folder / f"{fault} {phase}".replace("/", ""), DISK_BYTES))
        tmp = closing.enter_context(disk(folder / f"{fault} {phase} tmp".replace("/", ""), TMP_BYTES))
        config = write_config(folder / "model", run)
        start = time.monotonic()
        codes, output = _run(config, partial(faults.at_phase, phase, FAULTS[fault](run, tmp)))
        seconds = time.monotonic() - start
        (run / "filler").unlink(missing_ok=True)
        finished = codes == [0, 0] and (run / "runs" / "tiny" / "FINISHED").exists()
        again = None if finished else _run(config, None)
        is_whole = again is None or again[0] == [0, 0]
        same = is_whole and figures(run / "runs" / "tiny") == whole
    return {
        "fault": fault,
        "phase": phase,
        "codes": codes,
        "result": "survived" if finished else "hung" if None in codes else "ended",
        "same": same,
        "traceback": "Traceback" in output,
        "seconds": round(seconds, 1),
        "words": _words(output),
        **({} if is_whole or again is None else {"resume": again[1][-2000:]}),
    }


def _run(config: Path, prepare: Callable[[], None] | None) -> tuple[list[int | None], str]:
    """Run two ranks; return their exit codes and what they printed."""
    log = config.parent.parent / f"{config.parent.name}.log"
    with faults.running(["train", str(config), *EVERY_STEP], ranks=2, log=log, prepare=prepare) as ranks:
        codes = ranks.codes(timeout=LONGEST_SECONDS)
    output = log.read_text()
    log.unlink()
    return codes, output


def _words(output: str) -> list[str]:
    """Return the lines that say what happened: not those of tables, stacks and a run without faults."""
    lines = [line for line in output.splitlines() if re.match(r"[A-Za-z/]", line)]
    return [line[:300] for line in lines if not _USUAL.match(line)][:8]


def main() -> int:
    parser = options(__doc__ or "")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(FAULTS), help="faults to try")
    parser.add_argument("--phases", type=lambda text: text.split(","), default=list(PHASES), help="phases to try")
    known = parser.parse_args()
    return write_rows("faults", measure(known.only, known.phases), known)


if __name__ == "__main__":
    sys.exit(main())
