"""The numbers that an intervention works on: strengths of features, or the component along a direction."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.codes import SparseCodes
from saekit.patching.intervention import AllBut, Intervention
from saekit.patching.splice import Encoded


@dataclass(frozen=True, slots=True)
class Pairs:
    """The (token, feature) pairs that an operation works on.

    Attributes:
        token: `(n,)` of each row of `old`.
        feature: `(n,)` where `old` is one entry per row, None where it has a column per feature.
        features: `(m,)` the columns; None with single entries.
        old: `(n, m)` or `(n, 1)` strengths.
    """

    token: Int[Tensor, " n"]
    feature: Int[Tensor, " n"] | None
    features: Int[Tensor, " m"] | None
    old: Float[Tensor, "n columns"]

    def address(self) -> tuple[Tensor, Tensor]:
        """Token and feature of every element of `old`, flattened."""
        if self.feature is not None:
            return self.token, self.feature
        assert self.features is not None
        n, m = self.old.shape
        return self.token.repeat_interleave(m), self.features.repeat(n)


def pairs_of(intervention: Intervention, encoded: Encoded, among_kept: Bool[Tensor, " n_tokens"]) -> Pairs:
    """Active entries alone if the operation leaves 0 at 0; else every chosen token with every named feature."""
    codes, named = encoded.codes, intervention.features
    assert named is not None
    excepted = isinstance(named, AllBut)
    features = torch.tensor(named.features if isinstance(named, AllBut) else named, device=codes.device)
    if intervention.operation.keeps_zero:
        token = codes.token_of_entry()
        wanted = among_kept[token] & (torch.isin(codes.features, features) != excepted) & (codes.values != 0)
        entries = wanted.nonzero()[:, 0]
        return Pairs(token[entries], codes.features[entries], None, codes.values[entries][:, None])
    token = among_kept.nonzero()[:, 0]
    return Pairs(token, None, features, columns_of(codes.select(token), features))


def columns_of(codes: SparseCodes, features: Int[Tensor, " m"]) -> Float[Tensor, "n_tokens m"]:
    """The strengths of some features, 0 where they are not active; differentiable in the values."""
    place = torch.full((codes.n_features,), -1, dtype=torch.int64, device=codes.device)
    place[features] = torch.arange(len(features), device=codes.device)
    column = place[codes.features]
    entries = (column >= 0).nonzero()[:, 0]
    empty = codes.values.new_zeros(codes.n_tokens, len(features))
    return empty.index_put((codes.token_of_entry()[entries], column[entries]), codes.values[entries])


def unit(direction: Tensor, like: Tensor) -> Tensor:
    direction = direction.detach().to(like.device, torch.float32)
    return direction / direction.norm()


def strength_of(codes: SparseCodes, feature: Int[Tensor, " n_tokens"]) -> Float[Tensor, " n_tokens"]:
    """Of each token, the strength of one feature, which may be another for each token."""
    token = codes.token_of_entry()
    entries = (codes.features == feature[token]).nonzero()[:, 0]
    return codes.values.new_zeros(codes.n_tokens).index_add(0, token[entries], codes.values[entries])
