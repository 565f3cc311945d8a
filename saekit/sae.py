"""The sparse autoencoder: four weights and a rule.

    u     = x - b_dec                         (scaled to one norm, if `equal_norms`)
    codes = rule(u @ W_enc + b_enc)           ReLU on what the rule keeps
    x_hat = codes @ W_dec + b_dec

Weights are stored feature-major, `(n_features, d_model)`, so that an active feature is one contiguous
row. `W_enc (d_model, n_features)` and `W_dec (n_features, d_model)` are read-only views under the names
and orientation that the field knows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit import checkpoint, pretrained
from saekit.codes import SparseCodes
from saekit.errors import FileError, ShapeError
from saekit.kernels.entries import decode_rows
from saekit.selection import FeatureChoice, MutualChoice, SelectionRule, Threshold, TopK


@dataclass(frozen=True, kw_only=True, slots=True)
class SAEConfig:
    """What an SAE reads and how it was made, under the names that other tools look for.

    Attributes:
        d_in: width of the activations, `d_model`.
        d_sae: number of features.
        hook_name: the Site it was trained on, as text.
        model_name: the model it was trained on.
        context_size: tokens per row in training.
        equal_norms: whether every centred input is scaled to one norm before encoding.
        metadata: anything else: training recipe, metrics, versions.
    """

    d_in: int
    d_sae: int
    hook_name: str = ""
    model_name: str = ""
    context_size: int | None = None
    equal_norms: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)


class SAE(nn.Module):
    """A sparse autoencoder over vectors of `d_model` numbers.

    Attributes:
        encoder: `(n_features, d_model)` what each feature reads.
        decoder: `(n_features, d_model)` what each feature writes; rows of unit norm after training.
        b_enc: `(n_features,)` added to pre-activations.
        b_dec: `(d_model,)` subtracted from the input and added to the output.
        rule: which matches are kept; see `saekit.selection`.
        cfg: where the SAE belongs.
    """

    def __init__(self, d_model: int, n_features: int, rule: SelectionRule, *, cfg: SAEConfig | None = None):
        super().__init__()
        cfg = cfg or SAEConfig(d_in=d_model, d_sae=n_features)
        if (cfg.d_in, cfg.d_sae) != (d_model, n_features):
            raise ShapeError(
                f"cfg describes {cfg.d_in} -> {cfg.d_sae} features, but the SAE is {d_model} -> {n_features}; "
                "pass a cfg of the same sizes"
            )
        self.encoder = nn.Parameter(torch.zeros(n_features, d_model))
        self.decoder = nn.Parameter(torch.zeros(n_features, d_model))
        self.b_enc = nn.Parameter(torch.zeros(n_features))
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        self.rule = rule
        self.cfg = cfg
        self.initialise(torch.Generator().manual_seed(0))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Random unit-norm decoder rows, the encoder their copy, biases zero."""
        directions = torch.randn(self.decoder.shape, generator=generator)
        self.decoder.copy_(nn.functional.normalize(directions, dim=1))
        self.encoder.copy_(self.decoder)
        self.b_enc.zero_()
        self.b_dec.zero_()

    @property
    def d_model(self) -> int:
        return self.encoder.shape[1]

    @property
    def n_features(self) -> int:
        return self.encoder.shape[0]

    @property
    def W_enc(self) -> Float[Tensor, "d_model n_features"]:
        return self.encoder.detach().T

    @property
    def W_dec(self) -> Float[Tensor, "n_features d_model"]:
        return self.decoder.detach()

    def centre(
        self, x: Float[Tensor, "n_tokens d_model"]
    ) -> tuple[Float[Tensor, "n_tokens d_model"], Float[Tensor, "n_tokens 1"] | None]:
        """What the encoder reads, and each token's scale (None when tokens keep their norms)."""
        centred = x - self.b_dec
        if not self.cfg.equal_norms:
            return centred, None
        scale = centred.norm(dim=1, keepdim=True).clamp(min=1e-6) / self.d_model**0.5
        return centred / scale, scale

    def encode(self, x: Float[Tensor, "n_tokens d_model"]) -> SparseCodes:
        """The codes of each row of `x`, in units of `x`; never holds `(n_tokens, n_features)`.

        Raises:
            ShapeError: if `x` is not `(n_tokens, d_model)`.
        """
        if x.ndim != 2 or x.shape[1] != self.d_model:
            raise ShapeError(
                f"this SAE encodes rows of {self.d_model} numbers, got {tuple(x.shape)}; "
                f"pass activations of its Site{f' ({self.cfg.hook_name})' if self.cfg.hook_name else ''} "
                "as (n_tokens, d_model)"
            )
        centred, scale = self.centre(x)
        codes = self.rule.encode(centred, self.encoder, self.b_enc)
        if scale is None:
            return codes
        return codes.with_values(codes.values * scale[:, 0][codes.token_of_entry()])

    def decode(self, codes: SparseCodes) -> Float[Tensor, "n_tokens d_model"]:
        """The reconstruction; depends on the codes alone, not on what was encoded before."""
        if codes.n_features != self.n_features:
            raise ShapeError(
                f"these codes have {codes.n_features} features, this SAE {self.n_features}; "
                "decode them with the SAE that made them"
            )
        return decode_rows(codes.values, codes.features, codes.row_starts, self.decoder) + self.b_dec

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The reconstruction of every vector; leading dimensions are kept."""
        return self.decode(self.encode(x.reshape(-1, x.shape[-1]))).view_as(x)

    def with_rule(self, rule: SelectionRule) -> "SAE":
        """The same weights (shared, not copied) under another rule."""
        other = SAE.__new__(SAE)
        nn.Module.__init__(other)
        other.encoder, other.decoder, other.b_enc, other.b_dec = self.encoder, self.decoder, self.b_enc, self.b_dec
        other.rule, other.cfg = rule, self.cfg
        return other

    @torch.no_grad()
    def rescaled(self, scale: float) -> "SAE":
        """A copy for inputs `scale` times as large, with the same behaviour in those units.

        Directions have no unit; biases and thresholds have the unit of the input.
        """
        # under equal norms the encoder sees inputs without a unit, and so do its bias and its cuts
        encoder_scale = 1.0 if self.cfg.equal_norms else scale
        rule = self.rule
        if isinstance(rule, Threshold):
            rule = Threshold(rule.theta * encoder_scale)
        other = SAE(self.d_model, self.n_features, rule, cfg=self.cfg).to(self.encoder)
        other.encoder.copy_(self.encoder)
        other.decoder.copy_(self.decoder)
        other.b_enc.copy_(self.b_enc * encoder_scale)
        other.b_dec.copy_(self.b_dec * scale)
        return other

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Scale every decoder row to unit norm."""
        self.decoder.copy_(nn.functional.normalize(self.decoder, dim=1))

    @torch.no_grad()
    def project_decoder_gradient(self) -> None:
        """Remove from the decoder's gradient what would only change the norms of its rows."""
        grad = self.decoder.grad
        if grad is not None:
            grad.sub_((grad * self.decoder).sum(1, keepdim=True) * self.decoder)

    def save(self, folder: Path | str, *, dtype: torch.dtype = torch.float32) -> None:
        """Write the native folder (`saekit.checkpoint` specifies it).

        Args:
            dtype: of the weights on disk; `load` gives float32 whatever it was.
        """
        tensors = {
            "W_enc": self.W_enc.to(dtype),
            "b_enc": self.b_enc.detach().to(dtype),
            "W_dec": self.W_dec.to(dtype),
            "b_dec": self.b_dec.detach().to(dtype),
        }
        if isinstance(self.rule, Threshold):
            tensors["threshold"] = self.rule.per_feature(self.n_features, tensors["b_enc"])
        if isinstance(self.rule, FeatureChoice) and self.rule.ranks is not None:
            tensors["ranks"] = self.rule.ranks
        config = self._config() | {"dtype": str(dtype).removeprefix("torch.")}
        checkpoint.save(Path(folder), config=config, tensors=tensors)

    @classmethod
    def load(cls, folder: Path | str, *, device: torch.device | str = "cpu") -> "SAE":
        """Read a folder that `save` wrote.

        Raises:
            FileError: if there is none, or its files are damaged or of a newer version.
        """
        config, tensors = checkpoint.load(Path(folder))
        sae = cls(config["d_in"], config["d_sae"], _read_rule(config, tensors), cfg=_read_cfg(config))
        with torch.no_grad():
            sae.encoder.copy_(tensors["W_enc"].T)
            sae.decoder.copy_(tensors["W_dec"])
            sae.b_enc.copy_(tensors["b_enc"])
            sae.b_dec.copy_(tensors["b_dec"])
        return sae.to(device)

    @classmethod
    def from_pretrained(cls, release: str, sae_id: str, *, device: torch.device | str = "cpu") -> "SAE":
        """A published SAE by its names in `pretrained_index.yaml`; fetched from the Hub if need be.

        Raises:
            UnknownNameError: no such SAE; the message lists the closest.
            FileError: it cannot be fetched, or is not what the index describes.
        """
        return cls.load(pretrained.fetch(release, sae_id), device=device)

    def _config(self) -> dict[str, Any]:
        rule: dict[str, Any] = {"name": type(self.rule).__name__}
        if isinstance(self.rule, TopK | MutualChoice | FeatureChoice):
            rule["k"] = self.rule.k
        if isinstance(self.rule, FeatureChoice):
            rule |= {"exponent": self.rule.exponent, "offset": self.rule.offset}
        return checkpoint.describe(
            rule=rule,
            d_in=self.d_model,
            d_sae=self.n_features,
            hook_name=self.cfg.hook_name,
            model_name=self.cfg.model_name,
            context_size=self.cfg.context_size,
            equal_norms=self.cfg.equal_norms,
            metadata=dict(self.cfg.metadata),
        )

    def extra_repr(self) -> str:
        site = f", site={self.cfg.hook_name}" if self.cfg.hook_name else ""
        return f"d_model={self.d_model}, n_features={self.n_features}, rule={self.rule}{site}"


