"""How a gradient with respect to representations reaches the weights. Shape legend: types.py."""

from torch import Tensor


def surrogate(z_ND: Tensor, grad_ND: Tensor) -> Tensor:
    """<z, dL/dz>: a scalar whose gradient through z is that of the global loss L (GradCache, arXiv 2101.06983).

    z_ND: recomputed with a graph by the SAME weights that `grad_ND` was taken at; its value means nothing.
    Sums over micro-batches and ranks. N = 0 gives a zero that is connected to `z_ND`.
    """
    assert z_ND.shape == grad_ND.shape, (z_ND.shape, grad_ND.shape)
    return (z_ND * grad_ND.detach()).sum()
