"""The checks for a GPU, as far as a CPU can run them: their logic on small models, the driver, its table and files.

Not covered: any figure of a GPU, Transformer Engine, and the rows that start whole programs or servers, which
`tools/gpu_check.sh --rehearse` runs on a CPU.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.gpu import checkpoints, models, numbers, program, run, speed
from benchmarks.gpu.hash_verifier import score
from benchmarks.gpu.models import SMALL
from benchmarks.gpu.outcome import Band, Outcome, Row, Target
from benchmarks.gpu.results import write
from benchmarks.gpu.rows import ROWS
from benchmarks.gpu.run import check, table
from megatron_mcpo.config.environment import vllm_on_cpu
from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.distributed.device import why_no_gpu
from megatron_mcpo.planner import hardware
from tests.support import families
from tests.support.ranks import run_ranks

HASHED = [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0]
"""Rewards of eight responses, the same on every machine and in every process."""


def test_a_band_has_two_ends_and_no_room_for_nan() -> None:
    outcome = Outcome(
        bands=(
            Band(name="in", value=0.5, low=0.5, high=1.0),
            Band(name="off", value=0.0, low=1e-4, high=1.0),
            Band(name="broken", value=math.nan, low=0.0, high=1.0),
        )
    )
    assert [each.split(" =")[0] for each in outcome.failures] == ["off", "broken"]
    assert json.loads(outcome.to_json())["bands"]["broken"][0] == "nan"


def test_a_target_that_is_missed_is_said_and_fails_nothing() -> None:
    targets = (
        Target(name="MFU", value=0.41, goal=0.45, at_least=True),
        Target(name="seconds", value=0.02, goal=0.02, at_least=False),
        Target(name="unknown", value=math.nan, goal=1.0, at_least=True),
    )
    outcome = json.loads(Outcome(targets=targets).to_json())
    assert outcome["failures"] == []
    assert outcome["targets"] == {
        "MFU": [0.41, "target >= 0.45: missed"],
        "seconds": [0.02, "target <= 0.02: reached"],
        "unknown": ["nan", "target >= 1: missed"],
    }


@pytest.mark.parametrize(
    "name",
    ["logprobs", "gradients", "recompute", "offload", "grouped_experts", "logprob", "export", "checkpoint", "engine"],
)
def test_rows_stay_in_their_bands_in_bf16_and_state_their_layers(name: str) -> None:
    (outcome,) = run_ranks(1, ROWS[name].run, timeout=540)
    assert outcome.bands and outcome.failures == []
    assert outcome.figures.get("layers") == (None if name == "logprob" else "torch")


@pytest.mark.parametrize("row", [numbers.short_rollouts, speed.ceilings, speed.contrastive_terms, speed.step_1_7b])
def test_rows_that_only_measure_run_on_a_cpu(row: Callable[[], Outcome]) -> None:
    (outcome,) = run_ranks(1, row, timeout=540)
    assert outcome.failures == [] and outcome.targets == ()
    assert outcome.figures and all(isinstance(value, float) and value > 0 for value in outcome.figures.values())


def test_layouts_are_tried_on_ranks_of_their_own() -> None:
    outcome = ROWS["experts"].run()
    assert outcome.figures["layers"] == "torch"
    assert [band.name for band in outcome.bands[::3]] == ["dp2 least cosine", "ep2 least cosine"]
    assert outcome.failures == []


def test_a_wrong_gradient_leaves_the_band(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = numbers.signed_loss

    def half(batch):  # type: ignore[no-untyped-def]
        loss = honest(batch)
        return lambda x: (loss(x)[0] * 0.5, loss(x)[1])

    learned = iter([honest, half, half])
    monkeypatch.setattr(numbers, "signed_loss", lambda batch: next(learned)(batch))
    (outcome,) = run_ranks(1, numbers.recompute, timeout=540)
    assert len(outcome.failures) == 2


def test_a_process_finds_what_differs_in_the_checkpoint_of_the_one_before(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    models.save_model(tmp_path / "model", SMALL, dtype=torch.bfloat16)
    for step in ("0", "1"):
        run_ranks(1, checkpoints.main, [str(tmp_path), step])
    found = json.loads((tmp_path / "1.json").read_text())
    assert (found["layers"], found["updates"]) == ("torch", 1)
    assert found["different"] == {"weights": 0, "states of the optimizer": 0}
    before = json.loads((tmp_path / "1.json").read_text())
    before["state"]["states of the optimizer"][5] = "another"
    (tmp_path / "1.json").write_text(json.dumps(before))
    run_ranks(1, checkpoints.main, [str(tmp_path), "2"])
    assert json.loads((tmp_path / "2.json").read_text())["different"] == {"weights": 0, "states of the optimizer": 1}


def test_a_conversion_comes_back() -> None:
    outcome = checkpoints.conversion()
    assert len(outcome.bands) == 2 and outcome.failures == []


def test_rewards_are_a_hash_of_the_text() -> None:
    rewards = [score({"question": "2 + 2?"}, f"response {number}") for number in range(200)]
    assert rewards[:8] == HASHED and 70 < sum(rewards) < 130
    assert score({"question": "3 + 3?"}, "response 0") in (0.0, 1.0)


def test_a_resumed_run_is_compared_in_the_figures_that_must_not_differ() -> None:
    steps = [{"step": n, "reward/mean": 0.5, "loss/policy": 0.1, "time/step": float(n)} for n in range(1, 7)]
    resumed = [{**step, "time/step": 9.0} for step in steps]
    bands, found = program._same_figures(steps, resumed)
    assert [band.value for band in bands] == [0, 0] and found == {"resumed: figures that differ": 0}
    resumed[3] |= {"loss/policy": 0.2}
    resumed[5] |= {"reward/mean": 0.4}
    bands, _ = program._same_figures(steps, resumed)
    assert [band.value for band in bands] == [0, 2]
    resumed[3] |= {"reward/mean": 0.4}
    bands, _ = program._same_figures(steps, resumed)
    assert [band.holds for band in bands] == [False, False]


def test_a_step_has_the_flops_of_its_parameters() -> None:
    """Six for every weight of a layer and token, three times the causal half of both attention products."""
    from benchmarks.gpu.speed import training_flops
    from tests.support.tiny_models import VOCAB  # noqa: F401 - the package of shapes imports without a GPU

    model = _model()
    hidden, heads = SMALL.hidden, SMALL.heads * SMALL.head_dim
    weights = 2 * hidden * heads + 2 * hidden * SMALL.kv_heads * SMALL.head_dim + 3 * hidden * SMALL.ffn
    expected = 6 * 100 * SMALL.layers * weights + 3 * SMALL.layers * 4 * heads * 100**2 / 2
    expected += 6 * 40 * hidden * SMALL.vocab
    assert training_flops(model, rollouts=1, length=100, response=40) == pytest.approx(expected, rel=1e-6)


def _model() -> ModelConfig:
    return replace(
        families.MODEL,
        num_layers=SMALL.layers,
        hidden_size=SMALL.hidden,
        ffn_hidden_size=SMALL.ffn,
        num_heads=SMALL.heads,
        num_kv_heads=SMALL.kv_heads,
        head_dim=SMALL.head_dim,
        vocab_size=SMALL.vocab,
    )


def answering(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_a_row_that_crashes_hangs_or_lacks_a_module_is_said_to() -> None:
    row = Row(name="row", run=Outcome, seconds=20)
    outcome = Outcome(bands=(Band(name="error", value=2.0, low=0.0, high=1.0),), figures={"seconds": 0.5})
    failed = check(row, answering(f"print('noise'); print({outcome.to_json()!r}); print('[]'); print('bye')"))
    assert (failed["state"], failed["why"]) == ("failed", "error = 2, must lie in 0 .. 1")
    crashed = check(row, answering("raise SystemExit('out of memory')"))
    assert (crashed["state"], crashed["why"]) == ("failed", "exit code 1: out of memory")
    assert crashed["log"] == "out of memory\n"
    hanging = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    others = psutil.Process().children(recursive=True)  # earlier tests' fork servers
    slow = check(Row(name="row", run=Outcome, seconds=1), answering(hanging))
    assert (slow["state"], slow["why"]) == ("failed", "took more than 1 s")
    assert set(psutil.Process().children(recursive=True)) <= set(others)
    cut = check(row, answering("import time; time.sleep(60)"), seconds_left=1.2)
    assert (cut["state"], cut["why"]) == ("skipped", "takes more than the 1 s that were left")
    late = check(row, answering("raise SystemExit('started')"), seconds_left=0)
    assert late["state"] == "skipped" and "took all the time" in late["why"]
    lacking = check(Row(name="row", run=Outcome, seconds=1, needs=("no_such_module",)), answering(""))
    assert (lacking["state"], lacking["why"]) == ("skipped", "no_such_module not installed")
    old = check(Row(name="row", run=Outcome, seconds=1, oldest=(("vllm", "99.1"),)), answering(""))
    assert old["state"] == "skipped" and old["why"].startswith("needs vllm 99.1, this is 0.")
    assert (
        check(Row(name="row", run=Outcome, seconds=20, oldest=(("vllm", "0.20"),)), answering("1"))["state"] == "failed"
    )
    cannot = check(row, answering(f"print({Outcome(skipped='no FP8 here').to_json()!r})"))
    assert (cannot["state"], cannot["why"]) == ("skipped", "no FP8 here")
    missed = Outcome(targets=(Target(name="MFU", value=0.41, goal=0.45, at_least=True),))
    fifth = check(row, answering(f"print({missed.to_json()!r})"))
    assert fifth["state"] == "passed"
    unknown = Outcome(targets=(Target(name="MFU", value=math.nan, goal=0.45, at_least=True),))
    assert "MFU nan (target >= 0.45: missed)" in table({"row": check(row, answering(f"print({unknown.to_json()!r})"))})
    text = table({"first": failed, "second": crashed, "third": lacking, "fourth": cannot, "fifth": fifth})
    assert "fifth                passed   MFU 0.41 (target >= 0.45: missed)" in text
    assert "first                failed   error = 2" in text and text.endswith("1 passed, 2 failed, 2 skipped")


_DETACHES = """
import os, subprocess, sys, time
print({outcome!r}, flush=True)
child = subprocess.Popen(["setsid", "sh", "-c", "sleep 61.5 & wait"])
while os.getsid(child.pid) == os.getsid(0):
    time.sleep(0.01)
