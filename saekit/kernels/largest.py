"""The largest of every row, without sorting rows.

A cut under which nothing can be among the wanted is read off group maxima: if every row is divided into
groups, the k-th largest of the groups' maxima is at most the k-th largest of the row. What reaches it is
a few entries more than k, and these alone are sorted. Which entries are kept is exactly what a stable
sort of the row would keep: larger first, then the lower index.

On the CPU, comparing, searching and sorting are numpy's, which does each several times faster than torch.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

# above this a group's maximum says little, and below two there is no group
_LARGEST_GROUP = 64
_FIRST_STAGE = 8


def largest_of_rows(
    scores: Float[Tensor, "rows columns"], counts: Int[Tensor, " rows"]
) -> tuple[Int[Tensor, " kept"], Int[Tensor, " kept"]]:
    """Row and column of the `counts[r]` largest of each row `r`, by row, then column.

    A row of fewer columns is kept whole. Rows whose counts are alike cost least together.
    """
    rows, columns = scores.shape
    counts = counts.clamp(max=columns)
    most = int(counts.max()) if rows else 0
    if most == 0:
        nothing = torch.zeros(0, dtype=torch.int64, device=scores.device)
        return nothing, nothing
    maxima = group_maxima(scores, at_least=2 * most)
    if bool(maxima.isnan().any()):  # a diverged run: nothing compares with NaN, which a sort calls largest
        return _by_sorting(scores, counts)
    flat = positions_at_least(scores, kth_largest(maxima, most)[:, None])
    owner = flat.div(columns, rounding_mode="floor")
    kept = kept_candidates(scores.flatten().index_select(0, flat), owner, counts)
    return owner[kept], (flat - owner * columns)[kept]


def positions_at_least(scores: Shaped[Tensor, "rows columns"], cut: Tensor) -> Int[Tensor, " found"]:
    """Flat indices, rising, of what is at least `cut`, which is broadcast."""
    if _for_numpy(scores):
        return torch.from_numpy(np.flatnonzero(scores.numpy() >= cut.numpy()))
    return (scores >= cut).flatten().nonzero()[:, 0]


def positions_above(scores: Float[Tensor, "rows columns"], cut: Tensor) -> Int[Tensor, " found"]:
    """Flat indices, rising, of what is above `cut`, which is broadcast."""
    if _for_numpy(scores):
        return torch.from_numpy(np.flatnonzero(scores.numpy() > cut.numpy()))
    return (scores > cut).flatten().nonzero()[:, 0]


def kth_largest(scores: Shaped[Tensor, "rows columns"], k: int) -> Shaped[Tensor, " rows"]:
    """The k-th largest of each row, with NaN above all."""
    place = scores.shape[1] - k
    if _for_numpy(scores):
        return torch.from_numpy(np.partition(scores.numpy(), place, axis=1)[:, place].copy())
    return scores.topk(k, dim=1).values[:, -1]


def stable_order(keys: Int[Tensor, " n"], bound: int) -> Int[Tensor, " n"]:
    """`keys.argsort(stable=True)` of numbers from 0 to `bound`, exclusive."""
    if keys.device.type != "cpu":
        return keys.argsort(stable=True)
    # numpy sorts 16-bit keys by radix, some hundred times faster than torch sorts int64
    order = np.argsort((digits := keys.numpy()).astype(np.uint16), kind="stable")
    while (bound := -(-bound >> 16) if bound > 1 << 16 else 0) > 1:
        digits = digits >> 16
        order = order[np.argsort(digits[order].astype(np.uint16), kind="stable")]
    return torch.from_numpy(order)


def _for_numpy(scores: Tensor) -> bool:
    return scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64, torch.int16)


def group_maxima(scores: Tensor, *, at_least: int) -> Shaped[Tensor, "rows groups"]:
    """The largest of each of `at_least` groups or more; the scores themselves where they are too few.

    With twice as many groups as are wanted, few of the wanted share one.
    """
    size = min(_LARGEST_GROUP, scores.shape[1] // at_least)
    if size < 2:
        return scores
    whole = scores.shape[1] - scores.shape[1] % size
    maxima = scores[:, :whole]
    # in two stages of long runs, which takes two thirds of the time of one stage of short ones
    for stage in (size // _FIRST_STAGE, _FIRST_STAGE) if size % _FIRST_STAGE == 0 else (size,):
        maxima = maxima.unflatten(1, (stage, -1)).amax(1)
    return torch.cat([maxima, scores[:, whole:]], 1)


def kept_candidates(
    values: Float[Tensor, " found"], owner: Int[Tensor, " found"], counts: Int[Tensor, " rows"]
) -> Bool[Tensor, " found"]:
    """Which candidates are among the `counts` largest of their row; there are at least so many."""
    rows = len(counts)
    lengths = torch.bincount(owner, minlength=rows)
    starts = lengths.cumsum(0) - lengths
    padded = values.new_full((rows, int(lengths.max())), -torch.inf)
    place = torch.arange(len(owner), device=owner.device) - starts.index_select(0, owner)
    padded[owner, place] = values
    ranked = torch.from_numpy(np.sort(padded.numpy(), axis=1)) if _for_numpy(padded) else padded.sort(dim=1).values
    last = (ranked.shape[1] - counts).clamp(max=ranked.shape[1] - 1)
    cut = ranked.gather(1, last[:, None])[:, 0].masked_fill(counts == 0, torch.inf).index_select(0, owner)
    reached = values >= cut
    if int(reached.sum()) == int(counts.sum()):  # nobody shares the last place
        return reached
    above, level = values > cut, values == cut
    wanted = counts - torch.zeros_like(counts).index_add_(0, owner, above.to(counts.dtype))
    # how many entries of this level stand before it in its row
    before = level.cumsum(0) - level.to(torch.int64)
    before = before - before[starts.clamp(max=len(owner) - 1)][owner]
    return above | (level & (before < wanted[owner]))


def _by_sorting(scores: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    order = scores.argsort(dim=1, descending=True, stable=True)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    ranks = torch.arange(scores.shape[1], device=scores.device)
    kept.scatter_(1, order, ranks < counts[:, None])
    rows, columns = kept.nonzero(as_tuple=True)
    return rows, columns
