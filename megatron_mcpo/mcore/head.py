"""The contrastive head: from the mean hidden state of a response to a unit vector.

Shape legend: see megatron_mcpo.types.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ContrastiveHead(nn.Module):
    """Linear map H -> D without bias, then L2 normalisation (arXiv 2605.25443: "lightweight contrastive head").

    Lives on the last pipeline stage, replicated over tensor ranks: the same `seed` gives every rank the same weights.
    Computes in fp32 whatever the dtype of its weights. A zero input (an empty response) gives a zero vector.
    """

    def __init__(self, hidden_size: int, dim: int, *, dtype: torch.dtype, device: torch.device, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(dim, hidden_size, generator=generator) * hidden_size**-0.5
        self.weight = nn.Parameter(weight.to(device=device, dtype=dtype))

    def forward(self, pooled_NH: Tensor) -> Tensor:
        """Mean hidden states [N, H] to representations [N, D] in fp32, unit rows."""
        return F.normalize(F.linear(pooled_NH.float(), self.weight.float()), dim=-1)
