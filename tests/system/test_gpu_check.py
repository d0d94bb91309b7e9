"""The checks for a GPU, as far as a CPU can run them: their logic on small models, the driver, its table and files.

Not covered: any figure of a GPU, Transformer Engine, the rows of speed and of vLLM (tests/gpu).
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from benchmarks.gpu import engine, layouts, numbers, run
from benchmarks.gpu.models import SMALL
from benchmarks.gpu.outcome import Band, Outcome, Row
from benchmarks.gpu.run import check, table, write
from megatron_mcpo.config.environment import vllm_on_cpu
from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.distributed.device import why_no_gpu
from megatron_mcpo.planner import hardware
from tests.support import families
from tests.support.ranks import run_ranks


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


@pytest.mark.parametrize("row", [numbers.logprobs, layouts.gradients, numbers.recompute])
def test_numbers_stay_in_their_bands_in_bf16(row: Callable[[], Outcome]) -> None:
    (outcome,) = run_ranks(1, row, timeout=540)
    assert outcome.bands and outcome.failures == []


def test_layouts_are_tried_on_ranks_of_their_own() -> None:
    outcome = layouts.experts()
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


def test_a_checkpoint_comes_back() -> None:
    (outcome,) = run_ranks(1, engine.checkpoint, timeout=540)
    assert outcome.failures == []


def test_a_conversion_comes_back() -> None:
    outcome = engine.conversion()
    assert len(outcome.bands) == 2 and outcome.failures == []


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
    assert (cut["state"], cut["why"]) == ("failed", "took more than 1 s (all that was left)")
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
    text = table({"first": failed, "second": crashed, "third": lacking, "fourth": cannot})
    assert "first                failed   error = 2" in text and text.endswith("0 passed, 2 failed, 2 skipped")


def test_rows_of_fp8_say_why_they_are_skipped() -> None:
    (outcome,) = run_ranks(1, numbers.fp8)
    assert "needs a GPU, and there is none" in outcome.skipped


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
    assert run.main(["--out", str(tmp_path), "--resume", str(file), "--rows", *states]) == 1
    assert ran == ["logprobs"] and "1 passed, 1 failed, 1 skipped" in capsys.readouterr().out
    monkeypatch.setattr(run.torch.cuda, "get_device_name", lambda: "H100")
    assert run.main(["--resume", str(file)]) == 2
    assert "must be what a check of this H100 wrote" in capsys.readouterr().err


def test_without_a_gpu_it_says_so_and_lists_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([]) == 2
    assert f"gpu_check: {why_no_gpu()}\n" == capsys.readouterr().err
    assert ("environment is the CPU one" if vllm_on_cpu() else "no CUDA device") in why_no_gpu()
    assert run.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(run.ROWS)
    assert sum(row.seconds for row in run.ROWS.values()) <= 60 * 60, "the limits, thrice what is due"
