"""What every kernel must compute, in the plainest torch there is; autograd gives the gradients.

Rows are feature-major: `w_enc` and `w_dec` are `(n_features, d_model)`, so an entry of the codes reads
one contiguous row of each. Nothing here is fast: `entries` and `cpu` are, and are tested against this.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def pre_acts(
    x: Float[Tensor, "n_tokens d_model"],
    w_enc: Float[Tensor, "n_features d_model"],
    b_enc: Float[Tensor, " n_features"],
) -> Float[Tensor, "n_tokens n_features"]:
    """`x @ w_enc.T + b_enc`: the dense matrix that the fast paths never hold whole."""
    return torch.nn.functional.linear(x, w_enc, b_enc)


def row_of_entry(row_starts: Int[Tensor, " rows"], nnz: int) -> Int[Tensor, " nnz"]:
    """The row that owns each of `nnz` entries."""
    rows = torch.arange(len(row_starts) - 1, device=row_starts.device)
    return rows.repeat_interleave(row_starts.diff(), output_size=nnz)


def encode_entries(
    x: Float[Tensor, "n_tokens d_model"],
    w_enc: Float[Tensor, "n_features d_model"],
    b_enc: Float[Tensor, " n_features"],
    features: Int[Tensor, " nnz"],
    row_starts: Int[Tensor, " rows"],
) -> Float[Tensor, " nnz"]:
    """`relu(x[t] . w_enc[f] + b_enc[f])` for every entry `(t, f)`."""
    tokens = row_of_entry(row_starts, len(features))
    return ((x[tokens] * w_enc[features]).sum(-1) + b_enc[features]).relu()


def decode_rows(
    values: Float[Tensor, " nnz"],
    features: Int[Tensor, " nnz"],
    row_starts: Int[Tensor, " rows"],
    w_dec: Float[Tensor, "n_features d_model"],
) -> Float[Tensor, "n_tokens d_model"]:
    """`out[t]` = sum of `values[i] * w_dec[features[i]]` over the entries `i` of row `t`.

    Dense equivalent: `codes.to_dense() @ w_dec`.
    """
    contributions = values[:, None] * w_dec[features]  # (nnz, d_model)
    out = w_dec.new_zeros(len(row_starts) - 1, w_dec.shape[1])
    return out.index_add(0, row_of_entry(row_starts, len(values)), contributions)
