"""Bad input is refused with exit code 2, the value, the rule and the fix, before anything expensive starts.

Not covered here: the wording of each rule (test_config, test_model_config, test_hf_parity), bad items of generators
(test_data).
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_mcpo.config.config import ConfigError, load
from megatron_mcpo.config.environment import vllm_on_cpu
from megatron_mcpo.data.tokenizer import load_tokenizer
from tests.support import tiny_run
from tests.support.paths import ROOT

CONFIG = """
[run]
steps = 2
[model]
path = "MODEL"
[batch]
prompts = 4
samples = 2
[rollout]
max_prompt_tokens = 64
[optimizer]
lr = 1e-5
[[domain]]
name = "sums"
sources = [{ generator = "chain_sum" }]
[[domain]]
name = "bits"
sources = [{ generator = "count_bits" }]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_run.save_chat_model(folder, trained=False)
    return folder


SLOW = {"torch", "transformers", "vllm", "megatron", "reasoning_gym", "matplotlib"}
"""Packages whose import takes seconds, and which a refusal can do without."""
IMPORT = re.compile(r"^import time: *\d+ \| *\d+ \| *(\w+).*\n", re.MULTILINE)
"""A line of what Python says of an import, with the package."""


def refuse(config: str, folder: Path, *overrides: str) -> str:
    """What the program prints when it refuses. It must do so at once: before it imports anything that takes long."""
    path = folder / "config.toml"
    path.write_text(config)
    command = [sys.executable, "-X", "importtime", "-m", "megatron_mcpo", "train", str(path), *overrides]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    message, imported = IMPORT.sub("", result.stderr), set(IMPORT.findall(result.stderr))
    assert result.returncode == 2, message
    assert "Traceback" not in message
    assert "megatron_mcpo" in imported and not imported & SLOW
    return message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--batch.sample", "4"], ["batch.sample", "unknown", "samples"]),
        (["--optimizer.lr", "fast"], ["optimizer.lr", "fast", "number"]),
        (["--parallel.tensor", "3"], ["parallel.tensor", "3", "heads"]),
        (["--parallel.pipeline", "3"], ["parallel.pipeline", "3", "layers"]),
        (["--model.path", "no/such/folder"], ["no/such/folder", "config.json"]),
        (["--rollout.max_prompt_tokens", "9999"], ["batch.micro_batch_tokens", "rollout.max_prompt_tokens"]),
        (
            ["--rollout.max_response_tokens", "13", "--batch.micro_batch_tokens", "77", "--parallel.tensor", "2"],
            ["batch.micro_batch_tokens", "77", "78"],
        ),
        (
            ["--rollout.max_prompt_tokens", "250", "--rollout.max_response_tokens", "7"],
            ["rollout.max_prompt_tokens", "250 + 7", "max_position_embeddings = 256", "Lower"],
        ),
        (["--run.trackers", '["wandb"]'], ["wandb", "pip install"]),
        (["--contrastive.dim", "65"], ["contrastive.dim = 65", "hidden size, 64", "Lower it"]),
        (["--contrastive.temperature", "0"], ["contrastive.temperature = 0", "greater than 0", "tau"]),
        (["--contrastive.top_k", "0"], ["contrastive.top_k = 0", "greater than 0"]),
        (
            ["--algorithm.advantage", "gae"],
            ["algorithm.advantage = 'gae'", "'grpo', 'dr_grpo', 'rloo' or 'per_domain'"],
        ),
    ],
    ids=[
        "unknown key",
        "wrong type",
        "tensor",
        "pipeline",
        "no model",
        "micro-batch",
        "padded rollout",
        "positions",
        "tracker",
        "representation",
        "tau",
        "k",
        "method",
    ],
)
def test_refused_by_the_command_line(model: Path, tmp_path: Path, overrides: list[str], words: list[str]) -> None:
    message = refuse(CONFIG.replace("MODEL", str(model)), tmp_path, *overrides)
    assert [word for word in words if word not in message] == [], message


def test_all_problems_at_once(model: Path, tmp_path: Path) -> None:
    config = CONFIG.replace("MODEL", str(model)).replace("chain_sum", "countdown")
    message = refuse(config, tmp_path, "--run.seed", "-1", "--batch.samples", "1", "--engine.speed", "9")
    assert [word for word in ("run.seed", "batch.samples", "engine.speed") if word not in message] == [], message


def test_a_scorer_that_runs_the_models_text_is_refused(model: Path, tmp_path: Path) -> None:
    assert "countdown" in refuse(CONFIG.replace("MODEL", str(model)).replace("chain_sum", "countdown"), tmp_path)


def test_a_domain_without_sources_is_refused(model: Path, tmp_path: Path) -> None:
    config = CONFIG.replace("MODEL", str(model)).replace('[{ generator = "count_bits" }]', "[]")
    assert "domain[1].sources" in refuse(config, tmp_path)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "GPT2LMHeadModel"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"auto_map": {"AutoModel": "code.Model"}}, "auto_map"),
        ({"a_field_from_the_future": 1}, "a_field_from_the_future"),
    ],
    ids=["architecture", "ignored field", "remote code", "unknown field"],
)
def test_a_model_we_would_get_wrong_is_refused(model: Path, tmp_path: Path, change: dict, word: str) -> None:
    other = copy_of(model, tmp_path, **change)
    assert word in refuse(CONFIG.replace("MODEL", str(other)), tmp_path)