time.sleep({seconds})
"""


@pytest.mark.parametrize(
    ("seconds", "state", "why"),
    [(0, "passed", ""), (60, "failed", "took more than 2 s, though it has printed what it found")],
)
def test_what_a_row_leaves_behind_neither_delays_nor_fails_it(seconds: int, state: str, why: str) -> None:
    """A process in a session of its own keeps standard output open, and has no parent once the row has ended."""
    others = set(psutil.Process().children(recursive=True))
    printed = Outcome(figures={"seconds": 0.5}).to_json()
    start = time.monotonic()
    row = Row(name="row", run=Outcome, seconds=2)
    result = check(row, answering(_DETACHES.format(outcome=printed, seconds=seconds)))
    assert time.monotonic() - start < 5
    assert (result["state"], result["why"], result["figures"]) == (state, why, {"seconds": 0.5})
    assert set(psutil.Process().children(recursive=True)) <= others
    assert not [each for each in psutil.process_iter(["cmdline"]) if (each.info["cmdline"] or [])[1:] == ["61.5"]]


def test_rows_of_fp8_say_why_they_are_skipped() -> None:
    (outcome,) = run_ranks(1, numbers.fp8)
    assert "needs a GPU, and there is none" in outcome.skipped


@pytest.mark.parametrize(("source", "state"), [("raise OSError('no libcudart')", "failed"), ("", "passed")])
def test_a_broken_transformer_engine_fails_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, state: str
) -> None:
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine/__init__.py").write_text(source)
    (tmp_path / "transformer_engine/pytorch.py").touch()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    result = check(ROWS["environment"], [sys.executable, "-m", "benchmarks.gpu.run", "--here", "--rows", "environment"])
    assert result["state"] == state, result["why"]
    assert ("(OSError: no libcudart)" in result["figures"]["transformer-engine"]) == (state == "failed")


def test_the_planner_takes_the_rates_that_were_measured(tmp_path: Path) -> None:
    rates = {"gemm_tflops": 700.0, "copy_tbs": 2.9}
    results = {"ceilings": {"state": "passed", "why": "", "rates": rates}}
    figures, measured = write(results, "NVIDIA H100 80GB HBM3", tmp_path)
    assert figures.name == "gpu-nvidia-h100-80gb-hbm3.json"
    assert json.loads(figures.read_text())["rows"] == results
    gpu = hardware.load(str(measured))
    assert (gpu.gemm_tflops, gpu.copy_tbs, gpu.nvlink_gbs) == (700.0, 2.9, hardware.H100.nvlink_gbs)


def test_rows_are_written_one_by_one_and_are_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []
    states = {"environment": "passed", "ceilings": "failed", "logprobs": "skipped"}

    def fake(row: Row, command: list[str], *, seconds_left: float) -> dict[str, str]:
        ran.append(row.name)
        if row.name == "gradients":
            raise KeyboardInterrupt
        return {"state": states[row.name], "why": f"{seconds_left:.0f}"}

    monkeypatch.setattr(run, "uses_gpu", lambda: True)
    monkeypatch.setattr(run, "check", fake)
    monkeypatch.setattr(run.torch.cuda, "get_device_name", lambda: "H200")
    with pytest.raises(KeyboardInterrupt):
        run.main(["--out", str(tmp_path), "--seconds", "70", "--rows", *states, "gradients"])
    file = tmp_path / "gpu-h200.json"
    kept = json.loads(file.read_text())["rows"]
    assert {name: row["state"] for name, row in kept.items()} == states and kept["environment"]["why"] == "70"
    ran.clear()
    monkeypatch.setattr(run, "ROWS", {name: run.ROWS[name] for name in states})
    assert run.main(["--out", str(tmp_path), "--resume", str(file)]) == 1
    assert ran == ["logprobs"] and "1 passed, 1 failed, 1 skipped" in capsys.readouterr().out
    monkeypatch.setattr(run.torch.cuda, "get_device_name", lambda: "H100")
    assert run.main(["--resume", str(file), "--out", str(tmp_path)]) == 2
    assert "must be what a check of this H100 wrote" in capsys.readouterr().err


def fake_rows(monkeypatch: pytest.MonkeyPatch, states: dict[str, str]) -> list[str]:
    """Let the rows of a check on an "H200" end in these states at once; return the list of those that were run."""
    ran: list[str] = []

    def fake(row: Row, command: list[str], *, seconds_left: float) -> dict[str, str]:
        ran.append(row.name)
        return {"state": states[row.name], "why": ""}

    monkeypatch.setattr(run, "uses_gpu", lambda: True)
    monkeypatch.setattr(run, "check", fake)
    monkeypatch.setattr(run.torch.cuda, "get_device_name", lambda: "H200")
    return ran


def states_in(file: Path) -> dict[str, str]:
    return {name: row["state"] for name, row in json.loads(file.read_text())["rows"].items()}


def test_results_of_earlier_checks_are_kept_and_named_rows_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    states = {"environment": "passed", "ceilings": "failed", "logprobs": "passed"}
    ran, out, file = fake_rows(monkeypatch, states), ["--out", str(tmp_path)], tmp_path / "gpu-h200.json"
    assert run.main([*out, "--rows", "logprobs", "ceilings", "environment"]) == 1
    assert run.main([*out, "--rows", "environment"]) == 0
    assert list(states_in(file).items()) == list(states.items())
    said = capsys.readouterr().out
    assert "1 passed, 0 failed" in said and "also has 2 rows of earlier checks: ceilings, logprobs" in said
    ran.clear()
    states |= {"ceilings": "passed", "logprobs": "skipped"}
    assert run.main([*out, "--rows", "ceilings", "logprobs", "--resume", str(file)]) == 0
    assert ran == ["ceilings", "logprobs"]
    assert states_in(file) == {"environment": "passed", "ceilings": "passed", "logprobs": "passed"}


def test_a_check_that_ran_nothing_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_rows(monkeypatch, {"fp8": "skipped", "fp8_products": "skipped"})
    assert run.main(["--out", str(tmp_path), "--rows", "fp8", "fp8_products"]) == 3
    assert "no row was run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("[", "Expecting value"),
        ("\xff", "can't decode"),
        ("[]", "another device"),
        ('{"device": "H200"}', "no table of rows"),
        ('{"device": "H200", "rows": []}', "no table of rows"),
        ('{"device": "H200", "rows": {"fp8": {"why": ""}}}', "incomplete: fp8"),
        ('{"device": "H200", "rows": {"fp8": {"state": "failed"}}}', "incomplete: fp8"),
        ('{"device": "H200", "rows": {"fp8": {"state": "failed", "why": "", "bands": {"x": 1}}}}', "incomplete: fp8"),
    ],
)
def test_a_file_that_is_no_result_is_refused_before_a_row_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: str, why: str
) -> None:
    ran = fake_rows(monkeypatch, {})
    file = tmp_path / "gpu-h200.json"
    file.write_text(content, encoding="latin-1")
    for arguments in (["--out", str(tmp_path)], ["--resume", str(file), "--out", str(tmp_path / "new")]):
        assert run.main(arguments) == 2
        said = capsys.readouterr().err
        assert str(file) in said and why in said and ran == []
    assert file.read_text(encoding="latin-1") == content


def test_a_folder_that_takes_no_file_is_refused_before_a_row_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = fake_rows(monkeypatch, {})
    (tmp_path / "file").touch()
    for folder in (str(tmp_path / "file"), str(tmp_path / "file" / "x"), "/proc/x"):
        assert run.main(["--out", folder]) == 2
        assert folder in capsys.readouterr().err and ran == []


def test_without_a_gpu_it_says_so_and_lists_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([]) == 2
    assert f"gpu_check: {why_no_gpu()}\n" == capsys.readouterr().err
    assert ("environment is the CPU one" if vllm_on_cpu() else "no CUDA device") in why_no_gpu()
    assert run.main(["--list"]) == 0
    *rows, last = capsys.readouterr().out.splitlines()
    limits = [row.seconds for row in run.ROWS.values()]
    assert len(rows) == len(limits) and last == f"{len(limits)} rows, at most {sum(limits)} s"
    assert max(limits) <= 9 * 60, "some machines are lent for ten minutes"
    assert sum(limits) <= 2 * run.SECONDS, "the limits, thrice what is due"


def test_rows_are_rehearsed_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--rehearse", "--rows", "environment", "ceilings", "fp8", "--out", str(tmp_path)]) == 0
    assert "2 passed, 0 failed, 1 skipped" in capsys.readouterr().out
    (file,) = tmp_path.iterdir()  # and no rates, which a plan could be made of
    found = json.loads(file.read_text())
    assert found["device"] == "rehearsal on a CPU" and found["rows"]["environment"]["state"] == "passed"
