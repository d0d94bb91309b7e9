"""One thread a process, before torch is imported: tests fork ranks, and a thread pool doesn't survive a fork."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from megatron_mcpo.distributed import cpu_backend

torch.set_num_threads(1)
cpu_backend.apply()  # before any test imports Megatron-Core