def with_metadata(cfg: SAEConfig, **metadata: Any) -> SAEConfig:
    """The same cfg with more metadata."""
    return replace(cfg, metadata={**cfg.metadata, **metadata})


def _read_cfg(config: Mapping[str, Any]) -> SAEConfig:
    metadata = dict(config["metadata"])
    return SAEConfig(
        d_in=config["d_in"],
        d_sae=config["d_sae"],
        hook_name=metadata.pop("hook_name", ""),
        model_name=metadata.pop("model_name", ""),
        context_size=metadata.pop("context_size", None),
        equal_norms=config["saekit"]["equal_norms"],
        metadata=metadata,
    )


def _read_rule(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SelectionRule:
    match config["saekit"]["rule"]:
        case {"name": "TopK", "k": k}:
            return TopK(k)
        case {"name": "MutualChoice", "k": k}:
            return MutualChoice(k)
        case {"name": "FeatureChoice", "k": k, "exponent": exponent, "offset": offset}:
            return FeatureChoice(k, exponent=float(exponent), offset=float(offset), ranks=tensors.get("ranks"))
        case {"name": "Threshold"}:
            return Threshold(tensors["threshold"].float())
        case rule:
            raise FileError(
                f"this SAE's rule is {rule}, which is none of TopK, MutualChoice, FeatureChoice, Threshold "
                "with their arguments; upgrade saekit, or copy the folder again"
            )
