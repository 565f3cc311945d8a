"""Scalar products at given places of what would be a dense matrix."""

import warnings

import torch
from torch import Tensor

from saekit.kernels import backend
from saekit.kernels.reference import row_of_entry

_SUM_MODE = 0  # embedding_bag's code for mode="sum"


with warnings.catch_warnings():
    # torch says once in a process that compressed rows are in beta, which the tests of this would notice
    warnings.simplefilter("ignore")
    torch.eye(1).to_sparse_csr()


def dots(left: Tensor, right: Tensor, right_rows: Tensor, row_starts: Tensor) -> Tensor:
    """`left[t] . right[right_rows[i]]` for every entry `i` of row `t`."""
    if backend.uses_triton(left.device):
        from saekit.kernels import triton_rows

        return triton_rows.dots(left, right, right_rows, row_starts)
    if len(right_rows) == 0:
        return left.new_empty(0)
    if left.device.type == "cpu" and left.dtype in (torch.float32, torch.float64):
        # a product sampled at the places of a sparse matrix takes two thirds of the time of what follows
        size, zeros = (len(left), len(right)), left.new_zeros(len(right_rows))
        places = torch.sparse_csr_tensor(row_starts, right_rows, zeros, size, check_invariants=False)
        return torch.sparse.sampled_addmm(places, left, right.T).values()
    tokens = row_of_entry(row_starts, len(right_rows))
    # embedding_bag's own gradient for its weights; asking autograd for it would repeat the forward sum first
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        left, right, right_rows, row_starts[:-1], tokens, _SUM_MODE
    )
