"""What an SAE does to each token before encoding, and how its output gets back into the units of the input.

    Plain           u = x - b                                 x_hat = y
    EqualNorms      u = (x - b) / s,   s = |x - b| / sqrt(d)  x_hat = y          codes are multiplied by s
    ConstantNorm    u = x / s - b,     s = |x| / sqrt(d)      x_hat = y * s
    LayerNorm       u = (x - m) / (s + eps) - b               x_hat = y * s + m

with `b` the bias that the encoder subtracts and `y = codes @ W_dec + b_dec`. Values without state: what a
token needs on the way out is read off that token again, so decoding never depends on what was encoded
before. Scalings that are the same for every token are not here: they are folded into the weights.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

Vectors = Float[Tensor, "n_tokens d_model"]
Outputs = Float[Tensor, "n_tokens d_out"]
PerToken = Float[Tensor, "n_tokens 1"]

_SMALLEST = 1e-6


@runtime_checkable
class Normalisation(Protocol):
    """How tokens are scaled before encoding; a frozen value."""

    needs_input: ClassVar[bool]
    """Whether `restore` reads the input, so that decoding must be given it."""

    def prepare(self, x: Vectors, bias: Float[Tensor, " d_model"] | None) -> tuple[Vectors, PerToken | None]:
        """What the encoder reads, and what its codes are then multiplied by (None is 1)."""
        ...

    def restore(self, y: Outputs, x: Vectors | None) -> Outputs:
        """The output in the units of the input `x`."""
        ...


@dataclass(frozen=True, slots=True)
class Plain:
    """Tokens keep their norms."""

    needs_input: ClassVar[bool] = False

    def prepare(self, x: Vectors, bias: Float[Tensor, " d_model"] | None) -> tuple[Vectors, PerToken | None]:
        return x if bias is None else x - bias, None

    def restore(self, y: Outputs, x: Vectors | None) -> Outputs:
        return y


@dataclass(frozen=True, slots=True)
class EqualNorms:
    """Every centred token is brought to norm `sqrt(d_model)`, and its codes back to its own scale."""

    needs_input: ClassVar[bool] = False

    def prepare(self, x: Vectors, bias: Float[Tensor, " d_model"] | None) -> tuple[Vectors, PerToken | None]:
        centred = x if bias is None else x - bias
        scale = _norm_per_dimension(centred)
        return centred / scale, scale

    def restore(self, y: Outputs, x: Vectors | None) -> Outputs:
        return y


@dataclass(frozen=True, slots=True)
class ConstantNorm:
    """Every token is brought to norm `sqrt(d_model)` before the bias is subtracted (SAELens' `constant_norm_rescale`).

    Codes stay in those units.
    """

    needs_input: ClassVar[bool] = True

    def prepare(self, x: Vectors, bias: Float[Tensor, " d_model"] | None) -> tuple[Vectors, PerToken | None]:
        scaled = x / _norm_per_dimension(x)
        return scaled if bias is None else scaled - bias, None

    def restore(self, y: Outputs, x: Vectors | None) -> Outputs:
        assert x is not None
        return y * _norm_per_dimension(x)


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """Every token loses its mean and is divided by its standard deviation (of a sample, as OpenAI and SAELens do).

    Codes stay in those units.
    """

    eps: float = 1e-5
    needs_input: ClassVar[bool] = True

    def prepare(self, x: Vectors, bias: Float[Tensor, " d_model"] | None) -> tuple[Vectors, PerToken | None]:
        scaled = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + self.eps)
        return scaled if bias is None else scaled - bias, None

    def restore(self, y: Outputs, x: Vectors | None) -> Outputs:
        assert x is not None
        # without eps, as in both libraries
        return y * x.std(1, keepdim=True) + x.mean(1, keepdim=True)


BY_NAME: dict[str, type[Normalisation]] = {kind.__name__: kind for kind in (Plain, EqualNorms, ConstantNorm, LayerNorm)}
"""What a config file may name."""


def _norm_per_dimension(x: Vectors) -> PerToken:
    return x.norm(dim=1, keepdim=True).clamp(min=_SMALLEST) / x.shape[1] ** 0.5
