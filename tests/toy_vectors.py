"""Synthetic activations that a sparse dictionary explains, for the tests of training."""

import torch
from torch import Tensor

D_MODEL = 16


def mixtures(n: int, *, seed: int, active: int = 3) -> Tensor:
    """`(n, 16)` sums of `active` of the same 24 directions, off centre."""
    directions = torch.nn.functional.normalize(
        torch.randn(24, D_MODEL, generator=torch.Generator().manual_seed(9)), dim=1
    )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(n, 24, generator=generator).argsort(1) < active
    return (chosen * (torch.rand(n, 24, generator=generator) + 0.5)) @ directions * 3 + 1
