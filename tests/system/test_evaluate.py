"""Evaluating a model, a run's checkpoint and a Hugging Face folder: the very figures that the run logged.

Real ranks, Megatron-Core, vLLM and verifiers. Not covered here: the formulas (test_accuracy), servers, GPUs.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_mcpo.cli.evaluate import main
from megatron_mcpo.config.domain_schema import DomainConfig
from megatron_mcpo.convert.convert import megatron_to_hf
from megatron_mcpo.reporting.accuracy import majority_is_correct
from megatron_mcpo.trainer.evaluation import answer, item_of, voting_kind
from megatron_mcpo.types import StopReason
from tests.support.conversion import quiet
from tests.support.paths import ROOT
from tests.support.program import Finished, forked, train_forked, write_config
from tests.support.scoring import completion, group

SLOWER = ("--optimizer.lr", "1e-3")
"""A run that learns faster may lose all it knew, on one processor or another."""
SAMPLED = ("--evaluation.samples", "4", "--evaluation.temperature", "1")


@pytest.fixture(scope="module")
def config(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a finished run that was evaluated, and kept, after 0, 3 and 6 steps (0: evaluated alone)."""
    config = write_config(model, tmp_path_factory.mktemp("run"))
    every = ("--evaluation.every", "3", "--run.checkpoint_every", "3", *SLOWER)
    finished = train_forked(config, *every, *SAMPLED)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return config


@pytest.fixture(scope="module")
def logged(config: Path) -> dict[int, dict[str, Any]]:
    """The run's evaluations without the probe, whose figures are of rollouts of the training."""
    rows = [json.loads(line) for line in (config.parent / "runs" / "tiny" / "eval.jsonl").read_text().splitlines()]
    return {row["step"]: {key: row[key] for key in row if not key.startswith("contrast/probe_")} for row in rows}


def checkpoint(config: Path, step: int) -> Path:
    return config.parent / "runs" / "tiny" / "checkpoints" / f"step_{step:06d}"


def evaluated(finished: Finished) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures that stand in an eval.jsonl too, and what else there is; nothing but the object may be printed."""
    assert finished.returncode == 0, finished.stderr[-3000:]
    row = json.loads(finished.stdout)
    others = {key: value for key, value in row.items() if key.startswith(("about/", "transfer/", "forgetting/"))}
    return {key: value for key, value in row.items() if key not in others}, others


def test_a_run_logs_figures_of_several_responses(logged: dict[int, dict[str, Any]]) -> None:
    assert list(logged) == [0, 3, 6]
    assert len({json.dumps({**row, "step": None}) for row in logged.values()}) == 3, "the model has changed"
    for row in logged.values():
        for name in ("divisors", "letters", "mean"):
            assert row[name] <= row[f"pass_at_2/{name}"] <= row[f"pass_at_4/{name}"]
            assert row[f"accuracy_low/{name}"] <= row[name] <= row[f"accuracy_high/{name}"]
            # Where some items were answered right and others never, they differ, and bounds are no point.
            differ = name != "mean" and 0 < row[f"pass_at_4/{name}"] < 1
            assert not differ or row[f"accuracy_low/{name}"] < row[f"accuracy_high/{name}"]
            assert 0 <= row[f"maj_at_4/{name}"] <= row[f"pass_at_4/{name}"]
        assert (row["items/divisors"], row["items/letters"]) == (8, 8)


def test_a_checkpoint_has_the_figures_of_its_step_as_a_user_starts_it(
    config: Path, logged: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    out, baseline = tmp_path / "figures.json", config.parent / "runs" / "tiny" / "eval.jsonl"
    given = ["--checkpoint", checkpoint(config, 3), "--baseline", baseline, "--out", out, "--json", *SAMPLED]
    command = [sys.executable, "-m", "megatron_mcpo", "evaluate", config, *given]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=540)
    found, others = evaluated(finished)
    assert found == logged[3]
    assert json.loads(out.read_text()) == found | others
    assert others["transfer/letters"] == logged[3]["letters"] - logged[6]["letters"]
    assert others["transfer/mean"] == pytest.approx(logged[3]["mean"] - logged[6]["mean"])
    about = {"model": str(checkpoint(config, 3)), "samples": 4, "temperature": 1.0}
    assert {key: others[f"about/{key}"] for key in about} == about
    assert "weight sync verified: 20/20 tensors identical" in finished.stderr


def test_several_ranks_find_the_same(config: Path, logged: dict[int, dict[str, Any]]) -> None:
    """Two engines with half of the items each; the loaded layout is not the run's."""
    given = ("--checkpoint", str(checkpoint(config, 6)), "--json", "--parallel.data", "2", *SAMPLED)
    assert evaluated(forked("evaluate", config, *given, ranks=2))[0] == logged[6]


