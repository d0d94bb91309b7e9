"""Products of bf16 by way of fp32, on any CPU. Not covered: their speed, which no test can see."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from megatron_mcpo.distributed import cpu_bf16
from tests.support.ranks import run_ranks

ULP = 2.0**-8
"""The largest relative error of rounding to bf16."""


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape).to(dtype)


def assert_rounded_once(found: Tensor, exact: Tensor, *, size: float) -> None:
    """size: of the terms that are added up, whose fp32 sum may be off"""
    assert found.dtype is torch.bfloat16
    error = (found.double() - exact).abs()
    assert bool((error <= ULP * exact.abs() + 1e-5 * size).all()), error.max()


def products() -> None:
    torch.manual_seed(0)
    cpu_bf16.install()
    a, b, c = random(33, 200), random(200, 17), random(33, 17)
    assert_rounded_once(a @ b, a.double() @ b.double(), size=200)
    assert_rounded_once(torch.addmm(c, a, b, beta=0.5, alpha=2), 0.5 * c + 2 * a.double() @ b.double(), size=400)
    x, y, z = random(3, 8, 50), random(3, 50, 6), random(3, 8, 6)
    assert_rounded_once(x @ y, x.double() @ y.double(), size=50)
    assert_rounded_once(torch.baddbmm(z, x, y, beta=0, alpha=0.125), 0.125 * x.double() @ y.double(), size=50)
    assert_rounded_once(linear(a, b.T), a.double() @ b.double(), size=200)
    assert (random(0, 200) @ b).shape == (0, 17)

    # What is not bf16 is computed as before, and what is wrong is refused as before.
    torch.testing.assert_close(a.float() @ b.float(), (a.double() @ b.double()).float(), rtol=1e-5, atol=1e-4)
    assert (a.half() @ b.half()).dtype is torch.half
    with pytest.raises(RuntimeError, match="same dtype"):
        a @ b.float()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        a @ random(199, 17)


def gradients() -> None:
    torch.manual_seed(0)
    cpu_bf16.install()
    a, b, g = random(40, 64).requires_grad_(), random(30, 64).requires_grad_(), random(40, 30)
    linear(a, b).backward(g)
    assert a.grad is not None and b.grad is not None
    assert_rounded_once(a.grad, g.double() @ b.detach().double(), size=30)
    assert_rounded_once(b.grad, g.double().T @ a.detach().double(), size=40)

    narrow = [random(2, 4, 70, 16).requires_grad_() for _ in range(3)]
    wide = [each.detach().float().requires_grad_() for each in narrow]
    upstream = random(2, 4, 70, 16)
    found = scaled_dot_product_attention(*narrow, is_causal=True, scale=0.3)
    expected = scaled_dot_product_attention(*wide, is_causal=True, scale=0.3)
    assert found.dtype is torch.bfloat16 and torch.equal(found, expected.bfloat16())
    found.backward(upstream)
    expected.backward(upstream.float())
    for one, other in zip(narrow, wide, strict=True):
        assert one.grad is not None and other.grad is not None and one.grad.dtype is torch.bfloat16
        torch.testing.assert_close(one.grad.float(), other.grad, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("check", [products, gradients])
def test_they_are_fp32_s_rounded_once(check: Callable[[], None]) -> None:
    run_ranks(1, check, timeout=120)


def replaced() -> bool:
    """Return whether the products are replaced, asked twice."""
    return cpu_bf16.apply() and cpu_bf16.apply()


def test_only_cpus_without_such_kernels_get_them() -> None:
    """This says when the module can go: as soon as no CPU that torch runs on lacks the kernels."""
    has_kernels = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert run_ranks(1, replaced, timeout=120) == [not has_kernels]
