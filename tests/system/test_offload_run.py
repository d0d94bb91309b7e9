"""A whole run with everything offloaded that can be, against one that keeps it on the device.

Not covered here: the parts by themselves (test_offload.py), memory of a GPU.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.support.program import lasting, metrics, train_forked, write_config


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_ends_with_the_same_figures(model: Path, tmp_path: Path, ranks: int) -> None:
    """The whole program, with a resumed half: settings that change no figure may change between its starts."""
    folders: dict[str, Any] = {name: tmp_path / name for name in ("plain", "offloaded")}
    for folder in folders.values():
        folder.mkdir()
    on = ("--optimizer.offload", "true", "--model.offload_reference", "true")
    common = ("--model.dtype", "bf16", "--batch.minibatches", "2", "--contrastive.diagnose_every", "2")
    for name, overrides in (("plain", ()), ("offloaded", on)):
        config = write_config(model, folders[name])
        finished = train_forked(config, *common, *overrides, ranks=ranks)
        assert finished.returncode == 0, finished.stderr[-3000:]
    plain, moved = (metrics(folders[name] / "runs" / "tiny") for name in ("plain", "offloaded"))
    assert len(plain) == 6 and lasting(plain) == lasting(moved)
