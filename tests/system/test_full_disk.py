"""A whole run on a disk that is too small for its checkpoints.

Not covered here: what a single save does (test_checkpoint_disk.py), quotas, network file systems.
"""

import subprocess
from pathlib import Path

from tests.support.checkpoints import names
from tests.support.disks import disk
from tests.support.program import train_forked, write_config


def test_a_run_whose_disk_is_full_says_so_once(model: Path, tmp_path: Path) -> None:
    """It warns when it starts, ends without a traceback, and goes on when there is room again."""
    overrides = ("--parallel.data", "2", "--run.steps", "3", "--run.checkpoint_every", "1")
    with disk(tmp_path / "disk", 4 << 20) as folder:
        config = write_config(model, folder)
        ended = train_forked(config, *overrides, ranks=2)
        assert ended.returncode == 2, ended.stderr[-3000:]
        assert "WARNING: " in ended.stdout and "3 more checkpoints of about" in ended.stdout
        assert "Traceback" not in ended.stderr
        assert ended.stderr.count("can't be written: it needs ") == 1
        assert names(folder / "runs" / "tiny" / "checkpoints") == ["step_000001"]
        subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
        resumed = train_forked(config, *overrides, ranks=2)
        assert resumed.returncode == 0, resumed.stderr[-3000:]
        assert "resuming after step 1" in resumed.stdout and "WARNING" not in resumed.stdout
        assert names(folder / "runs" / "tiny" / "checkpoints") == ["step_000002", "step_000003"]
