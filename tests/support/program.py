"""The whole program on a tiny configuration, started as a user does, or as forks of a process that has imported it all.

Imports take ten times as long as a few steps of a tiny model. Forks have them behind them, and go through everything
that torchrun's ranks go through, except torchrun; what concerns starting and ending is for `train`.
"""

import json
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support import vllm_cases
from tests.support.paths import ROOT

CONFIG = """
[run]
name = "tiny"
dir = "{runs}"
steps = 6
checkpoint_every = 2
[model]
path = "{model}"
dtype = "fp32"
[batch]
prompts = 8
samples = 4
micro_batch_tokens = 1024
[rollout]
max_prompt_tokens = 200
max_response_tokens = 4
[engine]
kv_cache_gib = 0.1
engine_check_every = 3
[contrastive]
dim = 16
[optimizer]
lr = 2e-3
[evaluation]
every = 6
items = 8
[[domain]]
name = "divisors"
shots = 0
items = 60
sources = [{{ generator = "gcd" }}]
[[domain]]
name = "letters"
shots = 0
items = 60
sources = [{{ generator = "letter_counting", options = {{ min_words = 3, max_words = 5 }} }}]
"""
VARYING = re.compile(r"time/|sync/seconds|memory/")
type Finished = subprocess.CompletedProcess[str]


def write_config(model: Path, folder: Path) -> Path:
    path = folder / "config.toml"
    path.write_text(CONFIG.format(runs=folder / "runs", model=model))
    return path


def command(config: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "megatron_mcpo", "train", str(config), *overrides]


def train(config: Path, *overrides: str, timeout: float = 540) -> Finished:
    return subprocess.run(command(config, *overrides), cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def train_forked(
    config: Path, *overrides: str, ranks: int = 1, prepare: Callable[[], None] | None = None, timeout: float = 540
) -> Finished:
    """`prepare` is called first on every rank. The exit code is the highest of the ranks'."""
    return forked("train", config, *overrides, ranks=ranks, prepare=prepare, timeout=timeout)


def forked(
    subcommand: str,
    config: Path,
    *arguments: str,
    ranks: int = 1,
    prepare: Callable[[], None] | None = None,
    timeout: float = 540,
) -> Finished:
    """Any subcommand that torchrun may start, as `train_forked`."""
    given = [str(config), *arguments]
    code, output, errors = vllm_cases.run(_fork_ranks, subcommand, given, ranks, prepare, timeout, timeout=timeout + 30)
    return subprocess.CompletedProcess(given, code, output, errors)


def _fork_ranks(
    subcommand: str, arguments: list[str], ranks: int, prepare: Callable[[], None] | None, timeout: float
) -> tuple[int, str, str]:
    from tempfile import TemporaryDirectory

    from tests.support.ranks import run_ranks

    os.chdir(ROOT)
    with TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("output", "errors")]
        codes = run_ranks(ranks, _rank_main, subcommand, arguments, streams, prepare, timeout=timeout)
        output, errors = (path.read_text() for path in streams)
    return max(codes), output, errors


def _rank_main(subcommand: str, arguments: list[str], streams: list[Path], prepare: Callable[[], None] | None) -> int:
    from megatron_mcpo.cli.main import main

    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    if prepare is not None:
        prepare()
    try:
        code: int = main([subcommand, *arguments])
        return code
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def lasting(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Figures that two equal runs agree on."""
    return [{key: value for key, value in row.items() if not VARYING.match(key)} for row in rows]
