"""Run whole programs as a user starts them: the quick start, training at real sizes with a resume, the study."""

import json
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.gpu import models
from benchmarks.gpu.models import QWEN3_0_6B, QWEN3_1_7B, SMALL, Shape, on_gpu, sized
from benchmarks.gpu.outcome import Band, Outcome, Target
from benchmarks.gpu.speed import MFU_GOAL, forward_flops, training_flops, utilisation
from benchmarks.measure import ROOT
from benchmarks.study.pretrain import DATA
from benchmarks.study.record import read, results_file
from megatron_mcpo.config.config import Config, dump, load
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.storage.files import read_jsonl

_QUICKSTART = ROOT / "examples" / "quickstart" / "config.toml"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_STEPS, _CHECKPOINT = 6, 3
_VARYING = re.compile(r"time/|sync/seconds|memory/")
"""Figures that differ between two runs of the same settings."""
_BEFORE_UPDATE = re.compile(r"reward|pass_rate|response_tokens|truncated|entropy|kl|engine/")
"""Figures of a step that its own update can't change."""
_STUDY_ARMS, _STUDY_SEEDS, _STUDY_SECONDS = ("mcpo", "grpo"), ("0", "1"), 470.0


def program() -> Outcome:
    """Run the quick start's first steps as a user starts them, with every weight sync verified."""
    config = load(_QUICKSTART)
    model = ROOT / config.model.path
    if not (model / "model.safetensors").is_file():
        return _no_model(model)
    with TemporaryDirectory() as name:
        options = ["--run.dir", name, "--run.steps", "3", "--engine.verify_sync", "true", "--evaluation.items", "4"]
        _train(_QUICKSTART, options)
        steps = read_jsonl(Path(name, config.run.name, "metrics.jsonl"))
    apart = max(step["engine/logprob_diff_mean"] for step in steps)
    return Outcome(
        bands=(
            Band(name="steps", value=len(steps), low=3, high=3),
            Band(name="engine and trainer, mean difference of log-probs", value=apart, low=0.0, high=0.1),
        ),
        figures={"seconds_step": steps[-1]["time/step"], "peak_gib": steps[-1]["memory/peak_gib"]},
    )


def training_0_6b() -> Outcome:
    """Train a random model of Qwen3-0.6B's shapes for six steps, and once more from the checkpoint of the third."""
    return _training(QWEN3_0_6B, tokens=16384, resumes=True, targets=False)


def training_1_7b() -> Outcome:
    """Train a random model of Qwen3-1.7B's shapes for six steps."""
    return _training(QWEN3_1_7B, tokens=8192, resumes=False, targets=True)


def study() -> Outcome:
    """Train MCPO and GRPO on the study's level A, as far as the time allows, and state what a CPU reached."""
    if not DATA.is_dir():
        return Outcome(skipped=f"{DATA}: no data; make it with `python -m benchmarks.study.pretrain`")
    shortened = sized((), ("--run.steps=2", "--evaluation.every=2", "--evaluation.items=4"))
    with TemporaryDirectory() as name:
        command = [sys.executable, "-m", "benchmarks.study.run", "--workers", "1", "--device", sized("cuda", "cpu")]
        command += ["--out", name, "--arms", *_STUDY_ARMS, "--seeds", *_STUDY_SEEDS, *shortened]
        process = subprocess.Popen(command, cwd=ROOT, stdout=sys.stderr)
        try:
            process.wait(_STUDY_SECONDS)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # the run that goes on ends its step
            process.wait()
        runs = read(results_file("a", Path(name)))
    on_cpu = {(each["arm"], each["seed"]): each for each in read(results_file("a"))}
    finished = [each for each in runs if "error" not in each]
    figures: dict[str, float | str] = {}
    for each in finished:
        run, usual = f"{each['arm']}, seed {each['seed']}", on_cpu.get((each["arm"], each["seed"]))
        figures |= {f"{run}: accuracy": each["final"]["mean"], f"{run}: seconds of a step": each["seconds"]["step"]}
        if usual and usual["steps"] == each["steps"]:
            figures[f"{run}: accuracy on a CPU"] = usual["final"]["mean"]
    least = min((each["final"]["mean"] for each in finished), default=0.0)
    return Outcome(
        bands=(
            Band(name="arms that were finished", value=len({each["arm"] for each in finished}), low=2, high=2),
            Band(name="runs that failed", value=len(runs) - len(finished), low=0, high=0),
            *on_gpu(Band(name="lowest accuracy", value=least, low=0.5, high=1.0)),  # 0.3 before the first step
        ),
        figures=figures,
    )


