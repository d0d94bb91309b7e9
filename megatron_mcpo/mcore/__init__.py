"""The only folder, with parallel.py and platform.py, that imports Megatron-Core.

Importing anything in it prepares Megatron-Core for this machine, once.
"""

from megatron_mcpo.distributed import cpu_backend
from megatron_mcpo.mcore import adam

cpu_backend.apply()  # before any module of this folder imports Megatron-Core
adam.install()
