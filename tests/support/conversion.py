"""Small folders to convert, and what is in them."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_mcpo.config.layout import Layout
from megatron_mcpo.convert.convert import layout_of

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True, "head_dim": 24},
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "qwen3": {"head_dim": 24},
    "qwen3_moe": {"head_dim": 24, **EXPERTS, "moe_intermediate_size": 40},
    "mixtral": EXPERTS,
}


def sizes(
    *,
    tensor: int = 1,
    pipeline: int = 1,
    virtual_pipeline: int = 1,
    expert: int = 1,
    layers_per_stage: Sequence[int] = (),
) -> Layout:
    return layout_of(
        tensor=tensor,
        pipeline=pipeline,
        virtual_pipeline=virtual_pipeline,
        expert=expert,
        layers_per_stage=layers_per_stage,
    )


def quiet(_text: str) -> None:
    """Progress is not looked at here."""


def make_model(folder: Path, family: str, dtype: str, **changes: Any) -> Path:
    shape = {"vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 1, "max_position_embeddings": 128}
    options = {**shape, **heads, "rope_parameters": ROPE, **FAMILIES[family], "dtype": dtype, **changes}
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in folder.glob("model*.safetensors") for k, v in load_file(file).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype is b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def program(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a subcommand of `mcpo convert` in a process of its own: one that was a rank cannot fork others."""
    command = [sys.executable, "-m", "megatron_mcpo", "convert", name, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=540)


def save_folder(source: Path, folder: Path, found: dict[str, Tensor]) -> Path:
    shutil.copytree(source, folder)
    save_file(found, folder / "model.safetensors")
    return folder
