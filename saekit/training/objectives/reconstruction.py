"""The rule decides sparsity, so reconstruction is all that is asked."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from saekit.kernels import backend
from saekit.losses import summed_mse
from saekit.sae import SAE
from saekit.training.objectives.objective import Extra, Measured, Targets, Vectors


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """Squared error of the reconstruction: for TopK, Feature Choice and Mutual Choice."""

    finds_sparsity: ClassVar[bool] = False
    fits_start: ClassVar[bool] = True

    def extra(self, sae: SAE, sample: Vectors) -> dict[str, Tensor]:
        return {}

    def measure(self, sae: SAE, extra: Extra, x: Vectors, y: Targets) -> Measured:
        codes = sae.encode(x)
        if backend.uses_triton(x.device) and not sae.output_needs_input:
            from saekit.kernels.triton_reconstruct import reconstruct

            loss, error = reconstruct(codes.values, codes.features, codes.row_starts, sae.decoder, sae.b_dec, y)
            return Measured(codes, y + error, loss)
        y_hat = sae.decode(codes, x)
        return Measured(codes, y_hat, summed_mse(y, y_hat))

    def finished(self, sae: SAE, extra: Extra) -> SAE:
        return sae
