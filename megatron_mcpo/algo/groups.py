"""Sum over groups. Shape legend: types.py; X: the grouped elements."""

import torch
from torch import Tensor


def group_sums(values_X: Tensor, group_X: Tensor) -> Tensor:
    """Return the sum over each element's group (equal numbers in `group_X`), in the place of every element: [X, ...].

    values_X: [X, ...]
    """
    _, number_X = torch.unique(group_X, return_inverse=True)
    return torch.zeros_like(values_X).index_add(0, number_X, values_X)[number_X]
