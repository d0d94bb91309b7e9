"""Make `pip install .` work for tools that still look for setup.py; pyproject.toml describes the package."""

from setuptools import setup

setup()
