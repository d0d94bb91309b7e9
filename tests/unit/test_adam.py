"""The optimizer against torch.optim.AdamW, and the layout of its state that Megatron-Core's checkpoints rely on.

Not covered: parameters on a GPU; saving and loading through Megatron-Core (test_cpu_backend.py saves).
"""

import pytest
import torch
from torch import nn

from megatron_mcpo.mcore.adam import FusedAdam, install


def _params(seed: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(5, 3), (7,), (0,), (2, 2)]]


def test_equals_torch_adamw_with_two_groups_and_a_changing_learning_rate() -> None:
    mine, theirs = _params(0), _params(0)
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
    optimizers = [
        kind(
            [{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:], "weight_decay": 0.0}],
            **settings,
        )
        for kind, params in ((FusedAdam, mine), (torch.optim.AdamW, theirs))
    ]
    generator = torch.Generator().manual_seed(1)
    for step in range(5):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (step + 1)
            optimizer.step()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert not torch.equal(mine[0], _params(0)[0])


def test_state_is_moments_by_parameter_and_step_by_group() -> None:
    params = _params(0)
    optimizer = FusedAdam([{"params": params[:1]}, {"params": []}, {"params": params[1:]}], lr=1e-2)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.step()
    assert [group.get("step") for group in optimizer.param_groups] == [2, None, 2]
    state = optimizer.state[params[0]]
    assert set(state) == {"exp_avg", "exp_avg_sq"}
    torch.testing.assert_close(state["exp_avg"], torch.full((5, 3), 1 - 0.9**2))
    torch.testing.assert_close(state["exp_avg_sq"], torch.full((5, 3), 1 - 0.999**2))
    assert params[2] not in optimizer.state, "an empty parameter has no state"


def test_state_goes_on_after_a_reload() -> None:
    def train(steps: int, optimizer: FusedAdam, params: list[nn.Parameter]) -> None:
        for _ in range(steps):
            for param in params:
                param.grad = param.detach().clone()
            optimizer.step()

    straight, halves = _params(0), _params(0)
    train(4, FusedAdam(straight, lr=1e-2), straight)
    first = FusedAdam(halves, lr=1e-2)
    train(2, first, halves)
    second = FusedAdam(halves, lr=1e-2)
    second.load_state_dict(first.state_dict())
    train(2, second, halves)
    for a, b in zip(straight, halves, strict=True):
        assert torch.equal(a, b)


def test_modes_it_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match="adam_w_mode"):
        FusedAdam(_params(0), adam_w_mode=False)
    with pytest.raises(ValueError, match="capturable"):
        FusedAdam(_params(0), capturable=True)


def test_megatron_uses_it_for_its_optimizers() -> None:
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    assert install()
    assert optimizer.Adam is FusedAdam and distrib_optimizer.Adam is FusedAdam
