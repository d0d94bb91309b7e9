"""Let the routers of a model's experts choose what they, or the engine, chose before, and count their choices.

A rounding error can change which experts a token gets, and then everything that is computed from it: the engine, the
scoring pass and the update are different functions wherever a choice is close. Replayed choices make them one. The
weights of the experts are still computed from the present logits, so that the router has its gradient (arXiv
2507.18071, section 5.3, and 2510.11370). Shape legend: see megatron_mcpo.types and megatron_mcpo.mcore.packing.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.distributed.device import device
from megatron_mcpo.distributed.parallel import Groups
from megatron_mcpo.mcore.packing import MicroBatch
from megatron_mcpo.types import Routes


class _Router:
    """Tell a router the experts of its tokens, by Megatron-Core's hook `TopKRouter.router_replay` (0.19.2).

    given_lK: experts of every token, -1 where the router chooses; None: it chooses for all
    chosen_lK: those of the last forward pass
    """

    def __init__(self, layer: int):
        self.layer = layer
        self.given_lK: Tensor | None = None
        self.chosen_lK: Tensor | None = None
        self.recomputes = False
        self.to_recompute: deque[Tensor] = deque()

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Return the scores of a token's experts and the experts, both [l, K]."""
        if self.recomputes:
            chosen_lK = self.to_recompute.popleft()
        else:
            chosen_lK = default_compute_topk(scores, topk, num_groups, group_topk)[1]
            if self.given_lK is not None:
                assert self.given_lK.shape == chosen_lK.shape, (self.layer, self.given_lK.shape, chosen_lK.shape)
                chosen_lK = torch.where(self.given_lK < 0, chosen_lK, self.given_lK.to(chosen_lK.dtype))
            self.chosen_lK = chosen_lK
            self.to_recompute.append(chosen_lK)
        return scores.gather(1, chosen_lK), chosen_lK


class Routers:
    """The routers of this rank's chunks: `begin` a pass, run each chunk within `forward`, then `end` the pass."""

    def __init__(self, chunks: Sequence[nn.Module], model: ModelConfig, groups: Groups, *, replays: bool):
        """Attach to the routers. replays: whether a pass may be given the experts of another, or of the engine"""
        assert model.experts is not None
        self._groups = groups
        self._replays = replays
        self._num_layers, self._num_experts = model.num_layers, model.experts.count
        self._routers: list[list[_Router]] = []
        for chunk in chunks:
            routers: list[Any] = [module for module in chunk.modules() if isinstance(module, TopKRouter)]
            hooks = [_Router(router.layer_number - 1) for router in routers]
            for router, hook in zip(routers, hooks, strict=True):
                router.router_replay = hook
            self._routers.append(hooks)
        # On the device, since a copy to it in a forward pass would wait for it.
        self._layer_X = [
            torch.tensor([hook.layer for hook in hooks], dtype=torch.int64, device=device()) for hooks in self._routers
        ]
        self._given: Routes | None = None
        self._chosen: list[list[Tensor]] = []
        self._load_XE = torch.zeros(0, dtype=torch.int64)

    def begin(self, given: Routes | None) -> None:
        """Begin a pass. given: the experts of all micro-batches; None: those that the micro-batches bring, if any."""
        self._given = given
        self._chosen = [[] for _ in self._routers]
        self._load_XE = torch.zeros(self._num_layers, self._num_experts, dtype=torch.int64, device=device())

    @contextmanager
    def forward(self, number: int, micro: MicroBatch) -> Iterator[None]:
        """Wrap the forward pass of chunk `number`, whose micro-batches come in order.

        What its routers are asked until the next one is asked by the recomputation in a backward pass, whose
        micro-batches come in the same order.
        """
        routers, chosen = self._routers[number], self._chosen[number]
        given_lXK = None
        if self._replays:
            given_lXK = self._given[number][len(chosen)] if self._given is not None else self._of_engine(number, micro)
        for position, router in enumerate(routers):
            router.given_lK = None if given_lXK is None else given_lXK[:, position]
            router.recomputes = False
        yield
        taken = [router.chosen_lK for router in routers if router.chosen_lK is not None]
        assert len(taken) == len(routers), "a router was not asked"
        chosen_lXK = torch.stack(taken, dim=1)
        if self._replays:
            chosen.append(chosen_lXK.to(torch.int16))
        self._count(chosen_lXK + self._num_experts * self._layer_X[number][:, None], self._share(micro.is_token_L))
        for router in routers:
            router.given_lK = router.chosen_lK = None
            router.recomputes = True

    def end(self) -> Routes | None:
        """End a pass; return the experts that it used, where they are replayed."""
        for router in (router for routers in self._routers for router in routers):
            router.to_recompute.clear()
        self._given = None
        return tuple(tuple(of_chunk) for of_chunk in self._chosen) if self._replays else None

    def load(self) -> Tensor:
        """Return how many tokens of all ranks each expert was given in the last pass, [X, E]. Collective, all ranks."""
        total_XE = self._load_XE.clone()
        dist.all_reduce(total_XE, group=self._groups.world)
        return total_XE

    def _count(self, places_lXK: Tensor, is_token_l: Tensor) -> None:
        """Add the choices of tokens, not those of padding, to the load, without a wait for the device.

        places_lXK: where a chosen expert stands among the experts of all layers
        """
        counted = is_token_l[:, None, None].expand_as(places_lXK).long()
        self._load_XE.view(-1).scatter_add_(0, places_lXK.flatten(), counted.flatten())

    def _of_engine(self, number: int, micro: MicroBatch) -> Tensor | None:
        """Return the experts [l, layers of the chunk, K] that the engine chose for this rank's share of the tokens."""
        if micro.experts_LXK is None:
            return None
        return self._share(micro.experts_LXK).index_select(1, self._layer_X[number])

    def _share(self, values_L: Tensor) -> Tensor:
        """Return the rows of this tensor rank, of which each has its own with sequence parallelism."""
        if not self._groups.layout.sequence:
            return values_L
        return values_L.chunk(self._groups.layout.tensor)[self._groups.tensor_rank]
