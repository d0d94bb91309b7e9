"""The only folder, with parallel.py and platform.py, that imports Megatron-Core."""

from megatron_mcpo import platform

platform.apply()  # before any module of this folder imports Megatron-Core
