"""What is read from which file of a Hugging Face folder's safetensors: headers, the index, names in several files.

Not covered here: files that are missing or cut (test_model_config.py), values (test_convert.py).
"""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.config.hf_files import Header, read_headers, tokenizer_problems

OLD = "model.layers.0.self_attn.rotary_emb.inv_freq"


def write_index(folder: Path, files: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def problems_of(folder: Path) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        read_headers(folder)
    return refused.value.problems


def test_headers_of_several_files(tmp_path: Path) -> None:
    save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(())}, tmp_path / "1.safetensors", {"format": "pt"})
    save_file({"c": np.arange(4, dtype=np.int8), OLD: np.ones(2)}, tmp_path / "2.safetensors")
    files = {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors", OLD: "2.safetensors"}
    write_index(tmp_path, {**files, OLD.replace("0", "1"): "1.safetensors"})
    headers = read_headers(tmp_path)
    shapes = {"a": ((2, 3), "F32", 24), "b": ((), "F64", 8), "c": ((4,), "I8", 4), OLD: ((2,), "F64", 16)}
    assert headers == {
        name: Header(
            file=tmp_path / files[name], start=headers[name].start, num_bytes=num_bytes, shape=shape, dtype=dtype
        )
        for name, (shape, dtype, num_bytes) in shapes.items()
    }
    for name, header in headers.items():
        values = load_file(header.file)[name]
        assert header.file.read_bytes()[header.start :][: values.nbytes] == values.tobytes(), name


def test_files_that_the_index_does_not_name_are_not_read(tmp_path: Path) -> None:
    save_file({"a": np.zeros(3)}, tmp_path / "1.safetensors")
    save_file({"a": np.ones(3), "b": np.ones(3)}, tmp_path / "consolidated.safetensors")
    (tmp_path / "2.safetensors").write_bytes(b"not one")
    write_index(tmp_path, {"a": "1.safetensors"})
    assert [(name, header.file.name) for name, header in read_headers(tmp_path).items()] == [("a", "1.safetensors")]


def test_every_tensor_that_is_not_where_the_index_says_is_named(tmp_path: Path) -> None:
    """Also where another file holds it: a wrong index says nothing of which values are right."""
    save_file({"a": np.zeros(3), "b": np.zeros(3)}, tmp_path / "1.safetensors")
    save_file({"c": np.zeros(3)}, tmp_path / "2.safetensors")
    write_index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors", "d": "2.safetensors", "c": "2.safetensors"})
    for name, problem in zip("bd", problems_of(tmp_path), strict=True):
        assert problem.startswith(
            f"{tmp_path / '2.safetensors'}: must have {name} (model.safetensors.index.json says so)"
        )


@pytest.mark.parametrize("listed", [{}, {"b": "1.safetensors"}, {"b": "2.safetensors"}])
def test_a_tensor_in_two_files_is_refused_whichever_the_index_names(tmp_path: Path, listed: dict[str, str]) -> None:
    save_file({"a": np.zeros(3), "b": np.zeros(3)}, tmp_path / "1.safetensors")
    save_file({"b": np.ones(3), "c": np.ones(3)}, tmp_path / "2.safetensors")
    write_index(tmp_path, {"a": "1.safetensors", "c": "2.safetensors", **listed})
    [problem] = problems_of(tmp_path)
    assert problem.startswith(
        f"{tmp_path / '1.safetensors'}: b must be in one file (it is also in {tmp_path / '2.safetensors'})"
    )


def test_several_files_without_an_index_are_refused(tmp_path: Path) -> None:
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name in names:
        save_file({"a": np.zeros(3)}, tmp_path / name)
    [problem] = problems_of(tmp_path)
    assert all(word in problem for word in (*names, "model.safetensors.index.json", "missing")), problem


@pytest.mark.parametrize("name", ["../1.safetensors", "/etc/passwd", "sub/1.safetensors", "..", ""])
def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder / "sub"):
        save_file({"a": np.zeros(3)}, place / "1.safetensors")
    write_index(folder, {"a": name})
    [problem] = problems_of(folder)
    assert f"must name files of this folder (it names {name!r})" in problem


def test_an_index_without_a_tensor_is_refused(tmp_path: Path) -> None:
    save_file({"a": np.zeros(3)}, tmp_path / "model.safetensors")
    write_index(tmp_path, {})
    assert "must have a table weight_map" in problems_of(tmp_path)[0]


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({}, "must have a tokenizer (tokenizer.json). Download it, too."),
        ({"tokenizer.json": "{"}, "must be JSON ("),
        ({"tokenizer.json": "{}"}, "must have a chat template. Use an instruction-tuned model."),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "[]"}, "must be a JSON object"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": '{"chat_template": null}'}, "must have a chat template"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": '{"chat_template": "x"}'}, None),
        ({"tokenizer.json": "{}", "chat_template.jinja": "x"}, None),
        ({"tokenizer.model": "", "chat_template.json": "{}"}, "must have a chat template"),  # it is a processor's
        (
            {"tokenizer.json": "{}", "tokenizer_config.json": '{"chat_template": [{"name": "rag"}, {"name": "chat"}]}'},
            "one of its chat templates must have the name default (they are rag, chat)",
        ),
        ({"tokenizer.json": "{}", "tokenizer_config.json": '{"chat_template": [{"name": "default"}]}'}, None),
        ({"tokenizer.json": "[" * 10**5}, "must be JSON (maximum recursion depth exceeded"),
    ],
)
def test_whether_prompts_can_be_made(tmp_path: Path, files: dict[str, str], problem: str | None) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    problems = tokenizer_problems(tmp_path)
    assert len(problems) == (problem is not None) and (problem or "") in "".join(problems)
