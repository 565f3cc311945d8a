"""Matryoshka SAEs (Bussmann et al., arXiv 2503.17547): every prefix of the dictionary must reconstruct by itself.

Selection is that of the whole dictionary, once, under any rule; only the loss knows of prefixes. General
features settle in front, where they serve every prefix, and are not split up by the special ones behind.
"""

import itertools
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from saekit.errors import SaekitError
from saekit.kernels.entries import decode_rows
from saekit.losses import summed_mse
from saekit.sae import SAE
from saekit.training.objectives.objective import Extra, Measured, Targets, Vectors


@dataclass(frozen=True, slots=True)
class Matryoshka:
    """Mean squared error over the reconstructions of all prefixes.

    Attributes:
        prefixes: shares of the dictionary, rising, the last one 1.
    """

    prefixes: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)

    finds_sparsity: ClassVar[bool] = False
    fits_start: ClassVar[bool] = True

    def __post_init__(self) -> None:
        rises = all(a < b for a, b in itertools.pairwise((0.0, *self.prefixes)))
        if not rises or self.prefixes[-1:] != (1.0,):
            raise SaekitError(
                f"prefixes={self.prefixes}: give shares of the dictionary that rise from above 0 to exactly 1, "
                "as in (0.25, 0.5, 1.0)"
            )

    def extra(self, sae: SAE, sample: Vectors) -> dict[str, Tensor]:
        return {}

    def measure(self, sae: SAE, extra: Extra, x: Vectors, y: Targets) -> Measured:
        codes = sae.encode(x)
        ends = [round(share * sae.n_features) for share in self.prefixes]
        if ends[0] < 1:
            raise SaekitError(
                f"the first prefix, {self.prefixes[0]} of {sae.n_features:,} features, is empty; give a larger one"
            )
        # what does not depend on the codes: bias and skip connection
        y_hat = sae.decode(codes.where(codes.features < 0), x)
        loss = y_hat.new_zeros(())
        for first, end in itertools.pairwise((0, *ends)):
            part = codes.where((codes.features >= first) & (codes.features < end))
            y_hat = y_hat + decode_rows(part.values, part.features, part.row_starts, sae.decoder)
            loss = loss + summed_mse(y, y_hat) / len(ends)
        return Measured(codes, y_hat, loss)

    def finished(self, sae: SAE, extra: Extra) -> SAE:
        return sae
