"""The sparse autoencoder: four weights and a rule.

    u     = x - b_dec                         (see `saekit.normalisation` for SAEs that scale tokens)
    codes = rule(u @ W_enc + b_enc)           ReLU on what the rule keeps
    x_hat = codes @ W_dec + b_dec

A transcoder is the same with an output that is another Site's: `d_out` wide, `b_dec` not subtracted from the
input, and, if it has a skip connection, `x @ W_skip.T` added to the output. What other libraries call
standard, gated, JumpReLU, BatchTopK or Matryoshka SAEs differ in how they are trained; once trained, each
is these weights and a rule (`Threshold`, most often).

Weights are stored feature-major, `(n_features, d_model)`, so that an active feature is one contiguous
row. `W_enc (d_model, n_features)` and `W_dec (n_features, d_out)` are read-only views under the names
and orientation that the field knows.

`torch.compile` takes a module with an SAE in it and gives the same; its graphs break where entries are selected, so
`fullgraph=True` is not to be had.
"""

from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit import checkpoint, index, pretrained, sae_config
from saekit.codes import SparseCodes
from saekit.errors import ShapeError
from saekit.kernels.entries import decode_rows, shifted_bias
from saekit.normalisation import EqualNorms, Plain
from saekit.sae_config import SAEConfig
from saekit.selection import SelectionRule, Threshold


