"""Which feature of one dictionary is which of another: by the cosine of their directions."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from saekit.errors import ShapeError

# of a matrix of cosines no more than this is held at once, where the whole is not needed
_BLOCK_NUMBERS = 1 << 24


@dataclass(frozen=True, slots=True)
class Matching:
    """Pairs of features, one of each dictionary, no feature twice.

    Attributes:
        left: `(n_pairs,)` features of the first dictionary, ascending.
        right: `(n_pairs,)` their partners in the second.
        cosine: `(n_pairs,)` of the two directions; negative where they point away from each other.
    """

    left: Int[Tensor, " n_pairs"]
    right: Int[Tensor, " n_pairs"]
    cosine: Float[Tensor, " n_pairs"]


def match_directions(left: Float[Tensor, "n_left d_left"], right: Float[Tensor, "n_right d_right"]) -> Matching:
    """The one-to-one matching with the largest sum of cosines (the Hungarian method), of the smaller dictionary's size.

    Signs count: a feature that writes the opposite is another feature. Every feature of the smaller
    dictionary gets a partner, be it a bad one; look at the cosines. Needs the whole matrix of cosines and
    time that grows with the cube of the width: seconds for 4,096 features, minutes for 16,384.

    Raises:
        ShapeError: if the directions are not of one width.
    """
    from scipy.optimize import linear_sum_assignment  # half a second to import, and only comparisons need it

    cosines = _unit(left, right) @ _unit(right, left).T
    rows, columns = linear_sum_assignment(cosines.numpy(), maximize=True)
    left_rows, right_rows = torch.from_numpy(rows), torch.from_numpy(columns)
    return Matching(left_rows, right_rows, cosines[left_rows, right_rows])


def nearest(
    left: Float[Tensor, "n_left d_left"], right: Float[Tensor, "n_right d_right"]
) -> tuple[Float[Tensor, " n_left"], Int[Tensor, " n_left"]]:
    """For each direction of `left` the largest cosine with any of `right`, and whose it is.

    The mean of the cosines is known as mean max cosine similarity. Several may share a nearest one.

    Raises:
        ShapeError: if the directions are not of one width, or there are none to choose from.
    """
    if len(right) == 0:
        raise ShapeError("there are no directions to be near to; compare with at least one")
    units, others = _unit(left, right), _unit(right, left)
    best = [(part @ others.T).max(dim=1) for part in units.split(max(1, _BLOCK_NUMBERS // len(others)))]
    return torch.cat([found.values for found in best]), torch.cat([found.indices for found in best])


def cosine_of_pairs(
    left: Float[Tensor, "n_pairs d_left"], right: Float[Tensor, "n_pairs d_right"]
) -> Float[Tensor, " n_pairs"]:
    """The cosine of each row with its counterpart; 0 where one has no direction."""
    return (_unit(left, right) * _unit(right, left)).sum(1)


def _unit(directions: Tensor, others: Tensor) -> Tensor:
    if directions.shape[1] != others.shape[1]:
        raise ShapeError(
            f"directions of {directions.shape[1]} and of {others.shape[1]} numbers cannot be compared; "
            "compare dictionaries of one Site of one model"
        )
    return normalize(directions.detach().float().cpu(), dim=1)
