"""How well a set of features, the dead or under-used, explains what the others left over.

The work of the auxiliary losses (`saekit.losses` decides who takes part). It happens on the rows of the
weights that take part, gathered once: a twentieth of the dictionary costs a twentieth of each product. Where a
token takes a good share of the members, a small dense product beats gathering rows for each entry; the dense
blocks are `(some tokens, members)`, never the whole batch.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from saekit.codes import SparseCodes
from saekit.kernels import backend
from saekit.kernels.entries import decode_rows, encode_entries
from saekit.kernels.largest import kth_largest, largest_of_rows
from saekit.kernels.select import Selection, top_of_columns, top_of_rows
from saekit.kernels.threads import ranges, side_by_side
from saekit.sae import SAE

# from this share of members per token on, dense products are faster; measured on a CPU with AVX-512
_DENSE_FROM = 1 / 8
# elements of a dense block, which stays in the cache
_BLOCK_ELEMENTS = 1 << 19


class Members(NamedTuple):
    """The features that take part, and their rows of the weights."""

    features: Int[Tensor, " members"]
    encoder: Float[Tensor, "members d_model"]
    b_enc: Float[Tensor, " members"]
    decoder: Float[Tensor, "members d_out"]

    @classmethod
    def of(cls, sae: SAE, features: Int[Tensor, " members"], *, apart: bool = False) -> "Members":
        """Gathered from an SAE, which gradients reach.

        Args:
            apart: gradients stop at the gathered rows; `hand_over` brings them to the SAE's, without ever
                making a gradient of the whole weights for the sake of a few rows.
        """
        rows = (weight[features] for weight in (sae.encoder, sae.b_enc, sae.decoder))
        return cls(features, *(row.detach().requires_grad_() if apart else row for row in rows))

    def hand_over(self, sae: SAE) -> None:
        """Add the gradients of the rows to those of the SAE."""
        for weight, row in ((sae.encoder, self.encoder), (sae.b_enc, self.b_enc), (sae.decoder, self.decoder)):
            if row.grad is not None:
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                weight.grad.index_add_(0, self.features, row.grad)


class Unexplained(NamedTuple):
    """What is to be explained.

    Attributes:
        prepared: what the encoder reads.
        scale: what each token's codes are multiplied by; None is 1.
        residual: what the codes left over.
        codes: whose entries are not used a second time.
    """

    prepared: Float[Tensor, "n_tokens d_model"]
    scale: Float[Tensor, "n_tokens 1"] | None
    residual: Float[Tensor, "n_tokens d_out"]
    codes: SparseCodes


def explain_by_token(members: Members, what: Unexplained, k: int, *, bf16: bool = False) -> Float[Tensor, ""]:
    """Each token takes its `k` strongest members.

    Args:
        bf16: round what dense products read and give to bfloat16, where that is fast; sums are float32 in them.

    Returns:
        squared error of the attempt, over the squared distance of the residual from its mean; 0 where it has none.
        The residual is a constant; gradients reach the members' rows and nothing else. An entry that the codes
        already hold is not used again; its place stays empty.
    """
    k = min(k, len(members.features))
    if k < _DENSE_FROM * len(members.features):
        picked = top_of_rows(what.prepared, members.encoder, members.b_enc, k)
        return _relative(_sparse_error(members, what, picked), what.residual)
    tokens, places = _taken(members, what.codes)
    weights = members.encoder, members.b_enc, members.decoder
    bf16 = bf16 and what.residual.device.type == "cpu" and backend.has_fast_bf16()
    return _relative(_DenseError.apply(*weights, what, tokens, places, k, bf16), what.residual)


def explain_by_feature(members: Members, what: Unexplained, claims: Int[Tensor, " members"]) -> Float[Tensor, ""]:
    """Each member takes as many of its strongest tokens as it claims; else as `explain_by_token`."""
    picked = top_of_columns(what.prepared, members.encoder, members.b_enc, claims)
    return _relative(_sparse_error(members, what, picked), what.residual)


def _relative(error: Tensor, residual: Tensor) -> Float[Tensor, ""]:
    spread = (residual - residual.mean(0)).square().sum()
    # nan_to_num would hide a division by zero from the loss, but not from the gradient
    explainable = spread > 0
    return torch.where(explainable, error / spread.masked_fill(~explainable, 1.0), 0.0)


def _sparse_error(members: Members, what: Unexplained, picked: Selection) -> Float[Tensor, ""]:
    picked = _without_taken(picked, *_taken(members, what.codes), len(members.features))
    values = encode_entries(what.prepared, members.encoder, members.b_enc, picked)
    if what.scale is not None:
        values = values * what.scale.flatten().repeat_interleave(picked.row_starts.diff())
    explained = decode_rows(values, picked.features, picked.row_starts, members.decoder)
    return (what.residual - explained).square().sum()


def _taken(members: Members, codes: SparseCodes) -> tuple[Tensor, Tensor]:
    """Token and place among the members of every active entry that is one of theirs, by token."""
    place = torch.full((codes.n_features,), -1, device=codes.device)
    place[members.features] = torch.arange(len(members.features), device=codes.device)
    places = place[codes.features]
    taken = ((places >= 0) & (codes.values != 0)).nonzero()[:, 0]
    tokens = torch.searchsorted(codes.row_starts, taken, right=True) - 1
    return tokens, places[taken]


def _without_taken(picked: Selection, tokens: Tensor, places: Tensor, n_members: int) -> Selection:
    """The same selection with scores set negative where an entry is taken."""
    if len(tokens) == 0 or len(picked.features) == 0:
        return picked
    rows = torch.arange(len(picked.row_starts) - 1, device=tokens.device)
    owner = rows.repeat_interleave(picked.row_starts.diff(), output_size=len(picked.features))
    # by token, then place, as selections are
    taken = (tokens * n_members + places).sort().values
    mine = owner * n_members + picked.features
    nearest = torch.searchsorted(taken, mine).clamp(max=len(taken) - 1)
    return picked._replace(scores=picked.scores.masked_fill(taken[nearest] == mine, -1.0))


class _DenseError(torch.autograd.Function):
    """Squared error of the attempt; the gradients are made in the same visit, since they differ by a factor only."""

    @staticmethod
    def forward(
        ctx: Any,
        encoder: Tensor,
        b_enc: Tensor,
        decoder: Tensor,
        what: Unexplained,
        tokens: Tensor,
        places: Tensor,
        k: int,
        bf16: bool,
    ):
        weights = encoder, b_enc, decoder
        needs_gradients = any(ctx.needs_input_grad)
        narrow = Tensor.bfloat16 if bf16 else Tensor.contiguous
        reads, bias, writes = map(narrow, weights)

        def of(part: slice) -> tuple[Tensor, list[Tensor]]:
            total, grads = what.residual.new_zeros(()), [torch.zeros_like(weight) for weight in weights]
            for block, first, end in _token_blocks(part, len(encoder), tokens):
                x = narrow(what.prepared[block])
                values = torch.addmm(bias, x, reads.T).to(encoder.dtype)
                _keep_largest_(values, k)
                values[tokens[first:end] - block.start, places[first:end]] = 0
                scale = None if what.scale is None else what.scale[block]
                values = narrow(values if scale is None else values.mul_(scale))
                error = (values @ writes).to(encoder.dtype).sub_(what.residual[block])
                total += error.square().sum()
                if needs_gradients:
                    error = narrow(error)
                    # nothing goes through entries that are not active
                    slope = torch.ops.aten.threshold_backward(error @ writes.T, values, 0.0)
                    slope = slope if scale is None else slope.mul_(scale)
                    grads[0] += slope.T @ x
                    grads[1] += slope.sum(0)
                    grads[2] += values.T @ error
            return total, grads

        totals, grads = zip(*side_by_side(of, ranges(what.residual)), strict=True)
        ctx.save_for_backward(*(torch.stack(parts).sum(0) for parts in zip(*grads, strict=True)))
        return torch.stack(totals).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        return *(2 * grad * slope for slope in ctx.saved_tensors), *[None] * 5


def _token_blocks(part: slice, n_members: int, tokens: Tensor) -> Iterator[tuple[slice, int, int]]:
    """A range of tokens in slices, and which of the rising `tokens` lie in them."""
    rows = max(1, _BLOCK_ELEMENTS // max(1, n_members))
    edges = [*range(part.start, part.stop, rows), part.stop]
    bounds = torch.searchsorted(tokens, torch.tensor(edges, device=tokens.device)).tolist()
    for (start, first), (stop, end) in pairwise(zip(edges, bounds, strict=True)):
        yield slice(start, stop), first, end


def _keep_largest_(values: Tensor, k: int) -> None:
    """Set to zero what is not among the `k` largest of its row, or not positive."""
    # a cut decides something only where more than k are positive
    crowded = ((values > 0).sum(1) > k).nonzero()[:, 0]
    if len(crowded):
        chosen = values[crowded]
        below = chosen < kth_largest(chosen, k)[:, None]
        if int(below.sum()) != len(chosen) * (chosen.shape[1] - k):  # equals at the cut: the first of them
            below.fill_(True)
            below[largest_of_rows(chosen, torch.full((len(chosen),), k, device=chosen.device))] = False
        values[crowded] = chosen.masked_fill_(below, 0)
    values.relu_()
