"""Map the pooled hidden state of a response to a unit vector: the contrastive head.

Shape legend: see megatron_mcpo.types.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_mcpo.config.schema import ContrastiveConfig

_DEFAULT_DIM = 512


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """The shape of a contrastive head.

    pool: the mean over a response's hidden states, or its last one; detach: no gradient leaves the head
    normalize: whether the head scales representations to length 1, which otherwise happens after they are centred
    """

    dim: int
    kind: Literal["linear", "mlp"] = "linear"
    pool: Literal["mean", "last"] = "mean"
    detach: bool = False
    normalize: bool = True
    seed: int = 0

    @staticmethod
    def of(settings: ContrastiveConfig, *, hidden_size: int, seed: int) -> "HeadSpec | None":
        """Return the head that the configuration asks for; None without a contrastive term."""
        if not settings.enabled:
            return None
        return HeadSpec(
            dim=settings.dim or min(_DEFAULT_DIM, hidden_size),
            kind=settings.head,
            pool=settings.pool,
            detach=settings.mode == "reward",
            normalize=settings.center == "off",
            seed=seed,
        )


class ContrastiveHead(nn.Module):
    """Linear map H -> D without bias, then L2 normalisation (arXiv 2605.25443: "lightweight contrastive head").

    `mlp` puts a map H -> H and a GELU in front. Lives on the last pipeline stage, replicated over tensor ranks: the
    same seed gives every rank the same weights. Computes in fp32 whatever the dtype of its weights. A zero input (an
    empty response) gives a zero vector.
    """

    def __init__(self, hidden_size: int, spec: HeadSpec, *, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.spec = spec
        generator = torch.Generator().manual_seed(spec.seed)

        def parameter(rows: int) -> nn.Parameter:
            weight = torch.randn(rows, hidden_size, generator=generator, device="cpu") * hidden_size**-0.5
            return nn.Parameter(weight.to(device=device, dtype=dtype))

        self.weight = parameter(spec.dim)
        self.hidden_weight = parameter(hidden_size) if spec.kind == "mlp" else None

    def forward(self, pooled_NH: Tensor) -> Tensor:
        """Map pooled hidden states [N, H] to representations [N, D] in fp32, with unit rows if spec.normalize."""
        hidden_NH = (pooled_NH.detach() if self.spec.detach else pooled_NH).float()
        if self.hidden_weight is not None:
            hidden_NH = F.gelu(F.linear(hidden_NH, self.hidden_weight.float()))
        z_ND = F.linear(hidden_NH, self.weight.float())
        return F.normalize(z_ND, dim=-1) if self.spec.normalize else z_ND
