"""How many tokens each feature may have: exact integer budgets on a capped Zipf-Mandelbrot curve.

That budgets under Feature Choice follow a Zipf curve is reported of arXiv 2411.02124; this curve, its
caps and floors, the rounding and the batch-size law are our reconstruction.
"""

import math
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.errors import SaekitError

# the weakest rank counts as granted one token when its share is one but for rounding
_ROUNDING = 1e-9
_LEAST_SHARE = 1e-12


def zipf_budgets(
    k: int,
    *,
    n_tokens: int,
    n_features: int,
    exponent: float,
    offset: float,
    floor: int | None = None,
    cap: float = 1.0,
) -> Int[Tensor, " n_features"]:
    """Integers `m_1 >= m_2 >= ...` on the curve `c * (r + offset) ** -exponent` with sum exactly `k * n_tokens`.

    The curve is clipped to at most `cap * n_tokens` (rounded up), and from below to `floor`; `c` is found by bisection
    so that the clipped curve has the right sum, and the units lost by rounding down go to the largest
    fractional parts, lower ranks first.

    Args:
        floor: least budget of any feature. None clips nothing from below, so that the shape of the curve
            is kept: the batch must then be so large that the last rank is granted a token by itself.

    Raises:
        SaekitError: if the batch is too small, naming the smallest that works, or no curve has the sum.
    """
    total = k * n_tokens
    if n_tokens == 0:
        return torch.zeros(n_features, dtype=torch.int64)
    smallest = smallest_batch(k, n_features=n_features, exponent=exponent, offset=offset, floor=floor, cap=cap)
    if n_tokens < smallest:
        advice = "" if floor is not None or exponent == 0 else ", or floor=1, which flattens the tail of the curve"
        raise SaekitError(
            f"a batch of {n_tokens:,} tokens has {total:,} matches to share among {n_features:,} features, which "
            f"grants the rarest less than {1 if floor is None else floor}; use at least {smallest:,} tokens "
            f"(several batches may be pooled){advice}"
        )
    least = (floor or 0) / n_tokens
    shares = zipf_shares(k, n_features=n_features, exponent=exponent, offset=offset, least=least, most=cap)
    return _rounded(shares * n_tokens, total, math.ceil(cap * n_tokens - _ROUNDING))


@lru_cache(maxsize=256)
def smallest_batch(
    k: int, *, n_features: int, exponent: float, offset: float, floor: int | None = None, cap: float = 1.0
) -> int:
    """The fewest tokens whose budget grants every feature `floor` tokens, or one where the curve alone decides.

    Without a floor this is the law `n_tokens >= n_features ** exponent * sum(r ** -exponent) / k` (for offset
    0, up to the cap, which hands on what the first ranks may not take): `n_features * H / k` at exponent 1.
    """
    if floor is not None:
        return -(-n_features * floor // k)
    share = float(zipf_shares(k, n_features=n_features, exponent=exponent, offset=offset, most=cap)[-1])
    if share < _LEAST_SHARE:
        raise SaekitError(
            f"with exponent={exponent:g} the rarest of {n_features:,} features would wait for ever for its first "
            "token; choose a smaller exponent, a larger offset, or floor=1"
        )
    return math.ceil((1 - _ROUNDING) / share)


@lru_cache(maxsize=64)
def zipf_shares(
    k: int, *, n_features: int, exponent: float, offset: float, least: float = 0.0, most: float = 1.0
) -> Float[Tensor, " n_features"]:
    """Budgets per token, before rounding: they sum to `k`, whatever the batch. Not to be changed by the caller.

    Raises:
        SaekitError: if no curve has the sum.
    """
    if k > most * n_features:
        raise SaekitError(
            f"{n_features:,} features on at most {most:g} of all tokens each cannot spend k={k} on every token; "
            "choose a smaller k, or a larger cap"
        )
    # in logarithms, since a steep curve leaves the range of floating point
    log_weights = -exponent * (torch.arange(1, n_features + 1, dtype=torch.float64) + offset).log()
    # from where even the first rank has next to nothing to where even the last is at its cap
    low, high = math.log(k / n_features) - 50 - float(log_weights[0]), math.log(most) - float(log_weights[-1])
    for _ in range(200):
        log_scale = (low + high) / 2
        if float((log_scale + log_weights).exp().clamp(least, most).sum()) < k:
            low = log_scale
        else:
            high = log_scale
    return (high + log_weights).exp().clamp(least, most)


def _rounded(exact: Float[Tensor, " n_features"], total: int, most: int) -> Int[Tensor, " n_features"]:
    """Whole numbers near `exact` that sum to `total`, none above `most`."""
    budgets = (exact + _ROUNDING).floor().to(torch.int64)
    missing = total - int(budgets.sum())
    order = (exact - budgets).sub((budgets >= most).double()).sort(descending=True, stable=True).indices
    while missing > 0:  # more than once round only when rounding left more units than features below the cap
        open_ranks = order[budgets[order] < most][:missing]
        budgets[open_ranks] += 1
        missing -= len(open_ranks)
    return budgets.sort(descending=True).values
