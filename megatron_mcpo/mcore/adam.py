"""Provide Adam with the interface and the state of the FusedAdam of Transformer Engine and NVIDIA apex.

Where neither is installed, Megatron-Core falls back to torch.optim.AdamW, whose state it can save but not load into a
distributed optimizer: the step is kept per parameter there and per group here. With this class all machines write
the same kind of optimizer checkpoint.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


class FusedAdam(torch.optim.Optimizer):
    """AdamW. State: `exp_avg` and `exp_avg_sq` per parameter, `step` (int) per parameter group.

    The formula is torch.optim.AdamW's. It takes those of the original's keywords that Megatron-Core passes, and raises
    ValueError for `adam_w_mode=False` and for `capturable=True`, which nothing here needs.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ):
        if not adam_w_mode:
            raise ValueError(
                "adam_w_mode = False: must be True (weight decay is decoupled here); set decoupled_weight_decay = True"
            )
        if capturable:
            raise ValueError(
                "capturable = True: must be False (no CUDA graph is captured here); set optimizer_cuda_graph = False"
            )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; groups without parameters keep their step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["params"]:
                self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        done = group.get("step", 0)
        group["step"] = done + 1
        params = [p for p in group["params"] if p.grad is not None and p.numel() > 0]
        if not params:
            return
        states = [self._state_of(p) for p in params]
        adamw(
            params,
            [p.grad for p in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            max_exp_avg_sqs=[],
            state_steps=[torch.full((), float(done), device=p.device) for p in params],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        return state


def install() -> bool:
    """Make Megatron-Core use this class unless it found a FusedAdam of its own; return whether it does."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return optimizer.Adam is FusedAdam
    optimizer.Adam = distrib_optimizer.Adam = FusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    # To Megatron-Core this is the layout of apex: the step belongs to the parameter group.
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
    return True
