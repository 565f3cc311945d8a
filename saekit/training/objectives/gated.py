"""Gated SAEs (Rajamanoharan et al., arXiv 2404.16014): one set of directions decides who is active and how much.

    gate       = u @ W_enc + b_gate                      active where positive
    magnitude  = (u @ W_enc) * exp(r) + b_enc            ReLU of it is the activation
    loss       = |y - y_hat|^2 + weight * sum(relu(gate)) + |y - decode'(relu(gate))|^2

`decode'` is the decoder as a constant. Since gate and magnitude share directions, the trained SAE is a
JumpReLU SAE, and is handed out as one.

An auxiliary loss trains only the directions that gates and magnitudes share; how far a gate opens is left to the
penalty and `decode'`. (Our choice.)
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saekit.codes import SparseCodes
from saekit.kernels.entries import decode_rows, encode_entries
from saekit.kernels.select import above, top_of_all
from saekit.losses import summed_mse
from saekit.sae import SAE
from saekit.selection import Threshold, check_k
from saekit.training.objectives.objective import Extra, Measured, Targets, Vectors, held_to, start_weight


@dataclass(frozen=True, slots=True)
class Gated:
    """The L1 penalty shrinks the gate and leaves the magnitude alone.

    Attributes:
        k: mean number of active features per token to aim at.
    """

    k: int

    finds_sparsity: ClassVar[bool] = True
    fits_start: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_k(type(self).__name__, self.k)

    def extra(self, sae: SAE, sample: Vectors) -> dict[str, Tensor]:
        if isinstance(sae.rule, Threshold):
            cut: Tensor | float = sae.rule.per_feature(sae.n_features, sample)
        else:  # weights of another rule: gates open where it would, taken all together
            prepared, _ = sae.prepare(sample)
            cut = top_of_all(prepared, sae.encoder, sae.b_enc, round(self.k * len(sample))).scores.min()
        b_gate = sae.b_enc.detach() - cut  # a new SAE has neither
        return {"b_gate": b_gate, "r_mag": torch.zeros_like(b_gate), "log_weight": start_weight(sample)}

    def measure(self, sae: SAE, extra: Extra, x: Vectors, y: Targets) -> Measured:
        prepared, scale = sae.prepare(x)
        b_gate = extra["b_gate"]
        open_gates = above(prepared, sae.encoder, b_gate, torch.zeros_like(b_gate))
        features = open_gates.features
        gate = encode_entries(prepared, sae.encoder, b_gate, open_gates)
        magnitude = ((gate - b_gate[features]) * extra["r_mag"][features].exp() + sae.b_enc[features]).relu()
        codes = SparseCodes(magnitude, features, open_gates.row_starts, sae.n_features)
        gates = codes.with_values(gate)
        if scale is not None:
            per_entry = scale[:, 0][codes.token_of_entry()]
            codes, gates = codes.with_values(magnitude * per_entry), codes.with_values(gate * per_entry)
        y_hat = sae.decode(codes, x)
        by_gate = decode_rows(gates.values, features, gates.row_starts, sae.decoder.detach()) + sae.b_dec.detach()
        if sae.skip is not None:
            by_gate = by_gate + x @ sae.skip.detach().T
        penalty = gates.values.sum() / len(x)
        loss = summed_mse(y, y_hat) + summed_mse(y, by_gate)
        return Measured(codes, y_hat, loss + held_to(self.k, codes, extra["log_weight"], penalty))

    @torch.no_grad()
    def finished(self, sae: SAE, extra: Extra) -> SAE:
        gain = extra["r_mag"].exp()
        # the gate is open where (u @ W_enc) * gain + b_enc exceeds this
        other = sae.with_rule(Threshold(sae.b_enc - gain * extra["b_gate"])).rescaled(1.0)
        other.encoder.mul_(gain[:, None])
        return other
