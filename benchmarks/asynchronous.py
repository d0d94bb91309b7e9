"""Compare synchronous runs with asynchronous ones: speed, long responses, and what is learned.

`.venv/bin/python -m benchmarks.asynchronous [CASE ...] [--json] [--out benchmarks/results/NAME.json]`
One core is for an engine server and one for the trainer.

balanced: rollouts and learning take nearly equally long; the ratio could be nearly 2
tail: one prompt in 32 has responses that are twenty times longer, against the same number of tokens in equal responses
quality: the reward of a tiny model that learns quickly, by staleness and importance weight, three seeds each
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from benchmarks.measure import ROOT, options, write_rows
from tests.support import tiny_run
from tests.support.engine_server import Server
from tests.support.program import CONFIG

SERVER_CORE, TRAINER_CORE = 0, 1
PROMPTS = 8
SKIPPED, STEPS = 3, 12
"""Steps that are not counted at the beginning of a run, and that are."""
SHORT, TAIL, ONE_IN = 16, 20, 32
LONGEST = SHORT * TAIL
Domains = Mapping[str, tuple[float, int, str]]
"""Weight, length of all responses, and generator of each domain."""
SEEDS = (0, 1, 2)
QUALITY_STEPS = 40

_SETTINGS = """
[run]
name = "measured"
dir = "{folder}/runs"
steps = {steps}
checkpoint_every = 1000
[model]
path = "{folder}/model"
dtype = "fp32"
[batch]
prompts = {prompts}
samples = 4
micro_batch_tokens = 2048
[rollout]
max_prompt_tokens = 240
max_response_tokens = {longest}
[engine]
kv_cache_gib = 0.5
max_concurrent = 16
engine_check_every = 1000
[algorithm]
kl_weight = 0.0
[optimizer]
lr = 1e-6
[evaluation]
every = 1000
items = 4
"""
_DOMAIN = """
[[domain]]
name = "{name}"
weight = {weight}
shots = 0
items = 200
max_response_tokens = {limit}
sources = [{{ generator = "{generator}" }}]
"""


def main(arguments: Sequence[str]) -> int:
    parser = options(__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all without one")
    known = parser.parse_args(arguments)
    if unknown := set(known.cases) - CASES.keys():
        parser.error(f"{', '.join(sorted(unknown))}: must be of {', '.join(CASES)}")
    return write_rows("asynchronous", _rows(known.cases or list(CASES)), known)


def _rows(cases: Sequence[str]) -> Iterator[dict[str, Any]]:
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="asynchronous-") as folder:
            yield from CASES[case](Path(folder))


def balanced(folder: Path) -> Iterator[dict[str, Any]]:
    """Compare steps whose two halves are about equal."""
    save_model(folder / "model")
    equal = {"one": (1.0, 64, "gcd"), "two": (1.0, 64, "chain_sum")}
    with server(write(folder, equal, steps=1)) as url:
        sync = run(folder, equal, url)
        ahead = run(folder, equal, url, "--engine.staleness", "1")
    half = max(sync["rollout"], sync["step"] - sync["rollout"])
    yield {"case": "balanced", **compared(sync, ahead), "ratio_possible": round(sync["step"] / half, 3)}


def tail(folder: Path) -> Iterator[dict[str, Any]]:
    """Compare steps with long responses and without, with partial rollouts, and synchronous ones."""
    save_model(folder / "model")
    # Two short domains: a step has at least two, and would have a long prompt each time.
    share = (ONE_IN - 1) / 2
    mixed = {"one": (share, SHORT, "gcd"), "two": (share, SHORT, "lcm"), "long": (1.0, LONGEST, "chain_sum")}
    same = round(SHORT * (ONE_IN - 1 + TAIL) / ONE_IN)
    kinds = {"tail": mixed, "equal": {name: (weight, same, kind) for name, (weight, _, kind) in mixed.items()}}
    ahead = ("--engine.staleness", "24", "--engine.oversample", "2.0")
    with server(write(folder, mixed, steps=1)) as url:
        found = {
            f"{kind}_{name}": run(folder, domains, url, *settings, steps=4 * ONE_IN // PROMPTS)
            for kind, domains in kinds.items()
            for name, settings in (("sync", ()), ("async", ahead))
        }
    sync, ahead_of_it = found["tail_sync"], found["tail_async"]
    equal_sync, equal_ahead = found["equal_sync"], found["equal_async"]
    yield {
        "case": "tail",
        **compared(sync, ahead_of_it),
        "seconds_equal_sync": round(equal_sync["step"], 3),
        "seconds_equal_async": round(equal_ahead["step"], 3),
        "over_equal_sync": round(sync["step"] / equal_sync["step"], 3),
        "over_equal_async": round(ahead_of_it["step"] / equal_ahead["step"], 3),
        "staleness_mean": round(ahead_of_it["staleness"], 2),
        "passed_over": round(ahead_of_it["passed_over"], 2),
    }


def quality(folder: Path) -> Iterator[dict[str, Any]]:
    """Compare the mean reward over the last third of the steps."""
    tiny_run.save_chat_model(folder / "model")
    config = folder / "config.toml"
    config.write_text(CONFIG.format(runs=folder / "runs", model=folder / "model"))
    kinds = {
        "synchronous": (),
        "staleness 1": ("--engine.staleness", "1"),
        "staleness 4": ("--engine.staleness", "4"),
        "staleness 4, importance off": ("--engine.staleness", "4", "--algorithm.importance", "off"),
        "staleness 4, importance reject": ("--engine.staleness", "4", "--algorithm.importance", "reject"),
    }
    fixed = ("--run.steps", str(QUALITY_STEPS), "--evaluation.every", "1000", "--optimizer.lr", "5e-4")
    with server(config) as url:
        for name, settings in kinds.items():
            rewards = []
            for seed in SEEDS:
                rows = train(config, url, *fixed, "--run.seed", str(seed), *settings)
                last = rows[-QUALITY_STEPS // 3 :]
                rewards.append(round(statistics.fmean(_reward(row) for row in last), 4))
            yield {"case": "quality", "kind": name, "rewards": rewards, "mean": round(statistics.fmean(rewards), 4)}


CASES = {"balanced": balanced, "tail": tail, "quality": quality}


def compared(sync: Mapping[str, float], ahead: Mapping[str, float]) -> dict[str, float]:
    """Return the figures of both kinds of steps; ratio: how many times faster those ahead are."""
    return {
        "seconds_sync": round(sync["step"], 3),
        "seconds_rollout": round(sync["rollout"], 3),
        "seconds_async": round(ahead["step"], 3),
        "ratio": round(sync["step"] / ahead["step"], 3),
        "trainer_wait_share": round(ahead["wait"] / ahead["step"], 3),
        "engine_busy": round(ahead["busy"], 3),
    }


def run(folder: Path, domains: Domains, url: str, *settings: str, steps: int = STEPS) -> dict[str, float]:
    """Train; return the means of a step's figures."""
    config = write(folder, domains, steps=SKIPPED + steps)
    rows = train(config, url, *settings)[SKIPPED:]
    names = {
        "step": "time/step",
        "rollout": "time/rollout",
        "wait": "time/wait_for_rollouts",
        "busy": "engine/busy",
        "staleness": "staleness/mean",
        "passed_over": "rollouts/passed_over",
    }
    return {name: statistics.fmean(row.get(key, 0.0) for row in rows) for name, key in names.items()}


