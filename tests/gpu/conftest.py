"""Everything in this folder needs a CUDA device."""

from pathlib import Path

import pytest

from megatron_mcpo.distributed.device import uses_gpu, why_no_gpu

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker("gpu")
        if not uses_gpu():
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {why_no_gpu()}"))
