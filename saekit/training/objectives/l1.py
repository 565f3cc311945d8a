"""ReLU and an L1 penalty: the first sparse autoencoders of the field."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from saekit.losses import summed_mse
from saekit.sae import SAE
from saekit.selection import Threshold, check_k
from saekit.training.objectives.objective import Extra, Measured, Targets, Vectors, held_to, start_weight


@dataclass(frozen=True, slots=True)
class ReLUL1:
    """Every positive pre-activation is kept, and the sum of activations is penalised.

    Decoder rows have unit norm throughout, so activations compare. The weight of the penalty follows
    sparsity (`held_to`). Early in a run about half of all matches are active: it needs the memory and
    the time of a dense autoencoder then.

    Attributes:
        k: mean number of active features per token to aim at.
    """

    k: int

    finds_sparsity: ClassVar[bool] = True
    fits_start: ClassVar[bool] = False  # its activations come out too small as it is

    def __post_init__(self) -> None:
        check_k(type(self).__name__, self.k)

    def extra(self, sae: SAE, sample: Vectors) -> dict[str, Tensor]:
        return {"log_weight": start_weight(sample)}

    def measure(self, sae: SAE, extra: Extra, x: Vectors, y: Targets) -> Measured:
        codes = sae.with_rule(Threshold(0.0)).encode(x)
        y_hat = sae.decode(codes, x)
        penalty = codes.values.sum() / len(x)
        return Measured(codes, y_hat, summed_mse(y, y_hat) + held_to(self.k, codes, extra["log_weight"], penalty))

    def finished(self, sae: SAE, extra: Extra) -> SAE:
        return sae.with_rule(Threshold(0.0))
