"""New weights for dead features, aimed at the tokens that are reconstructed worst.

After Bricken et al. (Towards Monosemanticity, 2023): a dead feature gets the direction of a badly
reconstructed token, drawn with a probability that grows with the square of its error, and a small encoder;
the optimiser forgets what it knew about it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.errors import SaekitError
from saekit.sae import SAE


@dataclass(frozen=True, slots=True)
class Resample:
    """When dead features are given new weights.

    Attributes:
        at: shares of the run that are done when it happens.
        encoder_norm: norm of the new encoder rows, as a share of the mean norm of the living ones.
    """

    at: tuple[float, ...] = (0.25, 0.5)
    encoder_norm: float = 0.2

    def __post_init__(self) -> None:
        if not all(0 < share < 1 for share in self.at):
            raise SaekitError(f"Resample(at={self.at}): give shares of the run between 0 and 1")

    def is_due(self, step: int, steps: int) -> bool:
        """Whether it happens before this step."""
        return step in {round(share * steps) for share in self.at}


@torch.no_grad()
def resample(
    sae: SAE,
    optimizer: torch.optim.Optimizer,
    x: Float[Tensor, "n_tokens d_model"],
    y: Float[Tensor, "n_tokens d_out"],
    dead: Bool[Tensor, " n_features"],
    *,
    encoder_norm: float,
    seed: int,
) -> Int[Tensor, " resampled"]:
    """Give the dead features new weights, in place, and say which they were.

    Args:
        x, y: inputs and targets from which the new directions are drawn, in the units of training.
        seed: of the draw.
    """
    features = dead.nonzero()[:, 0]
    error = y - sae(x)
    squared = error.square().sum(1)
    if len(features) == 0 or not bool(squared.any()):
        return features[:0]
    draw = torch.Generator().manual_seed(seed)
    chances = (squared.square() / squared.square().sum()).cpu()
    tokens = torch.multinomial(chances, len(features), replacement=True, generator=draw).to(x.device)
    alive_norm = sae.encoder[~dead].norm(dim=1).mean() if bool((~dead).any()) else sae.encoder.norm(dim=1).mean()
    # what a feature reads is the input; what it should write is what is missing
    read, _ = sae.prepare(x[tokens])
    sae.encoder[features] = torch.nn.functional.normalize(read, dim=1) * alive_norm * encoder_norm
    sae.decoder[features] = torch.nn.functional.normalize(error[tokens], dim=1)
    sae.b_enc[features] = 0
    for weight in (sae.encoder, sae.decoder, sae.b_enc):
        for moment in optimizer.state.get(weight, {}).values():
            if isinstance(moment, Tensor) and moment.shape == weight.shape:
                moment[features] = 0
    return features
