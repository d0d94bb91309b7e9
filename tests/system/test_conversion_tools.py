"""The conversion tools as a user calls them: what they say, their exit codes, what they find wrong.

The conversion itself: test_convert.py.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_mcpo.cli import convert_check, convert_to_megatron
from megatron_mcpo.convert import compare as comparing
from megatron_mcpo.convert import convert
from megatron_mcpo.convert.convert import hf_to_megatron, megatron_to_hf
from tests.support.conversion import make_model, program, quiet, same, save_folder, sizes, tensors
from tests.support.paths import ROOT

EMBEDDED = ROOT / ".cache" / "models" / "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "source", "qwen3", "bfloat16")


def test_the_tools_convert_and_say_so(source: Path, tmp_path: Path) -> None:
    """In the types that are asked for."""
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    first = program("to-megatron", source, megatron, "--tp", 2, "--pp", 2, "--vpp", 2)
    assert (first.returncode, first.stderr) == (0, "")
    assert "logits against transformers: largest difference" in first.stdout
    second = program("to-hf", megatron, back, "--dtype", "fp32")
    assert (second.returncode, second.stderr) == (0, "")
    assert "weights: widened from bfloat16\n" in second.stdout
    assert "logits against transformers: largest difference" in second.stdout
    assert same(tensors(back), {name: values.float() for name, values in tensors(source).items()})
    assert json.loads((back / "config.json").read_text())["dtype"] == "float32"


def test_the_round_trip_is_checked_in_several_layouts(source: Path) -> None:
    checked = program("check", source, "--layouts", "tp2,pp2vpp2", "--json")
    assert checked.returncode == 0, checked.stderr
    rows = [json.loads(line) for line in checked.stdout.splitlines()]
    assert [(row["layout"], row["tensors"], row["bits"]) for row in rows] == [("tp2", 47, 0), ("pp2vpp2", 47, 0)]
    assert all(0 < row["logits"] < 1e-4 for row in rows)
    assert sorted(path.name for path in source.parent.iterdir()) == ["source"]


def test_the_embedded_model_goes_there_and_back(tmp_path: Path) -> None:
    checked = program("check", EMBEDDED, "--layouts", "tp3pp2", "--json", "--work", tmp_path)
    assert checked.returncode == 0, checked.stderr
    row = json.loads(checked.stdout)
    assert (row["tensors"], row["bits"]) == (272, 0) and 0 < row["logits"] < 1e-4
    assert list(tmp_path.iterdir()) == []


def test_what_a_conversion_gets_wrong_is_counted(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the conversion itself, and by the last comparison, of the first folder with the last."""
    whole = convert.write_safetensors

    def flip_a_bit(path: Path, *arguments: Any) -> None:
        whole(path, *arguments)
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    arguments = [str(source), "--layouts", "tp2", "--json", "--work", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(convert, "write_safetensors", flip_a_bit)
        assert convert_check.main(arguments) == 1
    row = json.loads(capsys.readouterr().out)
    assert row["bits"] == 1 and row["problems"][1].endswith(": 1 bits differ")

    def flip_afterwards(*given: Any, **options: Any) -> None:
        megatron_to_hf(*given, **options)
        file = given[1] / "model.safetensors"
        flipped = file.read_bytes()
        file.write_bytes(flipped[:-1] + bytes([flipped[-1] ^ 1]))

    monkeypatch.setattr(convert_check, "megatron_to_hf", flip_afterwards)
    monkeypatch.setattr(comparing, "SMALL_BYTES", 0)
    assert convert_check.main(arguments) == 1
    row = json.loads(capsys.readouterr().out)
    assert row["bits"] == 1 and row["problems"][0].endswith(": 1 bits differ")


@pytest.mark.parametrize("option", ["--tp", "--pp", "--vpp", "--ep"])
@pytest.mark.parametrize("value", ["0", "-1", "two"])
def test_sizes_are_whole_numbers(source: Path, tmp_path: Path, capsys: Any, option: str, value: str) -> None:
    with pytest.raises(SystemExit) as left:
        convert_to_megatron.main([str(source), str(tmp_path / "out"), option, value])
    assert left.value.code == 2 and "must be a whole number from 1 up" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_are_left_out_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tied = make_model(tmp_path / "tied", "qwen2", "bfloat16", num_hidden_layers=1)
    rotary, head = "model.layers.0.self_attn.rotary_emb.inv_freq", "lm_head.weight"
    found = tensors(tied)
    extra = {rotary: torch.ones(8), head: found["model.embed_tokens.weight"].clone()}
    given = save_folder(tied, tmp_path / "given", found | extra)
    for source, out in ((tied, "a"), (given, "b")):
        assert convert_to_megatron.main([str(source), str(tmp_path / out), "--no-verify-forward"]) == 0
    first, *_, second, left_out = capsys.readouterr().out.splitlines()[-4:]
    assert "every bit as in" in second and "left out" not in first
    assert left_out.startswith(f"left out: {head}, {rotary} (rotary frequencies are computed")


def test_what_is_left_behind_or_unchecked_is_said(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = save_folder(source, tmp_path / "given", tensors(source))
    (given / "additional_chat_templates").mkdir()
    hf_to_megatron(given, tmp_path / "megatron", sizes(), verify_forward=False, say=quiet)
    assert "additional_chat_templates: is not copied" in caplog.text
    for name in ("manifest.json", "conversion.json"):
        (tmp_path / "megatron" / name).unlink()
    megatron_to_hf(tmp_path / "megatron", tmp_path / "out", verify_forward=False, say=quiet)
    assert "has no manifest.json, so its files are not checked for damage" in caplog.text
