"""The whole program on a tiny character model: real torchrun, Megatron-Core, vLLM, verifiers and files.

Not covered here: the quick start's own model (its figures are in benchmarks/), GPUs, several
hosts (test_two_hosts, test_slurm).
"""

import fcntl
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch import Tensor

from megatron_mcpo.reporting.metric_table import SECTIONS
from megatron_mcpo.weights import reshard_sync
from tests.support import tiny_run
from tests.support.paths import ROOT
from tests.support.program import command, lasting, metrics, train, train_forked, write_config
from tests.support.vllm_cases import needs_fp8

FIXED_NAMES = {
    "step", "reward/mean", "reward/divisors", "reward/letters", "nonzero_advantage/divisors",
    "nonzero_advantage/letters",
    "loss/policy", "loss/kl", "loss/cross_domain", "loss/in_domain", "contrast/anchors_cross_domain",
    "contrast/anchors_in_domain", "contrast/negatives", "contrast/alignment", "contrast/uniformity",
    "entropy", "grad_norm", "lr", "engine/logprob_diff_mean",
    "engine/logprob_diff_max", "sync/seconds", "sync/bytes", "time/rollout", "time/sleep", "time/score", "time/update",
    "time/wake", "time/step", "tokens/trained", "memory/peak_gib",
}  # fmt: skip
PAIR_OF_DOMAINS, DOMAIN = re.compile("/(divisors|letters)/(divisors|letters)$"), re.compile("/(divisors|letters)$")
O_PROJ = [f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (0, 1)]


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Path:
    return write_config(model, tmp_path)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Figures of an uninterrupted run on one rank."""
    folder = tmp_path_factory.mktemp("whole")
    finished = train_forked(write_config(model, folder))
    assert finished.returncode == 0, finished.stderr[-3000:]
    return metrics(folder / "runs" / "tiny")


def test_it_learns_and_leaves_what_it_promises(config: Path, tmp_path: Path) -> None:
    """Digits at random are right one time in ten; most greatest common divisors are 1, and so are most counts.

    At a learning rate of 1e-3 the reward of all of eight seeds grew by 1.7 and more; at 2e-3 two of five lost it all.
    """
    sizes = ("--run.steps", "20", "--batch.prompts", "16", "--batch.samples", "8", "--optimizer.lr", "1e-3")
    finished = train(config, *sizes, "--model.recompute", "selective")
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "Warning" not in finished.stderr, "what third parties warn of, and nobody can do anything about"
    folder = tmp_path / "runs" / "tiny"
    rows = metrics(folder)
    assert [row["step"] for row in rows] == list(range(1, 21))
    measured = set().union(*rows)  # of losses and shares only in the steps that have what they are of
    assert measured >= FIXED_NAMES, FIXED_NAMES - measured
    described = {key for section in SECTIONS for row in section.metrics for key in row.keys}
    general = {PAIR_OF_DOMAINS.sub("/<a>/<b>", key) for row in rows for key in row}
    assert {DOMAIN.sub("/<domain>", key) for key in general} <= described | {"step"}
    # Of two domains, hence in the steps alone where both have something right.
    of_both = {"contrast/similarity/divisors/letters", "contrast/positives/divisors/letters"}
    assert of_both <= measured
    first, last = (sum(row["reward/mean"] for row in part) / 5 for part in (rows[:5], rows[-5:]))
    assert last >= 1.5 * first, f"mean reward {first:.3f} -> {last:.3f}"
    assert max(row["engine/logprob_diff_mean"] for row in rows) < 1e-4
    assert (tmp_path / "runs" / "latest").resolve() == folder.resolve()
    evaluations = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    assert [row["step"] for row in evaluations] == [0, 6, 12, 18, 20]
    assert list(evaluations[0])[:5] == ["step", "divisors", "letters", "mean", "worst"]
    assert (
        evaluations[0]["accuracy_low/letters"] <= evaluations[0]["letters"] <= evaluations[0]["accuracy_high/letters"]
    )
    assert {path.name for path in (folder / "plots").iterdir()} >= {
        "reward_by_domain.png",
        "representations.png",
        "similarity.png",
    }
    report = (folder / "report.html").read_text()
    assert "report.html" in finished.stdout and "WARNING: no report" not in finished.stdout
    assert (
        '"status":"finished"' in report
        and '"total":20' in report
        and "engine/trainer log-prob mismatch: mean" in report
    )
    rollouts = [json.loads(line) for line in (folder / "rollouts" / "step_000020.jsonl").read_text().splitlines()]
    assert len(rollouts) == 16 * 8
    assert {"prompt", "completion", "reward", "advantage", "domain", "positives"} <= set(rollouts[0])
    assert "divisors" in finished.stdout and "\x1b" not in finished.stdout, "plain lines where there is no terminal"


def test_killed_and_started_again_it_ends_with_the_same_figures(
    config: Path, tmp_path: Path, whole: list[dict[str, Any]]
) -> None:
    process = psutil.Popen(command(config), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "runs" / "tiny" / "metrics.jsonl"
    deadline = time.monotonic() + 400
    while not log.exists() or len(log.read_text().splitlines()) < 3:
        assert time.monotonic() < deadline and process.poll() is None, "no third step"
        time.sleep(0.02)
    # torchrun first: it would otherwise see its rank die and clean up.
    for victim in [process, *process.children(recursive=True)]:
        victim.kill()
    process.wait()
    with (log.parent / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a rank holds its folder until the kernel has taken it down
    resumed = train_forked(config)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "resuming after step 2" in resumed.stdout
    assert lasting(metrics(tmp_path / "runs" / "tiny")) == lasting(whole)


TWO_RANKS = {
    "data": ("--parallel.data", "2"),
    "tensor": ("--parallel.tensor", "2", "--engine.tensor_parallel", "2"),
    "pipeline": ("--parallel.pipeline", "2", "--batch.minibatches", "2"),
}


@pytest.mark.parametrize("layout", TWO_RANKS)
def test_two_ranks_start_where_one_starts(
    config: Path, tmp_path: Path, whole: list[dict[str, Any]], layout: str
) -> None:
    """Two ranks sample the same tokens, so that before the first update all figures of the rollouts agree.

    What torchrun starts as two ranks of data or pipeline parallelism is below and in test_resume.
    """
    overrides = ("--run.steps", "2", *TWO_RANKS[layout])
    two = train(config, *overrides) if layout == "tensor" else train_forked(config, *overrides, ranks=2)
    assert two.returncode == 0, two.stderr[-3000:]
    expected, found = whole[0], metrics(tmp_path / "runs" / "tiny")[0]
    for name in ("reward/mean", "reward/divisors", "response_tokens", "nonzero_advantage/letters", "tokens/trained"):
        assert found[name] == expected[name], name
    assert found["entropy"] == pytest.approx(expected["entropy"], abs=1e-4)
    if "--batch.minibatches" not in overrides:
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
        assert found["loss/cross_domain"] == pytest.approx(expected["loss/cross_domain"], rel=1e-3)


SHORTEST_FIRST = '{ scheduling_policy = "priority", max_logprobs = 2 }'


def test_divided_experts_start_where_whole_ones_do(tmp_path: Path) -> None:
    """And hand the engine every expert, or the engine_check would stop the second run; its choices are replayed."""
    folders = [tmp_path / name for name in ("model", "one", "two")]
    for folder in folders:
        folder.mkdir()
    tiny_run.save_chat_model(folders[0], experts=True)
    rows = []
    for folder, ranks in ((folders[1], 1), (folders[2], 2)):
        overrides = ("--run.steps", "2", "--engine.engine_check_every", "1", "--parallel.expert", str(ranks))
        overrides = (*overrides, "--model.router_replay", "engine", "--engine.options", SHORTEST_FIRST)
        finished = train_forked(write_config(folders[0], folder), *overrides, ranks=ranks)
        assert finished.returncode == 0, finished.stderr[-3000:]
        rows.append(metrics(folder / "runs" / "tiny")[0])
    for name in ("reward/mean", "response_tokens", "tokens/trained"):
        assert rows[0][name] == rows[1][name], name
    for name in ("entropy", "grad_norm", "loss/cross_domain", "moe/load_max_over_mean", "moe/load_entropy"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-3), name


def swap_tensors(number: int) -> None:
    """Exchange two tensors in one weight sync, the `number`-th."""
    honest, calls = reshard_sync.export, []

    def swapped(*args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        calls.append(1)
        other = dict(zip(O_PROJ, reversed(O_PROJ), strict=True)) if len(calls) == number else {}
        for name, tensor in honest(*args, **kwargs):
            yield other.get(name, name), tensor

    reshard_sync.export = swapped


FIRST_SYNC, SECOND_SYNC = 1, 2


@pytest.mark.parametrize(
    ("number", "overrides", "found", "num_steps"),
    [
        (FIRST_SYNC, [], "does not hold what the trainer sent", 0),
        (SECOND_SYNC, ["--engine.verify_sync", "true"], "does not hold what the trainer sent", 0),
        (SECOND_SYNC, ["--engine.engine_check_every", "1"], "engine/trainer log-prob mismatch", 1),
    ],
    ids=["first sync", "every sync", "engine check"],
)
def test_swapped_tensors_stop_the_run_and_are_named(
    config: Path, tmp_path: Path, number: int, overrides: list[str], found: str, num_steps: int
) -> None:
    stopped = train_forked(config, *overrides, ranks=2, prepare=partial(swap_tensors, number))
    assert stopped.returncode == 1
    errors = [
        line
        for line in stopped.stderr.splitlines()
        if line.startswith("megatron_mcpo.trainer.engine_check.EngineCheckError")
    ]
    assert len(errors) == 2 and len(set(errors)) == 1, "the same on each rank"
    assert [words for words in (found, *O_PROJ) if words not in errors[0]] == [], errors
    log = tmp_path / "runs" / "tiny" / "metrics.jsonl"
    assert len(log.read_text().splitlines() if log.exists() else []) == num_steps


@needs_fp8
def test_an_engine_with_fp8_weights(config: Path, tmp_path: Path) -> None:
    fp8 = ("--engine.quantization", "fp8_per_block", "--model.dtype", "bf16", "--engine.verify_sync", "true")
    finished = train_forked(
        config, "--run.steps", "2", "--engine.engine_check_every", "1", "--evaluation.every", "9", *fp8
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert len(re.findall(r"weight sync verified: 20/20 tensors identical \(", finished.stdout)) == 3
    rows = metrics(tmp_path / "runs" / "tiny")
    assert len(rows) == 2
    for row in rows:
        assert row["update/applied"] == 1.0
        assert [name for name, value in row.items() if value is None or not math.isfinite(value)] == []
        assert row["engine/logprob_diff_mean"] > 1e-3, "the engine's weights were rounded"


def test_every_weight_sync_is_verified_when_asked_for(config: Path) -> None:
    finished = train_forked(config, "--run.steps", "2", "--engine.verify_sync", "true", "--evaluation.every", "9")
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert len(re.findall(r"weight sync verified: 20/20 tensors identical \(", finished.stdout)) == 3


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--rollout.max_prompt_tokens", "9"], ["divisors", "letters", "68 too long", "max_prompt_tokens allows 9"]),
        (["--run.dir", "CONFIG"], ["run.dir", "must be a folder that can be written"]),
    ],
    ids=["long prompt", "run folder"],
)
def test_what_only_the_ranks_can_see_is_refused_too(
    config: Path, tmp_path: Path, overrides: list[str], words: list[str]
) -> None:
    overrides = [str(config) if text == "CONFIG" else text for text in overrides]
    refused = train_forked(config, "--parallel.data", "2", *overrides, ranks=2)
    assert refused.returncode == 2, refused.stderr[-3000:]
    assert "Traceback" not in refused.stderr
    assert [word for word in words if word not in refused.stderr] == [], refused.stderr
    assert not (tmp_path / "runs" / "tiny").exists(), "a corrected configuration would find the name taken"


@pytest.mark.parametrize("late", ["0", "none"], ids=["the first rank starts late", "all at once"])
def test_what_ranks_refuse_is_all_that_their_launcher_says(config: Path, tmp_path: Path, late: str) -> None:
    """Three ranks are started of a layout of two, which each of them finds out before it imports torch.

    torchrun ends all of them as soon as one has ended, also the one that is to say why.
    """
    arguments = [str(config), "--parallel.data", "2"]
    code = f"import sys; from megatron_mcpo.cli.launch import launch; sys.exit(launch('train', {arguments}, 3))"
    (tmp_path / "sitecustomize.py").write_text(
        f"import os, time\nif os.environ.get('LOCAL_RANK') == {late!r}:\n    time.sleep(4)\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    refused = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert (refused.returncode, refused.stdout) == (2, ""), refused.stderr
    assert "needs 2 ranks, there are 3" in refused.stderr and refused.stderr.count("\n") == 1, refused.stderr


def ruinous(lr: float) -> list[str]:
    """A run whose first update ruins the model."""
    return ["--optimizer.lr", str(lr), "--run.steps", "12", "--engine.engine_check_every", "99"]


def test_a_run_whose_updates_are_never_finite_stops(config: Path, tmp_path: Path) -> None:
    off = ["--contrastive.cross_domain_weight", "0", "--contrastive.in_domain_weight", "0"]
    lost = train_forked(config, *ruinous(1e30), *off)
    assert lost.returncode == 1, lost.stderr[-3000:]
    assert "step 6: the last 5 updates were skipped" in lost.stderr
    assert len(metrics(tmp_path / "runs" / "tiny")) == 6, "they are on file"


def test_representations_that_are_not_finite_stop_a_run_and_nothing_hangs(config: Path, tmp_path: Path) -> None:
    lost = train(config, *ruinous(1e39), "--parallel.data", "2")
    assert lost.returncode == 1, lost.stderr[-3000:]
    error = (
        "step 2: representations of 32 of 32 rollouts are not finite (data-parallel ranks [0, 1], "
        "domains divisors, letters); start again"
    )
    assert lost.stderr.count(error) == 1 and "Traceback" not in lost.stderr, lost.stderr[-3000:]
    assert len(metrics(tmp_path / "runs" / "tiny")) == 1, "the first step was sound"


METHODS = {
    "clipo": (
        *("--contrastive.mode=reward", "--contrastive.cross_domain_weight=0"),
        *("--contrastive.in_domain_scope=prompt", "--contrastive.negatives=prompt"),
    ),
    "gspo": (
        *("--algorithm.clip=gspo", "--batch.minibatches=2"),
        *("--algorithm.aggregation=seq_mean_token_mean", "--algorithm.advantage=rloo"),
    ),
    "mlp": (
        *("--contrastive.head=mlp", "--contrastive.pool=last", "--contrastive.center=prompt"),
        "--contrastive.diagnose_every=1",
    ),
    "cispo": (  # without terms: the old log-probs are those of the update's own forward pass
        *("--algorithm.clip=cispo", "--algorithm.importance=mask"),
        *("--algorithm.kl_estimator=k2", "--algorithm.advantage=per_domain"),
        *("--contrastive.cross_domain_weight=0", "--contrastive.in_domain_weight=0"),
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_go_the_whole_road(
    config: Path, tmp_path: Path, whole: list[dict[str, Any]], method: str
) -> None:
    """That each computes what it should is for the tests of its parts; here all of it is put together."""
    finished = train_forked(config, "--run.steps", "2", "--evaluation.every", "99", *METHODS[method])
    assert finished.returncode == 0, finished.stderr[-3000:]
    rows = metrics(tmp_path / "runs" / "tiny")
    assert len(rows) == 2
    for row in rows:
        assert row["update/applied"] == 1.0
        assert [name for name, value in row.items() if value is None or not math.isfinite(value)] == []
    assert rows[0]["reward/mean"] == whole[0]["reward/mean"], "the same weights have sampled"
    gradients = {f"gradient/{name}_{term}" for name in ("z", "trunk", "cos") for term in ("cross_domain", "in_domain")}
    assert {name for name in rows[0] if name.startswith("gradient/")} == (
        gradients | {"gradient/trunk_policy"} if method == "mlp" else set()
    )
    if method == "mlp":
        assert all(
            abs(row[f"gradient/cos_{term}"]) <= 1 + 1e-6 for row in rows for term in ("cross_domain", "in_domain")
        )
        assert rows[0]["gradient/trunk_cross_domain"] > 0 and rows[0]["gradient/z_cross_domain"] > 0
    first = (tmp_path / "runs" / "tiny" / "rollouts" / "step_000001.jsonl").read_text().splitlines()
    assert len(first) == 32
    assert {row["minibatch"] for row in map(json.loads, first)} == ({0, 1} if method == "gspo" else {0})
