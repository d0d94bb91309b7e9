"""Where the checkout, the embedded model and the data of the tests lie."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
"""Rows of public sets and weights of small models; see its README.md."""
EMBEDDED_MODEL = ROOT / ".cache" / "models" / "smollm2-135m-instruct"
"""The model of the quick start, which `make model` puts there."""