def train(config: Path, url: str, *settings: str) -> list[dict[str, Any]]:
    """Run the program on its core with the server; return its metrics. Raises CalledProcessError if it fails."""
    command = ["taskset", "-c", str(TRAINER_CORE), sys.executable, "-m", "megatron_mcpo", "train", str(config)]
    command += ["--engine.servers", json.dumps([url]), "--run.resume", "never", *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600)
    if done.returncode:
        sys.stderr.write(done.stdout[-3000:] + done.stderr[-3000:])
        done.check_returncode()
    lines = (config.parent / "runs" / "latest" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@contextmanager
def server(config: Path) -> Iterator[str]:
    """Provide a server on its core."""
    mask = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {SERVER_CORE})  # which the server inherits
    try:
        started = Server(config, config.parent / "server.log", {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    finally:
        os.sched_setaffinity(0, mask)
    try:
        started.wait_ready()
        yield started.url
    finally:
        started.kill()


def write(folder: Path, domains: Domains, *, steps: int) -> Path:
    """Write a configuration."""
    parts = [_SETTINGS.format(folder=folder, prompts=PROMPTS, longest=LONGEST, steps=steps)]
    for name, (weight, limit, generator) in domains.items():
        parts.append(_DOMAIN.format(name=name, weight=weight, limit=limit, generator=generator))
    path = folder / "config.toml"
    path.write_text("".join(parts))
    return path


def save_model(folder: Path) -> None:
    """Write a small random model that never ends a response by itself.

    One channel of the residual stream holds a constant, which no layer changes, and the output of the end reads it.
    """
    logging.disable_progress_bar()
    torch.manual_seed(0)
    tiny_run.save_chat_tokenizer(folder)
    shape = LlamaConfig(
        vocab_size=len(tiny_run.VOCAB),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tiny_run.VOCAB["<eos>"],
    )
    model = LlamaForCausalLM(shape)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        model.lm_head.weight[shape.eos_token_id] = 0.0
        model.lm_head.weight[shape.eos_token_id, 0] = -100.0
    model.save_pretrained(folder)


def _reward(row: Mapping[str, float]) -> float:
    """Return the mean reward over domains."""
    return statistics.fmean(value for key, value in row.items() if key.startswith("reward/"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
