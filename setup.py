"""The package `megatron_mcpo`. Exact versions with hashes are in requirements/cpu.lock; `make env` installs those."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    """Read, not imported: the package may not be importable before its requirements are installed."""
    text = (ROOT / "megatron_mcpo" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if not found:
        raise ValueError('megatron_mcpo/__init__.py: has no line __version__ = "..."; add it')
    return found[1]


def requirements() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


setup(
    name="megatron-mcpo",
    version=version(),
    description="Multi-domain contrastive policy optimization on Megatron-Core and vLLM",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12,<3.13",
    packages=find_packages(include=["megatron_mcpo", "megatron_mcpo.*"]),
    package_data={"megatron_mcpo.reporting.html": ["page/*"]},
    install_requires=requirements(),
    extras_require={
        "wandb": ["wandb"],
        "mlflow": ["mlflow"],
        "trackio": ["trackio"],
        "datasets": ["datasets"],
        "test": [
            "pytest>=9",
            "pytest-timeout>=2.4",
            "hypothesis>=6.170",
            "pytorch-metric-learning>=2.9",
            "selenium>=4.51",
            "ruff>=0.17",
            "mypy>=2.4",
        ],
    },
)