def test_an_exported_folder_has_the_figures_of_its_checkpoint(
    config: Path, logged: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    megatron_to_hf(checkpoint(config, 6), tmp_path / "hf", verify_forward=False, say=quiet)
    found, _ = evaluated(forked("evaluate", config, "--hf", str(tmp_path / "hf"), "--json", *SAMPLED))
    assert found == {**logged[6], "step": 0}, "of a folder that no run made it is the zeroth"


def test_the_configured_model_is_the_run_before_its_first_step(
    config: Path, logged: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    baseline = tmp_path / "baseline.jsonl"
    baseline.write_text(json.dumps({**logged[0], "letters": 1.0, "items/letters": 32}) + "\n")
    finished = forked("evaluate", config, "--baseline", str(baseline), *SAMPLED)
    assert finished.returncode == 0, finished.stderr[-3000:]
    lines = {line.split()[1]: line for line in finished.stdout.splitlines() if line.startswith("│")}
    fall = logged[0]["letters"] - 1
    for name, changed in (("divisors", 0.0), ("letters", fall), ("mean", fall / 2)):
        row = logged[0]
        bounds = [f"{row[f'accuracy_{bound}/{name}']:.3f}" for bound in ("low", "high")]
        for cell in (f"{row[name]:.3f}", " .. ".join(bounds), f"{row[f'pass_at_4/{name}']:.3f}", f"{changed:+.3f}"):
            assert cell in lines[name], (cell, lines[name])
    assert f"backward transfer {fall / 2:+.3f}, forgetting {-fall / 2:.3f}; fell: letters" in finished.stdout
    assert "WARNING: letters: 32 items in the baseline, 8 here" in finished.stdout


REFUSALS: dict[str, tuple[list[str], list[str]]] = {
    "no checkpoint": (["--checkpoint", "RUN"], ["--checkpoint", "must be a checkpoint of a run", "step_NNNNNN"]),
    "no folder": (["--hf", "nowhere"], ["nowhere", "no such folder"]),
    "sharded": (["--hf", "RUN/checkpoints/step_000006"], ["must not be a sharded checkpoint", "--checkpoint"]),
    "no baseline": (["--baseline", "nowhere"], ["--baseline = 'nowhere'", "no such file"]),
    "empty baseline": (["--baseline", "RUN/config.toml"], ["must hold an evaluation", "eval.jsonl"]),
    "baseline of steps": (["--baseline", "RUN/metrics.jsonl"], ["must have a domain of divisors, letters"]),
    "baseline folder": (["--baseline", "RUN"], ["--baseline", "must be readable"]),
    "out": (["--out", "nowhere/figures.json"], ["--out = 'nowhere/figures.json'", "folder that exists"]),
    "greedy": (["--evaluation.samples", "4"], ["evaluation.samples = 4", "evaluation.temperature"]),
    "items that were trained on": (
        ["--checkpoint", "RUN/checkpoints/step_000006", "--evaluation.items", "9"],
        [
            "evaluation.items = 9",
            "must be at most 8",
            "kept 8 items per domain apart",
            "divisors, letters",
            "held_out_file",
        ],
    ),
    "unknown key": (["--evaluation.sample", "4"], ["evaluation.sample", "Did you mean 'samples'?"]),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input_is_refused_before_ranks_start(config: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    given, words = REFUSALS[name]
    given = [text.replace("RUN", str(config.parent / "runs" / "tiny")) for text in given]
    assert main([str(config), *given]) == 2
    said = capsys.readouterr().err
    assert [word for word in words if word not in said] == [], said


def test_a_damaged_checkpoint_is_refused(config: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "step_000006"
    damaged.mkdir()
    for path in checkpoint(config, 6).iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    file = max(damaged.glob("__*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    refused = forked("evaluate", config, "--checkpoint", str(damaged), *SAMPLED)
    assert refused.returncode == 2, refused.stderr[-3000:]
    assert f"{file.name} is not as it was written" in refused.stderr


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("choice", "I think the answer is (b), a bank.", "B"),
        ("choice", r"\boxed{\text{B}}", "B"),
        ("choice", "The answer is A or B", ""),
        ("numeric", "So it is 1,234 apples.", "1234"),
        ("numeric", r"\boxed{1{,}234.0}", "1234"),
        ("numeric", "#### -0", "0"),
        ("numeric", "50%", "50%"),
        ("numeric", "10^5", ""),
        ("math", r"So \boxed{4} or rather \boxed{\dfrac{1}{2}} it is", r"\frac{1}{2}"),
        ("math", r"Thus $x = \frac{1}{2}$.", r"\frac{1}{2}"),
        ("math", r"So \boxed{4} is not \boxed{5", "4"),
        ("math", "2 + 2 = 4\n#### 4", "4"),
        ("math", "We add $2+2$, which makes 4.0 apples.", "4"),
        ("math", "From $3 to $4", "4"),
        ("math", r"\boxed{x = 1, y = 2}", "x=1,y=2"),
        ("exact", r" It is \boxed{ A  b} ", "A  b"),
        ("exact", " A b ", "A b"),
        ("text", "The  Eiffel tower.", "eiffel tower"),
        ("text", r"So \boxed{an Eiffel-tower}", "eiffeltower"),
        ("", " The  Answer\nis 5 ", "the answer is 5"),
        ("math", "  ", ""),
    ],
)
def test_what_a_response_votes_for(kind: str, text: str, expected: str) -> None:
    assert answer(completion(text), kind) == expected
    assert answer(completion(text, StopReason.LENGTH), kind) == "", "it was cut"


@pytest.mark.parametrize(
    ("kind", "right", "texts"),
    [
        ("choice", "B", ("The answer is A.", "I say: the answer is B", "Answer: (B) bank", "C, or so I think")),
        ("numeric", "42", ("43", "It is 42.", "so 42 apples", "no idea")),
        ("math", "42", ("So it is $43$.", "It is $42$.", "so x = 42.", r"\boxed{44}")),
    ],
)
def test_responses_without_a_box_vote_for_what_their_verifier_takes(
    kind: str, right: str, texts: tuple[str, ...]
) -> None:
    """Of four texts that all differ two give the right answer, and the first a wrong one."""
    scored = replace(group(*texts, verifier=kind, answer=right), correct=(False, True, True, False))
    settings = DomainConfig.model_validate({"name": "d", "sources": [{"file": "a.jsonl"}]})
    assert majority_is_correct(item_of(scored, settings))


def test_the_kind_that_a_vote_goes_by() -> None:
    def kind(entry: dict[str, Any], *kinds: dict[str, Any]) -> str:
        sources = [{"file": "a.jsonl"}]
        return voting_kind(
            DomainConfig.model_validate({"name": "d", "sources": sources, "verifiers": list(kinds)}), entry
        )

    form, length = {"kind": "format", "pattern": "a"}, {"kind": "length", "buffer_tokens": 1}
    assert kind({"verifier": "choice"}) == kind({"verifier": "choice"}, length) == "choice"
    assert kind({"verifier": "choice"}, form, {"kind": "math"}) == "math"
    assert kind({}, {"kind": "judge", "url": "http://a", "model": "m", "prompt": "p"}, {"kind": "text"}) == "text"
    assert kind({"metadata": {"source_dataset": "chain_sum"}}) == kind({"verifier": "code"}) == kind({}, form) == ""
