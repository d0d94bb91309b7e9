"""Emulate FP8 products for tests on a CPU: values are rounded to FP8 and back, the products are in fp32.

This shows what rounding does to losses and gradients, on the grids of Transformer Engine's recipes; it is slower than
without FP8. Nothing in the package imports it and no configuration reaches it.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_mcpo.mcore.model import unwrap

Recipe = Literal["blockwise", "tensorwise"]
_LINEARS = ("ColumnParallelLinear", "RowParallelLinear")  # Megatron's
_BLOCK = 128


def emulate(chunks: Sequence[nn.Module], recipe: Recipe) -> int:
    """Round the operands of all products of all layers but the first and the last; return the number of modules.

    For one rank of a model made of plain torch modules. It can't be undone.
    """
    found = linears(chunks)
    for module in found:
        module._forward_impl = _Forward(recipe)
    return len(found)


def linears(chunks: Sequence[nn.Module]) -> list[Any]:
    """Return the linear modules of all layers but the first and the last, in order."""
    layers = [layer for chunk in chunks for layer in unwrap(chunk).decoder.layers]
    return [module for layer in layers[1:-1] for module in layer.modules() if type(module).__name__ in _LINEARS]


def linear(x: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
    """Multiply x [T, K] by weight [N, K] transposed; the products forward, for x and for the weight are emulated."""
    return _Linear.apply(x, weight, recipe)


def rounded(values: Tensor, block: tuple[int, int] | None, dtype: torch.dtype) -> Tensor:
    """Round a matrix to `dtype` and back to fp32. block: rows, columns that share a scale; None: the whole matrix.

    The largest entry of a block becomes the largest number of `dtype`.
    """
    rows, columns = values.shape
    height, width = block or (rows, columns)
    padded = F.pad(values.float(), (0, -columns % width, 0, -rows % height))
    blocks = padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width)
    scale = torch.finfo(dtype).max / blocks.abs().amax(dim=(1, 3), keepdim=True).clamp_min(1e-12)
    return ((blocks * scale).to(dtype).float() / scale).view_as(padded)[:rows, :columns]


class _Forward:
    """The replacement of a Megatron linear's `_forward_impl`."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    def __call__(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        **_: Any,
    ) -> Tensor:
        assert not allreduce_dgrad and not sequence_parallel, "one tensor rank"
        product = linear(input.flatten(0, -2), weight, self.recipe).unflatten(0, input.shape[:-1])
        return product if bias is None else product + bias


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.recipe = recipe
        square = (_BLOCK, _BLOCK) if recipe == "blockwise" else None
        weight_q = rounded(weight, square, torch.float8_e4m3fn)
        return (_activation(x, recipe) @ weight_q.T).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (x, weight), recipe, (grad,) = ctx.saved_tensors, ctx.recipe, grads
        square = (_BLOCK, _BLOCK) if recipe == "blockwise" else None
        weight_q = rounded(weight, square, torch.float8_e4m3fn)
        grad_x = _gradient(grad, recipe) @ weight_q
        # This product sums over tokens, and so do the strips that share a scale.
        grad_weight = _gradient(grad.T, recipe) @ _activation(x.T, recipe).T
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


def _activation(x: Tensor, recipe: Recipe) -> Tensor:
    return rounded(x, (1, _BLOCK) if recipe == "blockwise" else None, torch.float8_e4m3fn)


def _gradient(grad: Tensor, recipe: Recipe) -> Tensor:
    if recipe == "blockwise":
        return rounded(grad, (1, _BLOCK), torch.float8_e4m3fn)
    return rounded(grad, None, torch.float8_e5m2)
