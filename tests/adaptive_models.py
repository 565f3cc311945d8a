"""Small untrained models that decide, which the tests of adaptive computation share."""

import torch
from torch import Tensor

from saekit.adaptive.a_vit import AViT, AViTConfig
from saekit.adaptive.duo_llm import DuoConfig, DuoLLM

# a gain and a shift at which untrained tokens stop at every depth
HALTING = AViTConfig(image=8, width=16, layers=4, heads=2, gain=3.0, shift=-1.0)
ROUTING = DuoConfig(vocabulary=50, width=16, layers=3, heads=2, big=32, small=4, context=12)


def a_vit_of(config: AViTConfig = HALTING, seed: int = 2) -> AViT:
    """With weights so large that images differ in what their class token does."""
    model = AViT(config, seed=seed).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "head" not in name:
                weight.mul_(2.5)
    return model


def images_of(n: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(n, 1, HALTING.image, HALTING.image, generator=torch.Generator().manual_seed(seed))


def duo_of(seed: int = 0) -> DuoLLM:
    """With weights large enough for routes to matter."""
    model = DuoLLM(ROUTING, seed=seed).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(8)
    return model


def ids_of(batch: int = 3, tokens: int = 10, seed: int = 0) -> Tensor:
    return torch.randint(0, 50, (batch, tokens), generator=torch.Generator().manual_seed(seed))
