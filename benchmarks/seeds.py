"""Run a configuration with several seeds, one after the other, and write what they reached as JSON.

`.venv/bin/python -m benchmarks.seeds CONFIG --seeds 0 1 2 --out benchmarks/results/NAME.json [--section.key VALUE ...]`
Each run is the whole program in processes of its own, as a user starts it; run it on an otherwise idle machine.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measure import machine

WINDOW = 5
"""The number of steps at the beginning and at the end whose rewards are compared."""
AUC = "contrast/auc_cross_domain"
"""The ranking of correct above incorrect rollouts, in every step that has both."""
PHASES = ("rollout", "score", "update", "step")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    known, overrides = parser.parse_known_args(arguments)
    try:
        runs = [run(known.config, seed, overrides) for seed in known.seeds]
    except subprocess.CalledProcessError as error:
        return int(error.returncode)  # the run has printed why
    report = {"config": str(known.config), "overrides": overrides, "machine": machine(), "runs": runs}
    known.out.parent.mkdir(exist_ok=True)
    known.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return 0


def run(config: Path, seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Run the program in a fresh folder. Raises CalledProcessError if it fails."""
    with tempfile.TemporaryDirectory(prefix="seeds-") as folder:
        command = [sys.executable, "-m", "megatron_mcpo", "train", str(config), "--run.seed", str(seed)]
        command += ["--run.dir", folder, *overrides]
        start = time.monotonic()
        process = psutil.Popen(command)
        peak = 0
        while process.poll() is None:
            peak = max(peak, memory(process))
            time.sleep(1)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        return summary(Path(folder) / "latest", seed, time.monotonic() - start, peak)


def memory(process: psutil.Process) -> int:
    """Return the bytes of a process and all that it started; a page that n of them share counts 1/n for each."""
    total = 0
    for member in [process, *process.children(recursive=True)]:
        try:
            total += member.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return total


def summary(folder: Path, seed: int, seconds: float, peak: int) -> dict[str, Any]:
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rewards = [row["reward/mean"] for row in steps]
    first, last = statistics.fmean(rewards[:WINDOW]), statistics.fmean(rewards[-WINDOW:])
    return {
        "seed": seed,
        "seconds": round(seconds, 1),
        "peak_memory_gib": round(peak / 2**30, 2),
        "steps": len(steps),
        f"reward_first_{WINDOW}": round(first, 4),
        f"reward_last_{WINDOW}": round(last, 4),
        "factor": round(last / first, 3),
        "rewards": [round(reward, 4) for reward in rewards],
        AUC: [row.get(AUC) for row in steps],
        "held_out": [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()],
        "median_seconds": {p: round(statistics.median(row[f"time/{p}"] for row in steps), 2) for p in PHASES}
        | {"sync": round(statistics.median(row["sync/seconds"] for row in steps), 2)},
        "tokens_a_step": round(statistics.fmean(row["tokens/trained"] for row in steps)),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
