"""Folders that other programs read as another model, or that are no model: what of them is refused, in which words.

Every case is a folder that is otherwise in order. Not covered here: single fields of config.json (test_model_config.py,
test_hf_fuzz.py), tokenizers and chat templates (test_tokenizer.py).
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import layout_problems
from megatron_mcpo.weights.hf_io import HfFolder
from megatron_mcpo.weights.mapping import hf_shapes, tensor_problems

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tied Llama in one file."""
    set_config(tmp_path, LLAMA)
    rng = np.random.default_rng(0)
    model = from_folder_without_weights(tmp_path)
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in hf_shapes(model).items()}
    save_file(tensors, tmp_path / SINGLE, {"format": "pt"})
    assert problems_of(tmp_path) == []
    return tmp_path


def from_folder_without_weights(folder: Path) -> Any:
    return from_folder(folder, with_weights=False)


def set_config(folder: Path, values: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(values))


def problems_of(folder: Path) -> list[str]:
    """Return what the start of a run says of a model's folder."""
    try:
        return tensor_problems(from_folder(folder), folder)
    except ConfigError as error:
        return error.problems


def add_tensors(folder: Path, **tensors: np.ndarray) -> None:
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(load_file(folder / SINGLE) | named, folder / SINGLE, {"format": "pt"})


def split(folder: Path, *, keep_single: bool = False) -> None:
    """Write the tensors in two files with an index; without `keep_single` in place of the one."""
    tensors = load_file(folder / SINGLE)
    names = sorted(tensors)
    parts = {FIRST: names[:3], SECOND: names[3:]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / file, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"weight_map": {n: file for file, held in parts.items() for n in held}}))
    if not keep_single:
        (folder / SINGLE).unlink()


def embedding(folder: Path) -> np.ndarray:
    found: np.ndarray = load_file(folder / SINGLE)["model.embed_tokens.weight"]
    return found


def test_an_output_layer_beside_a_tied_embedding_must_equal_it(folder: Path) -> None:
    """transformers 5 and vLLM use the file's output layer where it differs."""
    head = embedding(folder)
    add_tensors(folder, lm_head__weight=head)
    assert problems_of(folder) == []
    changed = head.copy()
    changed[-1, -1] = np.nextafter(changed[-1, -1], np.float32(9))
    for other in (changed, head.astype(np.float16)):
        add_tensors(folder, lm_head__weight=other)
        (problem,) = problems_of(folder)
        assert "lm_head.weight must equal model.embed_tokens.weight" in problem
        assert "Set that to false to train this output layer, or remove lm_head.weight" in problem
    set_config(folder, LLAMA | {"tie_word_embeddings": False})
    assert problems_of(folder) == [], "the advice of the message helps"


def beside_index(folder: Path) -> None:
    split(folder, keep_single=True)


def beside_index_without_shards(folder: Path) -> None:
    split(folder, keep_single=True)
    (folder / FIRST).unlink()
    (folder / SECOND).unlink()


def shards_without_index(folder: Path) -> None:
    split(folder, keep_single=True)
    (folder / INDEX).unlink()


def shards_of_another_save(folder: Path) -> None:
    split(folder)
    save_file({"a": np.ones(3)}, folder / "model-00001-of-00003.safetensors")


def beside_a_sharded_checkpoint(folder: Path) -> None:
    (folder / ".metadata").touch()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (beside_index, f"({SINGLE} beside {INDEX}, which does not name them)"),
        (beside_index_without_shards, f"({SINGLE} beside {INDEX}, which does not name them)"),
        (shards_without_index, f"({FIRST}, {SECOND} beside {SINGLE}, which does not name them)"),
        (shards_of_another_save, f"(model-00001-of-00003.safetensors beside {INDEX}, which does not name them)"),
        (beside_a_sharded_checkpoint, f"(it has a sharded checkpoint and {SINGLE})"),
    ],
)
def test_two_copies_of_a_model_are_refused(folder: Path, make: Callable[[Path], None], words: str) -> None:
    """transformers reads model.safetensors first, an index lists other files, vLLM without an index reads all."""
    make(folder)
    assert f"{folder}: must hold the weights once {words}" in "\n".join(problems_of(folder))


def test_shards_with_their_index_are_one_copy(folder: Path) -> None:
    split(folder)
    (folder / "consolidated.safetensors").write_bytes(b"another program's")
    assert problems_of(folder) == []


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "adapters.safetensors"])
def test_an_adapter_beside_a_model_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_text("{}")
    (problem,) = problems_of(folder)
    assert f"must be a whole model ({name}: an adapter, which would be left out). Merge it" in problem


