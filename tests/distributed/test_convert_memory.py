"""How much memory the conversion tools need: that of a few tensors, whatever the model's size. Real processes.

A model of 0.9 GB shows it: this bound allows 1 GiB, of which Python with its libraries takes more than half.
"""

from pathlib import Path

import pytest

from benchmarks import convert

LARGEST = 2 * 8192 * 1024
LIMIT = 3 * LARGEST + (1 << 30)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "source"
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 64}
    convert.make_large(
        folder,
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=26,
        eos_token_id=1,
        **heads,
    )
    assert sum(path.stat().st_size for path in folder.iterdir()) > LIMIT * 3 // 4
    return folder


def test_a_conversion_needs_the_memory_of_a_few_tensors(source: Path, tmp_path: Path) -> None:
    """One process, through which all tensors go: of several, as torchrun starts them, each has a share of them."""
    options = ("--tp", "2", "--pp", "2")
    _, there = convert.measure("to-megatron", source, tmp_path / "megatron", *options, processes=1)
    _, back = convert.measure("to-hf", tmp_path / "megatron", tmp_path / "back", processes=1)
    assert max(there, back) <= LIMIT