class SAE(nn.Module):
    """A sparse autoencoder over vectors of `d_model` numbers, or a transcoder from them to `d_out` numbers.

    Attributes:
        encoder: `(n_features, d_model)` what each feature reads.
        decoder: `(n_features, d_out)` what each feature writes; rows of unit norm after training.
        b_enc: `(n_features,)` added to pre-activations.
        b_dec: `(d_out,)` added to the output; subtracted from the input unless cfg says otherwise.
        skip: `(d_out, d_model)` from the raw input straight to the output; None without such a connection.
        rule: which matches are kept; see `saekit.selection`.
        cfg: where the SAE belongs.
    """

    def __init__(
        self,
        d_model: int,
        n_features: int,
        rule: SelectionRule,
        *,
        skip: bool = False,
        cfg: SAEConfig | None = None,
    ):
        super().__init__()
        cfg = cfg or SAEConfig(d_in=d_model, d_sae=n_features)
        _check_cfg(cfg, d_model, n_features)
        d_out = cfg.d_out or d_model
        self.encoder = nn.Parameter(torch.zeros(n_features, d_model))
        self.decoder = nn.Parameter(torch.zeros(n_features, d_out))
        self.b_enc = nn.Parameter(torch.zeros(n_features))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        self.skip = nn.Parameter(torch.zeros(d_out, d_model)) if skip else None
        self.rule = rule
        self.cfg = cfg
        self.initialise(torch.Generator().manual_seed(0))

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        rule: SelectionRule,
        cfg: SAEConfig,
        *,
        encoder: Float[Tensor, "n_features d_model"],
        decoder: Float[Tensor, "n_features d_out"],
        b_enc: Float[Tensor, " n_features"],
        b_dec: Float[Tensor, " d_out"],
        skip: Float[Tensor, "d_out d_model"] | None = None,
    ) -> "SAE":
        """An SAE of these weights, which it copies. Large ones are there much sooner than by way of random ones."""
        sae = cls.__new__(cls)
        nn.Module.__init__(sae)
        n_features, d_model = encoder.shape
        _check_cfg(cfg, d_model, n_features)
        weights = {"encoder": encoder, "decoder": decoder, "b_enc": b_enc, "b_dec": b_dec, "skip": skip}
        for name, weight in weights.items():
            copied = None if weight is None else nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
            setattr(sae, name, copied)
        sae.rule, sae.cfg = rule, cfg
        return sae

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Random unit-norm decoder rows, biases zero; the encoder their copy, or random too where widths differ."""
        directions = torch.randn(self.decoder.shape, generator=generator)
        self.decoder.copy_(nn.functional.normalize(directions, dim=1))
        if not self.is_transcoder:
            self.encoder.copy_(self.decoder)
        else:
            directions = torch.randn(self.encoder.shape, generator=generator)
            self.encoder.copy_(nn.functional.normalize(directions, dim=1))
        self.b_enc.zero_()
        self.b_dec.zero_()

    @property
    def d_model(self) -> int:
        return self.encoder.shape[1]

    @property
    def d_out(self) -> int:
        return self.decoder.shape[1]

    @property
    def n_features(self) -> int:
        return self.encoder.shape[0]

    @property
    def is_transcoder(self) -> bool:
        """Whether it writes another Site than it reads."""
        return self.cfg.is_transcoder

    @property
    def output_needs_input(self) -> bool:
        """Whether the output depends on more of the input than its codes, so that `decode` must be given it."""
        return self.skip is not None or self.cfg.normalisation.needs_input

    @property
    def W_enc(self) -> Float[Tensor, "d_model n_features"]:
        return self.encoder.detach().T

    @property
    def W_dec(self) -> Float[Tensor, "n_features d_out"]:
        return self.decoder.detach()

    @property
    def W_skip(self) -> Float[Tensor, "d_out d_model"] | None:
        return None if self.skip is None else self.skip.detach()

    def prepare(
        self, x: Float[Tensor, "n_tokens d_model"]
    ) -> tuple[Float[Tensor, "n_tokens d_model"], Float[Tensor, "n_tokens 1"] | None]:
        """What the encoder reads, and what each token's codes are then multiplied by (None is 1)."""
        return self.cfg.normalisation.prepare(x, self.b_dec if self.cfg.apply_b_dec_to_input else None)

    def encode(self, x: Float[Tensor, "n_tokens d_model"]) -> SparseCodes:
        """The codes of each row of `x`; never holds `(n_tokens, n_features)`.

        They are in units of `x`, unless `cfg.normalisation` leaves them in its own. Whatever the type of `x`, they
        are computed in that of the weights.

        Raises:
            ShapeError: if `x` is not `(n_tokens, d_model)`.
        """
        if x.ndim != 2 or x.shape[1] != self.d_model:
            raise ShapeError(
                f"this SAE encodes rows of {self.d_model} numbers, got {tuple(x.shape)}; "
                f"pass activations of its Site{f' ({self.cfg.hook_name})' if self.cfg.hook_name else ''} "
                "as (n_tokens, d_model)"
            )
        x = x.to(self.b_dec.dtype)
        if isinstance(self.cfg.normalisation, Plain) and self.cfg.apply_b_dec_to_input and not x.requires_grad:
            # the same as below, for less in the backward pass
            bias = shifted_bias(self.b_enc, self.b_dec, self.encoder)
            return self.rule.encode(x - self.b_dec.detach(), self.encoder, bias)
        prepared, scale = self.prepare(x)
        codes = self.rule.encode(prepared, self.encoder, self.b_enc)
        if scale is None:
            return codes
        return codes.with_values(codes.values * scale[:, 0][codes.token_of_entry()])

    def decode(
        self, codes: SparseCodes, x: Float[Tensor, "n_tokens d_model"] | None = None
    ) -> Float[Tensor, "n_tokens d_out"]:
        """The reconstruction; depends on the arguments alone, not on what was encoded before.

        Args:
            x: the input that the codes were made from. Only read where `output_needs_input`.

        Raises:
            ShapeError: codes of another dictionary, or no `x` where the output needs it.
        """
        if codes.n_features != self.n_features:
            raise ShapeError(
                f"these codes have {codes.n_features} features, this SAE {self.n_features}; "
                "decode them with the SAE that made them"
            )
        if self.output_needs_input and (x is None or x.shape != (codes.n_tokens, self.d_model)):
            raise ShapeError(
                f"the output of this SAE needs its input {(codes.n_tokens, self.d_model)} beside the codes "
                f"(it has {'a skip connection' if self.skip is not None else self.cfg.normalisation}), got "
                f"{None if x is None else tuple(x.shape)}; call decode(codes, x)"
            )
        x = None if x is None else x.to(self.b_dec.dtype)
        output = decode_rows(codes.values, codes.features, codes.row_starts, self.decoder) + self.b_dec
        output = self.cfg.normalisation.restore(output, x)
        return output if self.skip is None or x is None else output + x @ self.skip.T

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_out"]:
        """The reconstruction of every vector; leading dimensions are kept."""
        rows = x.reshape(-1, x.shape[-1])
        return self.decode(self.encode(rows), rows).view(*x.shape[:-1], self.d_out)

    def with_rule(self, rule: SelectionRule) -> "SAE":
        """The same weights (shared, not copied) under another rule."""
        other = SAE.__new__(SAE)
        nn.Module.__init__(other)
        other.encoder, other.decoder, other.b_enc, other.b_dec = self.encoder, self.decoder, self.b_enc, self.b_dec
        other.skip, other.rule, other.cfg = self.skip, rule, self.cfg
        return other

    @torch.no_grad()
    def rescaled(self, scale: float, *, out_scale: float | None = None) -> "SAE":
        """A copy for inputs `scale` times as large (and outputs `out_scale` times), with the same behaviour.

        Directions have no unit; biases and thresholds have the unit of the output, and so do codes.
        """
        out_scale = scale if out_scale is None else out_scale
        if self.cfg.normalisation.needs_input:  # which takes the unit away and puts it back
            scale = out_scale = 1.0
        gain = out_scale / scale
        # under equal norms the encoder sees inputs without a unit, and so do its bias and its cuts
        cut_scale = gain if isinstance(self.cfg.normalisation, EqualNorms) else out_scale
        rule = self.rule
        if isinstance(rule, Threshold):
            rule = replace(rule, theta=rule.theta * cut_scale)
        return SAE.of(
            rule,
            self.cfg,
            encoder=self.encoder * gain,
            decoder=self.decoder,
            b_enc=self.b_enc * cut_scale,
            b_dec=self.b_dec * out_scale,
            skip=None if self.skip is None else self.skip * gain,
        )

    def save(self, folder: Path | str, *, dtype: torch.dtype = torch.float32) -> None:
        """Write the native folder (`saekit.checkpoint` specifies it).

        Args:
            dtype: of the weights on disk; `load` gives float32 whatever it was.
        """
        tensors = {"W_enc": self.W_enc, "b_enc": self.b_enc.detach(), "W_dec": self.W_dec, "b_dec": self.b_dec.detach()}
        if self.W_skip is not None:
            tensors["W_skip"] = self.W_skip
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        tensors |= sae_config.rule_tensors(self.rule, self.n_features)
        written = str(dtype).removeprefix("torch.")
        config = sae_config.write(self.cfg, self.rule, skip=self.skip is not None, dtype=written)
        checkpoint.save(Path(folder), config=config, tensors=tensors)

    @classmethod
    def load(cls, folder: Path | str, *, device: torch.device | str = "cpu") -> "SAE":
        """Read a folder that `save` wrote.

        Raises:
            FileError: if there is none, or its files are damaged or of a newer version.
        """
        config, tensors = checkpoint.load(Path(folder))
        return cls.of(
            sae_config.read_rule(config["saekit"]["rule"], tensors),
            sae_config.read_cfg(config),
            encoder=tensors["W_enc"].T.float(),
            decoder=tensors["W_dec"].float(),
            b_enc=tensors["b_enc"].float(),
            b_dec=tensors["b_dec"].float(),
            skip=tensors["W_skip"].float() if "W_skip" in tensors else None,
        ).to(device)

    @classmethod
    def from_pretrained(cls, release: str, sae_id: str, *, device: torch.device | str = "cpu") -> "SAE":
        """A published SAE by its names in `pretrained_index.yaml`, of any format; fetched from the Hub if need be.

        Raises:
            UnknownNameError: no such SAE; the message lists the closest.
            FileError: it cannot be fetched, or is not what the index describes.
        """
        from saekit.loading import load_located  # which makes SAEs, and so imports this module

        return load_located(pretrained.located(index.find(release, sae_id)), device=device)

    def extra_repr(self) -> str:
        out = f", d_out={self.d_out}" if self.is_transcoder else ""
        site = f", site={self.cfg.hook_name}" if self.cfg.hook_name else ""
        site += f" -> {self.cfg.hook_name_out}" if self.cfg.hook_name_out else ""
        return f"d_model={self.d_model}, n_features={self.n_features}{out}, rule={self.rule}{site}"


def _check_cfg(cfg: SAEConfig, d_model: int, n_features: int) -> None:
    if (cfg.d_in, cfg.d_sae) != (d_model, n_features):
        raise ShapeError(
            f"cfg describes {cfg.d_in} -> {cfg.d_sae} features, but the SAE is {d_model} -> {n_features}; "
            "pass a cfg of the same sizes"
        )
    if cfg.is_transcoder and (cfg.apply_b_dec_to_input or cfg.normalisation.needs_input):
        raise ShapeError(
            f"a transcoder ({d_model} -> {cfg.d_out or d_model} numbers) writes another Site, whose bias and scale are "
            "not those of its input; pass a cfg with apply_b_dec_to_input=False and normalisation=Plain()"
        )
