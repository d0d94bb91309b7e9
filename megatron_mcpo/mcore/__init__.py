"""Everything that is built on Megatron-Core, which only this folder and distributed/ import.

Importing any module of this folder prepares Megatron-Core for this machine, once.
"""

from megatron_mcpo.distributed import cpu_backend
from megatron_mcpo.distributed.transformer_engine import transformer_engine_problem
from megatron_mcpo.mcore import adam

# Before any module of this folder imports Megatron-Core.
cpu_backend.apply()
transformer_engine_problem()
adam.install()
