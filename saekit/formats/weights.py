"""An SAE as values, without the module: what every format is read into, and written from.

Formats differ in names, orientations and in what they leave to the reader's knowledge; here all of that is said.
What is the same for every token (a scale of the inputs, norms of the decoder, a gate) is folded into the weights,
so that nothing is left but four tensors, a rule and what happens to a token before encoding.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from saekit.errors import ShapeError
from saekit.normalisation import Normalisation, Plain
from saekit.selection import SelectionRule, Threshold


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """One SAE or transcoder in saekit's own terms. Tensors may be on the meta device: then only shapes are known.

    Attributes:
        encoder: `(n_features, d_in)` what each feature reads.
        decoder: `(n_features, d_out)` what each feature writes.
        b_enc: `(n_features,)`.
        b_dec: `(d_out,)`.
        rule: which matches are kept.
        normalisation: what happens to each token before encoding.
        skip: `(d_out, d_in)` from the raw input to the output, or None.
        apply_b_dec_to_input: whether the encoder reads `x - b_dec`.
        hook_name: the Site it reads, as text; empty where the files do not say.
        hook_name_out: the Site it writes, if that is another.
        model_name: the model, as the files name it.
        context_size: tokens per row in training.
        input_scale: what inputs must be multiplied with before encoding, and outputs divided by; None if the files
            need one and do not say it.
        metadata: what else the files say that is worth keeping.

    Raises:
        ShapeError: if the tensors do not fit together.
    """

    encoder: Tensor
    decoder: Tensor
    b_enc: Tensor
    b_dec: Tensor
    rule: SelectionRule
    normalisation: Normalisation = Plain()
    skip: Tensor | None = None
    apply_b_dec_to_input: bool = True
    hook_name: str = ""
    hook_name_out: str = ""
    model_name: str = ""
    context_size: int | None = None
    input_scale: float | None = 1.0
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.encoder.ndim != 2 or self.decoder.ndim != 2:
            raise ShapeError(
                f"encoder {tuple(self.encoder.shape)} and decoder {tuple(self.decoder.shape)} must be matrices"
            )
        expected = {
            "decoder": (self.n_features, self.d_out),
            "b_enc": (self.n_features,),
            "b_dec": (self.d_out,),
            **({"skip": (self.d_out, self.d_in)} if self.skip is not None else {}),
        }
        for name, shape in expected.items():
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise ShapeError(
                    f"{name} is {found}, but {self.n_features} features from {self.d_in} to {self.d_out} numbers "
                    f"need {shape}"
                )
        theta = self.rule.theta if isinstance(self.rule, Threshold) else None
        if isinstance(theta, Tensor) and theta.shape != (self.n_features,):
            raise ShapeError(f"threshold is {tuple(theta.shape)}, but {self.n_features} features need one each")

    @property
    def n_features(self) -> int:
        return self.encoder.shape[0]

    @property
    def d_in(self) -> int:
        return self.encoder.shape[1]

    @property
    def d_out(self) -> int:
        return self.decoder.shape[1]


def gated(encoder: Tensor, *, b_gate: Tensor, r_mag: Tensor, b_mag: Tensor) -> dict[str, Any]:
    """A gated encoder as one with a cut: `encoder`, `b_enc` and `rule` of the same codes.

    The gate is open where `u @ w + b_gate > 0`, the magnitude is `(u @ w) * exp(r_mag) + b_mag`; so the gate is open
    where the magnitude exceeds `b_mag - exp(r_mag) * b_gate` (Rajamanoharan et al., arXiv 2404.16014).
    """
    gain = r_mag.float().exp()
    return {
        "encoder": encoder.float() * gain[:, None],
        "b_enc": b_mag,
        "rule": Threshold(b_mag.float() - gain * b_gate.float()),
    }


def with_input_scale(weights: Weights, scale: float) -> Weights:
    """The same SAE for raw inputs, given one that expects them multiplied by `scale`, and its output divided by it.

    Codes and thresholds stay in the units that they had; a skip connection has the same scale at both ends.
    """
    return replace(
        weights,
        encoder=weights.encoder.float() * scale,
        decoder=weights.decoder.float() / scale,
        b_dec=weights.b_dec.float() / scale,
    )


def with_whitening(weights: Weights, *, mean: Tensor, matrix: Tensor, inverse: Tensor) -> Weights:
    """The same SAE for raw inputs, given one that expects `(x - mean) @ matrix`, and its output `@ inverse + mean`.

    Codes and thresholds stay as they were; decoder rows get other norms, so what compares by them comes before this.

    Raises:
        ShapeError: if the whitening is of another width.
    """
    width = weights.d_in
    if (mean.shape, matrix.shape, inverse.shape) != ((width,), (width, width), (width, width)):
        raise ShapeError(
            f"whitening by {tuple(mean.shape)}, {tuple(matrix.shape)} and {tuple(inverse.shape)}, "
            f"but the SAE reads {width} numbers"
        )
    encoder = weights.encoder.float() @ matrix.float().T
    # a bias that the encoder subtracts takes the mean along
    shift = 0.0 if weights.apply_b_dec_to_input else encoder @ mean.float()
    return replace(
        weights,
        encoder=encoder,
        b_enc=weights.b_enc.float() - shift,
        decoder=weights.decoder.float() @ inverse.float(),
        b_dec=weights.b_dec.float() @ inverse.float() + mean.float(),
    )


def with_unit_decoder(weights: Weights) -> Weights:
    """The same reconstruction from codes multiplied by the norms of their decoder rows, by which rules then compare.

    A threshold is left alone: it must be in units of the codes that come out.
    """
    norms = weights.decoder.float().norm(dim=1).clamp(min=1e-8)
    return replace(
        weights,
        encoder=weights.encoder.float() * norms[:, None],
        b_enc=weights.b_enc.float() * norms,
        decoder=weights.decoder.float() / norms[:, None],
    )


def cuts(threshold: Tensor) -> Threshold:
    """A stored threshold, one number or one for each feature.

    Raises:
        ShapeError: if it is neither.
    """
    if threshold.ndim > 1:
        raise ShapeError(f"threshold is {tuple(threshold.shape)}, neither one number nor one for each feature")
    return Threshold(threshold.float() if threshold.ndim else float(threshold))


def relu() -> Threshold:
    """Whatever is positive."""
    return Threshold(0.0)


def linear(tensors: Mapping[str, Tensor], encoder: str = "encoder", decoder: str = "decoder") -> dict[str, Any]:
    """`encoder`, `b_enc` and `decoder` from two linear layers, as torch stores them."""
    return {
        "encoder": tensors[f"{encoder}.weight"],
        "b_enc": tensors[f"{encoder}.bias"],
        "decoder": tensors[f"{decoder}.weight"].T,
    }
