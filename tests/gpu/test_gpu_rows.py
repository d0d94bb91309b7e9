"""Every row of tools/gpu_check.sh must stay in its bands; what is measured there is said there.

Skipped where there is no GPU (conftest), or where a row's modules are missing.
"""

import sys

import pytest

from tools import gpu_check


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", gpu_check.ROWS)
def test_the_row_stays_in_its_bands(name: str) -> None:
    command = [sys.executable, gpu_check.__file__, "--here", "--rows", name]
    result = gpu_check.check(gpu_check.ROWS[name], command)
    if result["state"] == "skipped":
        pytest.skip(result["why"])
    assert result["state"] == "passed", result["why"]
