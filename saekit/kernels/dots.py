"""Scalar products at given places of what would be a dense matrix."""

import torch
from torch import Tensor

from saekit.kernels import backend
from saekit.kernels.reference import row_of_entry

_SUM_MODE = 0  # embedding_bag's code for mode="sum"


def dots(left: Tensor, right: Tensor, right_rows: Tensor, row_starts: Tensor) -> Tensor:
    """`left[t] . right[right_rows[i]]` for every entry `i` of row `t`: embedding_bag's own gradient for its weights.

    Asking autograd for it would repeat the forward sum first, so the operation is called by name.
    """
    if backend.uses_triton(left.device):
        from saekit.kernels import triton_rows

        return triton_rows.dots(left, right, right_rows, row_starts)
    if len(right_rows) == 0:
        return left.new_empty(0)
    tokens = row_of_entry(row_starts, len(right_rows))
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        left, right, right_rows, row_starts[:-1], tokens, _SUM_MODE
    )
