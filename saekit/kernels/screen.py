"""Finding the entries that can be among the largest with a product in bfloat16, and proving that none was missed.

The product is two to four times faster in bfloat16 on CPUs with instructions for it. It decides nothing: it
says which entries may reach a cut, with a bound on its error, and these are computed again in float32.
With `xb`, `wb` for the rounded `x`, `w`, the exact score of an entry differs from the screened one by at most

    |x - xb| |w| + |xb| |w - wb| + (d + 2) 2**-23 |x| |w| + 2**-8 (1 + 2**-7) (|screened| + |b|)

(Cauchy-Schwarz; sums in float32 in any order, the exact one included; the rounding of bias and result). The
largest norms of the columns stand for all of them, so that a row has one bound. A row for which the bound proves
nothing useful, since its cut is not positive, it holds something that is not finite, or too many entries
may reach the cut, is not certified, and is computed in float32 as a whole. Either way what is kept is what the
exact float32 scores of all entries would keep; only entries whose scores are equal up to the rounding of a float32
sum may change places.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.kernels import backend
from saekit.kernels.dots import dots
from saekit.kernels.largest import group_maxima, kept_candidates, kth_largest, largest_of_rows, positions_at_least
from saekit.kernels.threads import ranges, side_by_side

_asked: ContextVar[bool] = ContextVar("bf16_screening", default=False)
# candidates per wanted entry from which computing everything is as fast
_MOST_CANDIDATES = 8
# visited together when columns are rounded, so that what is read three times stays in the cache
_ROWS_IN_CACHE = 256
# the largest pattern of a bfloat16 is no number; those of infinity and all others that are none lie below
_NEVER, _INFINITE = 0x7FFF, 0x7F80
_ROUNDING = 2.0**-8 * (1 + 2.0**-7)

Found = tuple[Int[Tensor, " found"], Int[Tensor, " found"], Float[Tensor, " found"]]
"""Row, column and exact score of entries, by row, then column."""


@contextmanager
def bf16_screening(asked: bool = True) -> Iterator[None]:
    """Within it, selection screens in bfloat16 where that is fast."""
    token = _asked.set(asked)
    try:
        yield
    finally:
        _asked.reset(token)


def is_screening(x: Tensor) -> bool:
    """Whether selection from products of `x` is to be screened here and now."""
    return _asked.get() and x.device.type == "cpu" and x.dtype == torch.float32 and backend.has_fast_bf16()


class Columns(NamedTuple):
    """One side of the product, prepared once for all blocks of rows.

    Attributes:
        exact, rounded: `(n_columns, d)`.
        bias: added to each column's scores.
        norm, rounding: largest norm of an exact column, and of what rounding took from one.
        bias_rounding: bound on what rounding takes from a bias.
    """

    exact: Float[Tensor, "n_columns d"]
    rounded: Tensor
    bias: Float[Tensor, " n_columns"]
    norm: Tensor
    rounding: Tensor
    bias_rounding: Tensor

    @classmethod
    def of(cls, exact: Float[Tensor, "n_columns d"], bias: Float[Tensor, " n_columns"]) -> "Columns":
        rounded = torch.empty_like(exact, dtype=torch.bfloat16)

        def largest(part: slice) -> Tensor:
            blocks = zip(exact[part].split(_ROWS_IN_CACHE), rounded[part].split(_ROWS_IN_CACHE), strict=True)
            found = [(_norms(block).max(), _norms(block - low.copy_(block)).max()) for block, low in blocks]
            return torch.tensor(found).amax(0)

        norm, rounding = torch.stack(side_by_side(largest, ranges(exact))).amax(0)
        return cls(exact, rounded, bias, norm, rounding, bias.abs().max() * _ROUNDING)


def largest_of_products(rows: Float[Tensor, "rows d"], columns: Columns, counts: Int[Tensor, " rows"]) -> Found:
    """The `counts[r]` largest of each row of `rows @ columns.T + bias`, found by screening."""
    screened, slack = _screen(rows, columns)
    most = int(counts.clamp(max=len(columns.exact)).max()) if len(rows) else 0
    if most == 0:
        return _exactly(rows, columns, counts)
    maxima = group_maxima(screened, at_least=2 * most)
    cut_bits = kth_largest(maxima, most)
    finite = (maxima.amax(1) < _INFINITE) & slack.isfinite()
    cut = cut_bits.view(torch.bfloat16).float()
    certified = finite & (cut_bits > 0)
    # at least `most` entries of the row score this much exactly
    reached = cut - cut.abs() * _ROUNDING - slack
    found = _may_reach(screened, torch.where(certified, reached, torch.nan), slack)
    if len(found) > _MOST_CANDIDATES * int(counts.sum()):
        return _exactly(rows, columns, counts)
    certified &= reached > slack
    owner, column, scores = _scored(rows, columns, found)
    kept = kept_candidates(scores, owner, counts.masked_fill(~certified, 0)) if len(found) else owner > 0
    mine = owner[kept], column[kept], scores[kept]
    if bool(certified.all()):
        return mine
    rest = (~certified).nonzero()[:, 0]
    others = _exactly(rows[rest], columns, counts[rest])
    row = torch.cat([mine[0], rest[others[0]]])
    order = row.argsort(stable=True)
    return row[order], torch.cat([mine[1], others[1]])[order], torch.cat([mine[2], others[2]])[order]


def products_above(
    rows: Float[Tensor, "rows d"], columns: Columns, cut: Float[Tensor, ""], *, expected: int
) -> Found | None:
    """All entries of `rows @ columns.T + bias` above `cut`; None where screening cannot certify them.

    Args:
        expected: about how many there are; where far more may be, computing everything is as fast.
    """
    screened, slack = _screen(rows, columns)
    reached = cut.expand(len(rows))
    if not bool((reached > slack).all()) or int(screened.max()) >= _INFINITE:
        return None
    found = _may_reach(screened, reached, slack)
    if len(found) > _MOST_CANDIDATES * max(expected, len(rows)):
        return None
    owner, column, scores = _scored(rows, columns, found)
    above = scores > cut
    return owner[above], column[above], scores[above]


def _screen(rows: Tensor, columns: Columns) -> tuple[Tensor, Tensor]:
    """Screened scores as the bit patterns of bfloat16, which rise with positive numbers, and each row's error bound.

    The bound leaves out the rounding of the result, which is relative to it.
    """
    rounded = rows.bfloat16()
    screened = torch.addmm(columns.bias.bfloat16(), rounded, columns.rounded.T)
    exact_norms = _norms(rows)
    slack = (
        _norms(rows - rounded) * columns.norm
        + _norms(rounded.float()) * columns.rounding
        + (rows.shape[1] + 2) * 2.0**-23 * exact_norms * columns.norm
        + columns.bias_rounding
    )
    return screened.view(torch.int16), slack * (1 + 2.0**-10)  # the norms are rounded too


def _may_reach(screened: Tensor, reached: Tensor, slack: Tensor) -> Int[Tensor, " found"]:
    """Flat places of entries whose exact score may be `reached` or more; none in rows where that is not positive."""
    least = (reached - slack) / (1 + _ROUNDING)
    # the smallest bfloat16 that is not below it, in the upper half of the float's bits
    bits = ((least.contiguous().view(torch.int32) + 0xFFFF) >> 16).to(torch.int16)
    return positions_at_least(screened, torch.where(least > 0, bits, _NEVER).to(torch.int16)[:, None])


def _scored(rows: Tensor, columns: Columns, found: Tensor) -> Found:
    owner = found.div(len(columns.exact), rounding_mode="floor")
    column = found - owner * len(columns.exact)
    starts = torch.zeros(len(rows) + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(owner, minlength=len(rows)), 0, out=starts[1:])
    return owner, column, dots(rows, columns.exact, column, starts) + columns.bias[column]


def _exactly(rows: Tensor, columns: Columns, counts: Tensor) -> Found:
    scores = torch.addmm(columns.bias, rows, columns.exact.T)
    owner, column = largest_of_rows(scores, counts)
    return owner, column, scores[owner, column]


def _norms(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vectors.float(), dim=1)
