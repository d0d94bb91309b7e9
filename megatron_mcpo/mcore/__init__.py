"""Everything that is built on Megatron-Core, which only this folder and distributed/ import.

Importing any module of this folder prepares Megatron-Core for this machine, once.
"""

from megatron_mcpo.distributed import cpu_backend
from megatron_mcpo.mcore import adam

cpu_backend.apply()  # before any module of this folder imports Megatron-Core
adam.install()