def fifo(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


def shard_in_a_pipe(folder: Path) -> None:
    os.mkfifo(folder / "2.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "2.safetensors"}}))
    (folder / SINGLE).unlink()


def deep(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text("[" * 10**5) and None


def field(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: set_config(folder, LLAMA | fields)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (fifo(SINGLE), f"{SINGLE}: must be a file (it is a pipe or a device)"),
        (fifo(INDEX), f"{INDEX}: must be a file (it is a pipe or a device)"),
        (fifo("config.json"), "config.json: must be a file (it is a pipe or a device)"),
        (fifo("chat_template.jinja"), "chat_template.jinja: must be a file (it is a pipe or a device)"),
        (shard_in_a_pipe, "2.safetensors: must be a file (it is a pipe or a device)"),
        (deep("config.json"), "config.json: must be JSON (maximum recursion depth exceeded"),
        (deep("generation_config.json"), "generation_config.json: must be JSON (maximum recursion depth exceeded"),
        (deep(INDEX), f"{INDEX}: must be JSON (maximum recursion depth exceeded"),
        (field(num_hidden_layers=10**8), "num_hidden_layers = 100000000: must be a positive integer, at most 1000"),
        (field(vocab_size=10**400), "vocab_size = an integer of more than 18 digits: must be a positive integer"),
        (field(rms_norm_eps=10**400), "rms_norm_eps = an integer of more than 18 digits: must be a positive number"),
        (field(tie_word_embeddings="false"), 'tie_word_embeddings = "false": must be true or false'),
        (field(layer_types=["full_attention"]), 'layer_types = ["full_attention"]: must be a list with an entry'),
        (field(layer_types=5), "layer_types = 5: must be a list with an entry for each layer"),
        (field(architectures=[["x"]]), 'architectures = [["x"]]: must be one of LlamaForCausalLM'),
        (field(sliding_window=8, use_sliding_window=False), "llama models do not read use_sliding_window = false"),
        (field(rope_theta=1e5, rope_parameters={"rope_theta": 1e6}), "the same as the one outside, which is 100000.0"),
        (field(rope_scaling={"type": "linear", "rope_type": "yarn", "factor": 2.0}), "must be the same as type"),
        (
            field(rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters={"rope_theta": 1e4}),
            "rope_scaling and rope_parameters: must state the same",
        ),
        (field(activation="gelu"), "activation = \"gelu\": must be 'swiglu'"),
    ],
)
def test_what_is_no_model_is_refused_in_a_line(folder: Path, make: Callable[[Path], None], words: str) -> None:
    make(folder)
    assert words in "\n".join(problems_of(folder))


@pytest.mark.parametrize("family", ["mistral", "mixtral"])
def test_use_sliding_window_is_no_switch_of_mistral(folder: Path, family: str) -> None:
    """Both transformers and vLLM use the window, which moves log-probs by 0.8 nats in a small model."""
    architecture = {"mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM"}[family]
    values = LLAMA | {"architectures": [architecture], "model_type": family, "sliding_window": 8}
    values |= {"num_local_experts": 4, "num_experts_per_tok": 2} if family == "mixtral" else {}
    set_config(folder, values | {"use_sliding_window": False})
    assert f"{family} models do not read use_sliding_window = false" in "\n".join(problems_of(folder))


def test_qwen_has_a_window_only_with_its_switch(folder: Path) -> None:
    qwen = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "sliding_window": 8}
    set_config(folder, qwen)
    assert from_folder(folder, with_weights=False).family == "qwen2"


def test_fields_of_generation_and_of_old_llamas_are_harmless(folder: Path) -> None:
    vicuna = {"max_sequence_length": 32, "min_length": 0, "num_beams": 1, "bad_words_ids": None, "activation": "swiglu"}
    set_config(folder, LLAMA | vicuna)
    assert problems_of(folder) == []
    assert from_folder(folder).max_positions == 32, "vLLM takes the smaller of the two"


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        (None, 1, (1,)),
        (5, 1, (5, 1)),
        ([5, 1], [1, 2], (5, 1, 2)),
        ([], 1, (1,)),
        (5, None, (5,)),
        (None, None, ()),
    ],
)
def test_every_end_of_text_that_a_file_names_ends_a_response(
    folder: Path, generation: Any, config: Any, ends: tuple[int, ...]
) -> None:
    set_config(folder, LLAMA | {"eos_token_id": config})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation, "top_p": 0.8}))
    assert from_folder(folder).eos_token_ids == ends


@pytest.mark.parametrize(("value", "words"), [(np.nan, "NaN"), (np.inf, "an infinity"), (-np.inf, "an infinity")])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"])
def test_weights_that_are_no_numbers_are_named(folder: Path, name: str, value: float, words: str) -> None:
    damaged = load_file(folder / SINGLE)[name].copy()
    damaged[3, 5] = value
    add_tensors(folder, **{name: damaged})
    source = HfFolder(folder, from_folder(folder))
    assert source.read(name, 0, 5, dim=1).isfinite().all(), "only what is read is judged"
    for part in ({"dim": 0}, {"dim": 1, "start": 4}, {"start": 3, "stop": 4, "dim": 0}):
        with pytest.raises(ConfigError, match=f"{SINGLE}: {name}: must be finite .it holds {words}"):
            source.read(name, **part)


@pytest.mark.parametrize(("experts", "fine"), [({"norm_topk_prob": True}, False), ({}, True)])
def test_one_normalized_expert_is_refused(folder: Path, experts: dict[str, Any], fine: bool) -> None:
    """Its weight is always 1, whatever the router says; Megatron-Core refuses it only when the model is built."""
    values = LLAMA | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 4}
    set_config(folder, values | {"moe_intermediate_size": 8, "num_experts_per_tok": 1, **experts})
    try:
        from_folder(folder, with_weights=False)
    except ConfigError as error:
        assert not fine and "num_experts_per_tok = 1: must be at least 2" in error.problems[0]
    else:
        assert fine


@pytest.mark.parametrize(("vocab_size", "tensor", "fine"), [(4, 4, True), (7, 4, True), (3, 4, False), (5, 4, False)])
def test_every_rank_needs_a_row_of_the_vocabulary(folder: Path, vocab_size: int, tensor: int, fine: bool) -> None:
    set_config(folder, LLAMA | {"vocab_size": vocab_size})
    problems = layout_problems(from_folder(folder, with_weights=False), Layout(tensor=tensor), 1)
    assert (problems == []) == fine
    assert fine or f"must leave every rank a row of the vocabulary's {vocab_size}" in problems[0]
