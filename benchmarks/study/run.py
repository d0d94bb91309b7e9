"""Run what is missing of the study, several runs at once, and append a line of results as each of them ends.

`.venv/bin/python -m benchmarks.study.run --level a [--arms NAME ...] [--group main] [--seeds 0 1 2] [--workers 2]`
A run is `mcpo train` in a process of its own, with the lowest priority. All arms of one seed come before the next seed,
so that a study that is interrupted has compared all of them; the tuning arms have two rounds (tuning.py). Ctrl-C and
SIGTERM let the runs end their step and save, and the same command goes on with them. For a trial, --out FOLDER keeps
the results elsewhere and allows overrides (--run.steps 3).
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measure import ROOT
from benchmarks.study.arms import BASES, FIRST_TUNING_SEED, MAIN, TUNING, Arm, arms, configuration
from benchmarks.study.record import RESULTS, Job, append, chosen_settings, finished, measured, read, results_file
from benchmarks.study.tuning import second_round
from megatron_mcpo.config.config import Config, ConfigError, dump
from megatron_mcpo.storage.run_folder import PREEMPTED
from megatron_mcpo.storage.run_lock import RunLock

RUNS = ROOT / "runs" / "study"
_RUN, _CONFIG, _LOG = "run", "config.toml", "log.txt"
"""What a run's folder holds: the folder that the trainer makes, the run's configuration, and what it printed."""
_POLL_SECONDS = 1.0
_ERROR_LINES = 20


def main(arguments: Sequence[str]) -> int:
    known, overrides = _parser().parse_known_args(arguments)
    try:
        if overrides and known.out == RESULTS:
            raise ConfigError([f"{overrides[0]}: needs --out FOLDER (its results are not those of the study). Add it."])
        device_problem = _device_problem(known.device)
        if device_problem:
            raise ConfigError([device_problem])
        study = Study(
            level=known.level,
            arms=arms(known.level),
            overrides=tuple(overrides),
            results=results_file(known.level, known.out),
            folder=(RUNS if known.out == RESULTS else known.out / "runs") / known.level,
            threads=max(1, (os.cpu_count() or 1) // known.workers),
            device=known.device,
            keep=known.keep,
        )
        chosen = selected(study.arms, known.arms, known.group)
        jobs = missing(known.level, chosen, known.seeds, read(study.results), again=known.again)
        for arm in chosen:  # all of them can start, before the first of them does
            configuration(known.level, arm, overrides)
    except ConfigError as error:
        print("\n".join(error.problems), file=sys.stderr)
        return 2
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: study.stop())
    all_done = study.run_all(jobs, known.workers)
    if not study.stopping:  # the first round of the tuning has decided on the second
        later = missing(known.level, chosen, known.seeds, read(study.results), again=False)
        all_done = study.run_all(later, known.workers) and all_done
    return 0 if all_done else 1


def _lower_priority(process: psutil.Process) -> None:
    """Give the sessions of a process and those below it the lowest priority as a whole.

    Linux shares the processor out by sessions (autogroup), and `nice` orders the processes of a session among each
    other only. A run starts its ranks in sessions of their own.
    """
    with contextlib.suppress(OSError, psutil.Error):  # the kernel has no such groups, or a process has ended
        for one in (process, *process.children(recursive=True)):
            Path(f"/proc/{one.pid}/autogroup").write_text("19")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--level", choices=BASES, default="a", help="small model of our own (a) or pretrained model (b)"
    )
    parser.add_argument("--arms", nargs="+", metavar="NAME", help="only these arms")
    parser.add_argument("--group", help=f"only the arms of a group: {MAIN}, {TUNING}, or one choice as {TUNING}/pool")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: those of each arm (arms.py)")
    parser.add_argument("--workers", type=_positive, default=2, help="number of runs at once (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--again", action="store_true", help="also repeat the runs that failed")
    parser.add_argument("--keep", action="store_true", help="keep the folders of the runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a positive integer")
    return int(text)


def _device_problem(device: str) -> str | None:
    """Return why the runs could not compute on the device."""
    if device == "cpu":
        return None
    from megatron_mcpo.distributed.device import uses_gpu, why_no_gpu

    return None if uses_gpu() else f"--device = 'cuda': must be usable ({why_no_gpu()}). Use --device cpu."


def selected(known: dict[str, Arm], names: Sequence[str] | None, group: str | None) -> list[Arm]:
    """Return the arms with these names and of this group. Raises ConfigError for names that no arm has."""
    unknown = sorted(set(names or ()) - known.keys())
    if unknown:
        raise ConfigError([f"--arms = {', '.join(unknown)}: must be among {', '.join(known)}. Correct it."])
    found = [
        arm
        for arm in known.values()
        if (names is None or arm.name in names) and (group is None or group in (arm.group, arm.kind))
    ]
    if not found:
        groups = dict.fromkeys(arm.group for arm in known.values())
        raise ConfigError(
            [f"--group = {group!r}: must have one of the arms (groups: {', '.join(groups)}). Correct it."]
        )
    return found


def missing(
    level: str, chosen: Sequence[Arm], seeds: Sequence[int] | None, lines: Sequence[Mapping[str, Any]], *, again: bool
) -> list[Job]:
    """Return the runs that are not done, all arms of one seed before those of the next seed.

    A seed is for the arms that it counts for. Without `seeds` an arm has its own, a tuning arm the seeds
    after the first only where it takes part in the second round. Raises ConfigError where no seed counts for any of
    the arms.

    Args:
        lines: the results so far
        again: also return the runs that failed
    """
    done, later = finished(lines, again=again), second_round(lines, arms(level))
    wanted = [
        (seed, number, arm)
        for number, arm in enumerate(chosen)
        for seed in seeds or arm.seeds
        if arm.has_seed(seed) and (seeds or seed <= FIRST_TUNING_SEED or arm.name in later)
    ]
    if not wanted:
        kinds = " and ".join(dict.fromkeys(f"{arm.seeds} of {arm.kind}" for arm in chosen))
        raise ConfigError([f"--seeds = {seeds}: must count for an arm (such as {kinds}). Choose others."])
    order = sorted(wanted, key=lambda entry: entry[:2])
    return [Job(level=level, arm=arm.name, seed=seed) for seed, _, arm in order if (arm.name, seed) not in done]


@dataclass(kw_only=True)
class Study:
    """The runs of a level, and the processes of those that are going on."""

    level: str
    arms: dict[str, Arm]
    overrides: tuple[str, ...]
    results: Path
    folder: Path
    threads: int
    device: str
    keep: bool
    stopping: bool = False

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.commit = commit()

    def stop(self) -> None:
        """Let all runs end their step and save; start no other."""
        if not self.stopping:
            print("stopping: the runs end their step and save", flush=True)
        self.stopping = True

    def run_all(self, jobs: Sequence[Job], workers: int) -> bool:
        """Make these runs, `workers` at once; return whether all of them were finished."""
        print(f"{len(jobs)} runs to do, {workers} at once, {self.threads} threads each", flush=True)
        with ThreadPoolExecutor(workers) as pool:
            return all(list(pool.map(self.run, jobs)))

    def run(self, job: Job) -> bool:
        """Make a run, or go on with it, and append its line; return whether it was finished."""
        if self.stopping:
            return False
        folder = self.folder / job.name
        config = self._configuration(job, folder)
        try:
            self._prepare(config, folder)
        except ConfigError as error:
            print(f"{job.name}: {error}", flush=True)
            return False
        start = time.monotonic()
        code = 0 if (folder / _RUN / "FINISHED").exists() else self._train(folder)
        if code and (self.stopping or (folder / _RUN / PREEMPTED).exists()):
            print(f"{job.name}: interrupted", flush=True)
            return False
        line = self._line(job, config, folder, code=code, seconds=time.monotonic() - start)
        append(self.results, line, self.folder)
        if not self.keep:
            shutil.rmtree(folder)
        said = f"failed with exit code {code}" if "error" in line else f"mean {line['final']['mean']:.3f}"
        print(f"{job.name}: {said}, {line['seconds']['total']:.0f} s", flush=True)
        return "error" not in line

    def _configuration(self, job: Job, folder: Path) -> Config:
        own = [f"--run.name={_RUN}", f"--run.dir={folder}", f"--run.seed={job.seed}"]
        return configuration(self.level, self.arms[job.arm], [*self.overrides, *own])

    def _prepare(self, config: Config, folder: Path) -> None:
        """Make the folder of a run with its configuration; drop what an earlier one with other settings left there.

        Raises ConfigError where another process makes this run.
        """
        if (folder / _RUN).is_dir():
            RunLock(folder / _RUN).close()
        file, text = folder / _CONFIG, dump(config)
        if file.exists() and file.read_text(encoding="utf-8") != text:
            shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")

    def _train(self, folder: Path) -> int:
        """Run `mcpo train` until it ends; return its exit code. Its output is appended to folder/log.txt."""
        command = ["nice", "-n", "19", sys.executable, "-m", "megatron_mcpo", "train", str(folder / _CONFIG)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "HF_HUB_OFFLINE": "1"}
        if self.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        with (folder / _LOG).open("ab") as log:
            # A session of its own: Ctrl-C on the terminal, which would end the run unsaved, reaches only this program.
            process = psutil.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
        asked = False
        while process.poll() is None:
            _lower_priority(process)
            if self.stopping and not asked:
                process.terminate()
                asked = True
            time.sleep(_POLL_SECONDS)
        return int(process.wait())

    def _line(self, job: Job, config: Config, folder: Path, *, code: int, seconds: float) -> dict[str, Any]:
        line: dict[str, Any] = {
            "level": job.level,
            "arm": job.arm,
            "seed": job.seed,
            "steps": config.run.steps,
            "commit": self.commit,
            "device": self.device,
            "threads": self.threads,
            "settings": chosen_settings(config),
        }
        found: dict[str, Any]
        if code:
            found = {"error": f"exit code {code}\n{_end_of(folder / _LOG)}"}
        else:
            try:
                found = measured(folder / _RUN, config)
            except ValueError as error:
                found = {"error": str(error)}
        return line | found | {"seconds": {"total": round(seconds, 1)} | found.get("seconds", {})}


def _end_of(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_ERROR_LINES:])


def commit() -> str:
    """Return the commit of the checkout, with -dirty where the files that decide on a run are not those of it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "megatron_mcpo", "benchmarks", ":!benchmarks/results")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