def _no_model(folder: Path) -> Outcome:
    return Outcome(skipped=f"{folder}: no such folder; make it with `python tools/embedded_model.py {folder}`")


def _training(shape: Shape, *, tokens: int, resumes: bool, targets: bool) -> Outcome:
    """Run `mcpo train` on a random model with rewards that are a hash. tokens: the most in a micro-batch

    Its vocabulary is larger than that of the tokenizer, which skips the tokens that it does not know.
    """
    tokenizer = ROOT / load(_QUICKSTART).model.path
    if not all((tokenizer / name).is_file() for name in _TOKENIZER):
        return _no_model(tokenizer)
    with TemporaryDirectory() as name:
        folder = Path(name)
        # A checkpoint of 1.7 billion parameters takes 27 GB: only a run that resumes writes two of them.
        config = _config(folder, tokens, checkpoint_every=_CHECKPOINT if resumes else _STEPS)
        shape = sized(shape, replace(SMALL, vocab=49_152))
        # A random model draws any token: one of 400 stops, so that most responses end before the limit.
        stops = shape.vocab // sized(400, 20)
        models.save_model(folder / "model", shape, dtype=torch.bfloat16, num_stop_tokens=stops)
        for each in _TOKENIZER:
            shutil.copy(tokenizer / each, folder / "model")
        start = time.monotonic()
        _train(folder / "config.toml")
        taken = time.monotonic() - start
        run = folder / "runs" / config.run.name
        steps = read_jsonl(run / "metrics.jsonl")
        resumed = _resumed(folder / "config.toml", run) if resumes else []
        model = from_folder(folder / "model")
    figures = {"seconds_beside_steps": taken - sum(step["time/step"] for step in steps), **_pace(steps, config, model)}
    mfu = Target(name="MFU of the update", value=float(figures["mfu_update"]), goal=MFU_GOAL, at_least=True)
    bands, found = _same_figures(steps, resumed) if resumes else ((), {})
    return Outcome(
        bands=(*_healthy(steps), *bands), targets=on_gpu(mfu) if targets else (), figures={**figures, **found}
    )


def _config(folder: Path, tokens: int, *, checkpoint_every: int) -> Config:
    """Write a configuration with three domains and their questions into a folder."""
    prompts, samples, response = sized((64, 8, 512), (6, 4, 24))
    domains: list[dict[str, Any]] = []
    for name in ("red", "green", "blue"):
        rows = [{"question": f"What is {name} about {' '.join(map(str, range(n % 40)))} and {n}?"} for n in range(300)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({**row, "answer": "no"}) + "\n" for row in rows))
        verifiers = [{"kind": "function", "function": "benchmarks.gpu.hash_verifier:score"}]
        sources = [{"file": str(folder / f"{name}.jsonl")}]
        domains.append({"name": name, "shots": 0, "sources": sources, "verifiers": verifiers})
    config = Config.model_validate(
        {
            "run": {
                "name": "training",
                "dir": str(folder / "runs"),
                "steps": _STEPS,
                "checkpoint_every": checkpoint_every,
            },
            "model": {"path": str(folder / "model")},
            "batch": {"prompts": prompts, "samples": samples, "micro_batch_tokens": sized(tokens, 512)},
            "rollout": {"max_prompt_tokens": 256, "max_response_tokens": response},
            "engine": {"max_concurrent": prompts * samples, "gpu_memory_utilization": 0.4, "kv_cache_gib": 0.2},
            "evaluation": {"every": _STEPS, "items": 4},
            "optimizer": {"lr": 1e-6},
            "domain": domains,
        }
    )
    (folder / "config.toml").write_text(dump(config))
    return config


