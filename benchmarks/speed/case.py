"""What every contender gets: a size, the same batches, and the same dead features. Imports torch alone, for peers."""

from typing import NamedTuple

import torch
from torch import Tensor

BATCHES = 4
# of the features, in runs with an auxiliary loss: an assumption, on which its cost depends in proportion
DEAD_SHARE = 0.05


class Size(NamedTuple):
    """Tokens per step, width of the activations, features, and active features per token."""

    n_tokens: int
    d_model: int
    n_features: int
    k: int

    @classmethod
    def parse(cls, text: str) -> "Size":
        return cls(*map(int, text.split("x")))

    def __str__(self) -> str:
        return "x".join(map(str, self))


def batches(size: Size, device: str) -> list[Tensor]:
    """Gaussian activations with a covariance, unit variance on average, the same for every contender."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(size.d_model, size.d_model, generator=generator) / size.d_model**0.5
    return [(torch.randn(size.n_tokens, size.d_model, generator=generator) @ mix).to(device) for _ in range(BATCHES)]


def dead_features(size: Size) -> Tensor:
    """Which features count as dead: `(n_features,)`, true for `DEAD_SHARE` of them."""
    chosen = torch.randperm(size.n_features, generator=torch.Generator().manual_seed(1))
    return torch.zeros(size.n_features, dtype=torch.bool).index_fill_(
        0, chosen[: int(DEAD_SHARE * size.n_features)], True
    )
