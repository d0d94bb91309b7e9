"""Every row of tools/gpu_check.sh must stay in its bands; what is measured there is said there.

Skipped where there is no GPU (conftest), or where a row's modules are missing.
"""

import sys

import pytest

from benchmarks.gpu import run


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", run.ROWS)
def test_the_row_stays_in_its_bands(name: str) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu.run", "--here", "--rows", name]
    result = run.check(run.ROWS[name], command)
    if result["state"] == "skipped":
        pytest.skip(result["why"])
    assert result["state"] == "passed", result["why"]
