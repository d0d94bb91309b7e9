"""A whole run that starts from a converted folder: real torchrun environment, Megatron-Core, vLLM.

Not covered here: GPUs.
"""

from pathlib import Path

import pytest

from megatron_mcpo.convert.convert import hf_to_megatron
from tests.support import tiny_run
from tests.support.conversion import quiet, sizes
from tests.support.program import lasting, metrics, train_forked, write_config


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "hf"
    tiny_run.save_chat_model(folder)
    return folder


@pytest.fixture(scope="module")
def megatron(source: Path) -> Path:
    made = source.parent / "megatron"
    hf_to_megatron(source, made, sizes(tensor=2), verify_forward=False, say=quiet)
    return made


def test_a_run_is_the_same_from_a_converted_folder(source: Path, megatron: Path, tmp_path: Path) -> None:
    rows = []
    for name, model in (("hf", source), ("converted", megatron)):
        (tmp_path / name).mkdir()
        finished = train_forked(write_config(model, tmp_path / name), "--run.steps", "2")
        assert finished.returncode == 0, finished.stderr[-3000:]
        rows.append(lasting(metrics(tmp_path / name / "runs" / "tiny")))
    assert len(rows[0]) == 2 and rows[0][-1]["grad_norm"] > 0
    assert rows[1] == rows[0]


def test_a_damaged_folder_starts_no_run(megatron: Path, tmp_path: Path) -> None:
    """A bit of a weight, which torch would load without a word."""
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in megatron.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    file = max(damaged.glob("__*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    finished = train_forked(write_config(damaged, tmp_path), ranks=2)
    assert finished.returncode == 2
    assert f"{damaged}: {file.name} is not as it was written" in finished.stderr
    assert finished.stderr.count("is not as it was written") == 1
