"""What several files of whole-program tests share: made once per worker."""

from pathlib import Path

import pytest

from tests.support import tiny_run
from tests.support.program import train_forked
from tests.support.resumed_runs import PIPELINE, Figures, figures, write_config


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save the tiny chat model; return its folder, which nobody changes."""
    folder = tmp_path_factory.mktemp("model")
    tiny_run.save_chat_model(folder)
    return folder


@pytest.fixture(scope="session")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Figures:
    """Of an uninterrupted run."""
    config = write_config(model, tmp_path_factory.mktemp("whole"))
    finished = train_forked(config, *PIPELINE, ranks=2)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return figures(config.parent / "runs" / "tiny")
