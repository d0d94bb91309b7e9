"""Describe and check the experts that an engine says it gave to tokens. Shape legend: see megatron_mcpo.types."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_mcpo.config.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Describe what a choice of experts looks like in a model. count: of the experts of a layer"""

    num_layers: int
    per_token: int
    count: int

    @property
    def dtype(self) -> torch.dtype:
        """Return the smallest type that holds the number of an expert."""
        return torch.uint8 if self.count <= 256 else torch.int16

    @classmethod
    def of(cls, model: ModelConfig) -> Self:
        """Return the routing of a model with experts in all its layers."""
        assert model.experts is not None, "configurations without experts are refused"
        return cls(num_layers=model.num_layers, per_token=model.experts.per_token, count=model.experts.count)

    def checked(self, found: NDArray[Any] | None, *, num_tokens: int) -> Tensor:
        """Return an engine's choices [num_tokens, X, K] in the smallest type.

        Raises ValueError, with token and layer, where they can't be a choice of this model's experts.
        """
        shape = (num_tokens, self.num_layers, self.per_token)
        if found is None or found.shape != shape or found.dtype.kind not in "iu":
            said = "nothing" if found is None else f"{found.dtype} of {list(found.shape)}"
            raise ValueError(f"must say the experts of every token, integers of {list(shape)}, but says {said}")
        experts = torch.from_numpy(found.astype(np.int32))
        wrong = (experts < 0).any(-1) | (experts >= self.count).any(-1)
        ordered = experts.sort(dim=-1).values
        wrong |= (ordered[..., 1:] == ordered[..., :-1]).any(-1)
        if wrong.any():
            token, layer = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"token {token} has the experts {experts[token, layer].tolist()} in layer {layer}: must be "
                f"{self.per_token} different ones of {self.count}"
            )
        return experts.to(self.dtype)
