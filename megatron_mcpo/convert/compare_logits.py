"""Do Megatron's modules, filled from one folder, compute what transformers computes from another?"""

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
from megatron_mcpo.weights.hf_io import Source, load_source

TOLERANCE = 1e-4
"""Of fp32, for a model of hundreds of layers: what is read wrongly is off by more than a hundredth."""
_TOKENS = 48


def logits_error(source: Source, model: ModelConfig, folder: Path, dtype: torch.dtype) -> float:
    """Largest difference between the logits of both in fp32, relative to the largest logit, on random tokens.

    source: read into Megatron's modules; folder: read by transformers
    dtype: what both sides' weights are rounded to first, as a conversion to this type does
    This process must have no process group.
    """
    tokens_1T = torch.randint(0, model.vocab_size, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
    logging.disable_progress_bar()
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    _round(reference, dtype)
    with torch.no_grad():
        expected_TV = reference(tokens_1T).logits[0]
    del reference
    # Alone, whatever the environment says: it may be torchrun's, whose other ranks have nothing to do with this.
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
