"""Try what can happen to engine servers, and to a trainer that uses them, in every phase of an asynchronous run.

`.venv/bin/python -m benchmarks.server_faults [--only FAULT,...] [--json] [--out FILE]`
Each row is a run of two ranks with a server each, which learn from rollouts of the step before. In step 3 one fault
happens when a phase begins. `lost`: prompts that no step has learned from, or more than one has.
"""

import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.measure import options, write_rows
from megatron_mcpo.rollout.server import Server as EngineServer
from tests.support import faults, tiny_run
from tests.support.engine_server import Server
from tests.support.program import CONFIG

STEPS = 6
LONGEST_SECONDS = 600.0
PHASES: dict[str, tuple[str, str, int]] = {
    "wait for rollouts": ("megatron_mcpo.trainer.rollout_stream:RolloutStream", "next", 3),
    "score": ("megatron_mcpo.mcore.policy:Policy", "score", 4),
    "update": ("megatron_mcpo.mcore.policy:Policy", "update", 3),
    "sync begins": ("megatron_mcpo.rollout.vllm_server:VllmServers", "update", 4),
    "in the sync": ("megatron_mcpo.rollout.server:Server", "load", 4),
    "sync ends": ("megatron_mcpo.rollout.server:Server", "finish_update", 4),
    "save": ("megatron_mcpo.mcore.saving:Saving", "write", 3),
    "evaluate": ("megatron_mcpo.trainer.trainer", "evaluate", 4),
}
"""Where a phase of step 3 begins: owner, function, number of the call on a rank."""
SETTINGS = (
    *("--engine.staleness", "1", "--engine.patience", "60", "--parallel.data", "2", "--run.steps", str(STEPS)),
    *("--run.checkpoint_every", "1", "--evaluation.every", "1", "--engine.engine_check_every", "100"),
)
FAULTS: dict[str, signal.Signals] = {
    "server SIGKILL": signal.SIGKILL,
    "server SIGSTOP": signal.SIGSTOP,
    "rank SIGKILL": signal.SIGKILL,
}
"""What is sent to the server of rank 1, or to that rank."""


def measure(wanted: list[str]) -> Iterator[dict[str, Any]]:
    """Yield a row per fault and phase."""
    with TemporaryDirectory(prefix="server-faults-") as name:
        folder = Path(name)
        tiny_run.save_chat_model(folder / "model")
        config = folder / "config.toml"
        config.write_text(CONFIG.format(runs=folder / "runs", model=folder / "model"))
        servers = [Server(config, folder / f"server{number}.log") for number in range(2)]
        try:
            for number, (fault, phase) in enumerate((fault, phase) for fault in wanted for phase in PHASES):
                yield _cell(fault, phase, config, servers, name=f"run{number}")
                _mend(servers)
        finally:
            for server in servers:
                server.kill()


def _cell(fault: str, phase: str, config: Path, servers: list[Server], *, name: str) -> dict[str, Any]:
    for server in servers:
        server.wait_ready()
    run = config.parent / "runs" / name
    urls = json.dumps([server.url for server in servers])
    arguments = ["train", str(config), *SETTINGS, "--run.name", name, "--engine.servers", urls]
    process = servers[1].process.pid if fault.startswith("server") else None
    start = time.monotonic()
    codes, output = _run(arguments, config, partial(_prepare, phase, FAULTS[fault], process))
    seconds = time.monotonic() - start
    survived = codes == [0, 0]
    again = codes if survived else _run(arguments, config, None)[0]
    learned = Counter(
        (row["domain"], row["source"], row["index"])
        for path in (run / "rollouts").iterdir()
        for row in map(json.loads, path.read_text().splitlines())
    )
    prompts = STEPS * 8
    return {
        "fault": fault,
        "phase": phase,
        "codes": codes,
        "result": "survived" if survived else "hung" if None in codes else "ended",
        "finished": again == [0, 0],
        "lost": prompts - len(learned),
        "twice": sum(count > 4 for count in learned.values()),
        "traceback": "Traceback" in output,
        "seconds": round(seconds, 1),
        "words": [line[:300] for line in output.splitlines() if "server" in line and "http" in line][:8],
    }


def _prepare(phase: str, number: signal.Signals, process: int | None) -> None:
    """Let rank 1 send a signal when a phase begins. process: of the server, which leads a group; None for the rank"""
    EngineServer.patience = 5.0
    path, name, call = PHASES[phase]
    fault = partial(faults.signal_self, number) if process is None else partial(os.killpg, process, number)
    faults.at_call(path, name, fault, rank=1, number=call)


def _run(arguments: list[str], config: Path, prepare: Callable[[], None] | None) -> tuple[list[int | None], str]:
    """Run two ranks; return their exit codes and what they printed."""
    log = config.parent / "ranks.log"
    with faults.running(arguments, ranks=2, log=log, prepare=prepare) as ranks:
        codes = ranks.codes(timeout=LONGEST_SECONDS)
    return codes, log.read_text()


def _mend(servers: list[Server]) -> None:
    """Let stopped servers go on, and start dead ones again."""
    for server in servers:
        if server.process.poll() is None:
            server.send(signal.SIGCONT)
        else:
            server.start()


def main() -> int:
    parser = options(__doc__ or "")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(FAULTS), help="faults to try")
    known = parser.parse_args()
    return write_rows("server_faults", measure(known.only), known)


if __name__ == "__main__":
    sys.exit(main())