def copy_of(model: Path, folder: Path, **change: Any) -> Path:
    """The model's folder with other values in its config.json."""
    other = folder / "model"
    shutil.copytree(model, other)
    values = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**values, **change}))
    return other


@pytest.mark.skipif(not vllm_on_cpu(), reason="GPUs have kernels for other head sizes")
def test_a_head_size_without_a_kernel_is_refused(model: Path, tmp_path: Path) -> None:
    other = copy_of(model, tmp_path, head_dim=16, num_attention_heads=4, num_key_value_heads=4)
    message = refuse(CONFIG.replace("MODEL", str(other)), tmp_path)
    assert "head_dim = 16" in message and "32, 64" in message and "Choose another model" in message, message
    assert "safetensors" not in message


def test_weights_that_are_not_the_models_are_refused(model: Path, tmp_path: Path) -> None:
    other = copy_of(model, tmp_path)
    file = other / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file({**tensors, "model.norm.weight": torch.ones(65), "score.weight": torch.ones(2)}, file)
    message = refuse(CONFIG.replace("MODEL", str(other)), tmp_path)
    for line in (
        f"model.path = {str(other)!r}",
        "model.layers.1.mlp.up_proj.weight: missing",
        "model.norm.weight: has shape (65,), must have (64,)",
        "score.weight: unknown",
        "download",
    ):
        assert line in message


def test_weight_files_that_are_missing_or_cut_are_refused(model: Path, tmp_path: Path) -> None:
    other = copy_of(model, tmp_path)
    file = other / "model.safetensors"
    (other / "1.safetensors").write_bytes(file.read_bytes()[:5000])
    file.unlink()
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (other / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refuse(CONFIG.replace("MODEL", str(other)), tmp_path)
    assert "1.safetensors: must be a safetensors file (" in message and "2.safetensors: missing" in message, message


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        (("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"), ["tokenizer", "download it again"]),
        (("tokenizer.json",), ["tokenizer", "download it again"]),
        (("chat_template.jinja",), ["chat template", "instruction-tuned"]),
    ],
    ids=["no tokenizer", "no tokenizer.json", "no chat template"],
)
def test_a_folder_without_what_prompts_need_is_refused(
    model: Path, tmp_path: Path, gone: tuple[str, ...], words: list[str]
) -> None:
    """Only a rank can tell, once it has imported transformers; how it says so is in test_end_to_end."""
    other = copy_of(model, tmp_path)
    for name in gone:
        (other / name).unlink()
    path = tmp_path / "config.toml"
    path.write_text(CONFIG.replace("MODEL", str(other)))
    with pytest.raises(ConfigError) as refused:
        load_tokenizer(load(path, []))
    [message] = refused.value.problems
    assert [word for word in [*words, str(other)] if word not in message] == [], message


def dry_run(config: str, folder: Path, *overrides: str) -> str:
    path = folder / "config.toml"
    path.write_text(
        config.replace("max_prompt_tokens = 64", "max_prompt_tokens = 200").replace("sources", "shots = 0\nsources")
    )
    command = [sys.executable, "-m", "megatron_mcpo", "train", str(path), "--dry-run", *overrides]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr
    assert not (folder / "runs").exists()
    return result.stdout


def test_a_dry_run_reads_the_rows_that_a_start_reads(model: Path, tmp_path: Path) -> None:
    """All of which a start would refuse, after minutes in a queue."""
    (tmp_path / "rows.jsonl").write_text('{"question": "What is 1 + 1?"}\n' * 3)
    path = tmp_path / "config.toml"
    text = CONFIG.replace("MODEL", str(model)).replace('{ generator = "count_bits" }', '{ file = "rows.jsonl" }')
    path.write_text(text.replace('name = "bits"', 'name = "bits"\nverifiers = [{ kind = "math" }]'))
    command = [sys.executable, "-m", "megatron_mcpo", "train", str(path), "--dry-run"]
    refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert refused.returncode == 2 and "source 'rows.jsonl'" in refused.stderr, refused.stderr
    assert "3 of 3 rows are bad" in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("absent", "can't be imported"),
        ("pi", "is a float, not a function"),
        ("isqrt", "its signature is (n, /); it must be callable with two positional arguments"),
    ],
)
def test_a_function_that_no_worker_can_use_is_refused_at_once(model: Path, tmp_path: Path, name: str, why: str) -> None:
    config = CONFIG.replace("MODEL", str(model))
    verifiers = f'verifiers = [{{ kind = "function", function = "math:{name}" }}]'
    message = refuse(config.replace('name = "bits"', f'name = "bits"\n{verifiers}'), tmp_path)
    assert f"verifiers[0].function = 'math:{name}': must be a function that a worker can import, " in message
    assert why in message


def test_dry_run_prints_the_arithmetic_and_stops(model: Path, tmp_path: Path) -> None:
    config = CONFIG.replace("MODEL", str(model))
    printed = dry_run(config, tmp_path, "--parallel.pipeline", "2", "--contrastive.dim", "64")
    assert "4 prompts x 2 samples = 8 rollouts" in printed and "pipeline 2" in printed
    assert "cross_domain_weight" not in printed


def test_one_domain_has_nobody_to_share_with_which_is_no_error(model: Path, tmp_path: Path) -> None:
    alone = CONFIG.replace("MODEL", str(model))
    alone = alone[: alone.rindex("[[domain]]")]
    assert "contrastive.cross_domain_weight = 0.1: cross-domain sharing needs at least two domains" in dry_run(
        alone, tmp_path
    )
