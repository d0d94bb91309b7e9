"""Carry a gradient with respect to representations into the weights. Shape legend: types.py."""

from torch import Tensor


def surrogate(z_ND: Tensor, grad_ND: Tensor) -> Tensor:
    """Return <z, dL/dz>, whose gradient through z is that of the global loss L (GradCache, arXiv 2101.06983).

    z_ND: recomputed with a graph by the SAME weights that `grad_ND` was taken at; its value has no meaning.
    The terms of micro-batches and ranks add up. N = 0 gives a zero that is connected to `z_ND`.
    """
    assert z_ND.shape == grad_ND.shape, (z_ND.shape, grad_ND.shape)
    return (z_ND * grad_ND.detach()).sum()
