"""Compare the logits of Megatron's modules, filled from one folder, with those of transformers from another."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.distributed import parallel
from megatron_mcpo.distributed.device import backend
from megatron_mcpo.mcore.model import build_chunks, logits
from megatron_mcpo.weights.hf_io import Source
from megatron_mcpo.weights.load import load_source

TOLERANCE = 1e-4
"""Largest relative error of fp32 in a model of hundreds of layers; a tensor that is read wrongly gives above 0.01."""
_TOKENS = 48


def logits_error(source: Source, model: ModelConfig, folder: Path, dtype: torch.dtype) -> float:
    """Return the largest difference between the logits of both sides in fp32, relative to the largest logit.

    The tokens are random. This process must have no process group.

    Args:
        source: The folder that is read into Megatron's modules.
        model: The model in both folders.
        folder: The folder that transformers reads.
        dtype: What the weights of both sides are rounded to first, as a conversion to this dtype does.
    """
    tokens_1T = torch.randint(0, model.vocab_size, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
    logging.disable_progress_bar()
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    _round(reference, dtype)
    with torch.no_grad():
        expected_TV = reference(tokens_1T).logits[0]
    del reference
    # A group of this process alone, even under torchrun, whose other ranks take no part in this.
    dist.init_process_group(backend(), store=dist.HashStore(), rank=0, world_size=1)
    groups = parallel.init(Layout(), seed=0, timeout_seconds=600)
    chunks = build_chunks(model, groups, dtype=torch.float32, head=None)
    load_source(chunks, model, source, groups)
    _round(chunks[0], dtype)
    found_TV = logits(chunks[0], tokens_1T)
    parallel.destroy()
    return float((found_TV - expected_TV).abs().max() / expected_TV.abs().max())


@torch.no_grad()
def _round(module: nn.Module, dtype: torch.dtype) -> None:
    for parameter in module.parameters():
        parameter.copy_(parameter.to(dtype))