def _train(config: Path, options: Sequence[str] = ()) -> None:
    """Run `mcpo train`. Raises RuntimeError with the end of what it printed if it fails."""
    command = [sys.executable, "-m", "megatron_mcpo", "train", str(config), *options]
    finished = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if finished.returncode:
        raise RuntimeError(finished.stdout[-2000:])


def _resumed(config: Path, run: Path) -> list[dict[str, Any]]:
    """Go on from the checkpoint of step 3, as if the run had been killed at its end; return all steps."""
    (run / "FINISHED").unlink()
    shutil.rmtree(run / "checkpoints" / f"step_{_STEPS:06d}")
    _train(config)
    return read_jsonl(run / "metrics.jsonl")


def _healthy(steps: Sequence[dict[str, Any]]) -> tuple[Band, ...]:
    least = {key: min(step[key] for step in steps) for key in ("nonzero_advantage", "contrast/anchors_cross_domain")}
    applied = sum(step["update/applied"] for step in steps)
    apart = max(step["engine/logprob_diff_mean"] for step in steps)
    return (
        Band(name="updates", value=applied, low=_STEPS, high=_STEPS),
        Band(name="groups with an advantage, least share", value=least["nonzero_advantage"], low=0.3, high=1.0),
        Band(name="cross-domain anchors, least", value=least["contrast/anchors_cross_domain"], low=1, high=1e9),
        Band(name="engine and trainer, mean difference of log-probs", value=apart, low=0.0, high=0.1),
    )


def _pace(steps: Sequence[dict[str, Any]], config: Config, model: ModelConfig) -> dict[str, float]:
    """Return rates and shares of the device's rate by phase, medians of the steps after the first, which compiles.

    The products of a rollout are counted as those of one forward pass.
    """
    rollouts = config.batch.prompts * config.batch.samples
    rows = []
    for step in steps[1:]:
        response, length = step["response_tokens"], round(step["tokens/trained"] / rollouts)
        size = {"rollouts": rollouts, "length": length, "response": response}
        once, passes = forward_flops(model, **size), 1 + config.scores_policy
        rows.append(
            {
                "rollout_tokens_a_second": rollouts * response / step["time/rollout"],
                "trained_tokens_a_second": step["tokens/trained"] / (step["time/score"] + step["time/update"]),
                "mfu_rollout": utilisation(once, step["time/rollout"]),
                "mfu_score": utilisation(passes * once, step["time/score"]),
                "mfu_update": utilisation(training_flops(model, **size), step["time/update"]),
                **{f"seconds_{phase}": step[f"time/{phase}"] for phase in ("step", "sleep", "wake")},
                "seconds_sync": step["sync/seconds"],
                "response_tokens": response,
            }
        )
    pace = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    return pace | {
        "peak_gib": steps[-1]["memory/peak_gib"],
        "logprob_mismatch": max(step["engine/logprob_diff_mean"] for step in steps),
    }


def _same_figures(
    steps: Sequence[dict[str, Any]], resumed: Sequence[dict[str, Any]]
) -> tuple[tuple[Band, ...], dict[str, float]]:
    """Compare a run with its second half from the checkpoint, in every figure.

    A backward pass on a GPU may sum in another order each time. There only the first step after the checkpoint has to
    be equal up to its update: its rollouts come from the restored weights, order of prompts and seeds.
    """
    pairs = list(zip(steps, resumed, strict=True))
    unequal = [
        {key for key, value in one.items() if not _VARYING.match(key) and value != other.get(key)}
        for one, other in pairs[_CHECKPOINT:]
    ]
    before = [key for key in unequal[0] if _BEFORE_UPDATE.match(key)]
    total = sum(map(len, unequal))
    bands = (
        Band(name="resumed: figures that differ before the first update", value=len(before), low=0, high=0),
        *sized((), (Band(name="resumed: figures that differ", value=total, low=0, high=0),)),
    )
    return bands, {"resumed: figures that differ": total}
