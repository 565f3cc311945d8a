"""Which features made a decision: exact, where its score is linear in what the decider reads.

With `x = sum of f_j d_j + b_dec + error`, a score `x @ w + c` is

    sum of f_j (d_j @ w)  +  (b_dec @ w + c)  +  error @ w

to the last bit of rounding: what each feature adds, a constant, and what the SAE leaves unexplained. The last share
must be looked at: an SAE is trained to reconstruct all of x, and may neglect the one direction that decides.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.adaptive.deciding import Readout, Step
from saekit.codes import SparseCodes
from saekit.errors import SaekitError, ShapeError
from saekit.sae import SAE


@dataclass(frozen=True, slots=True, eq=False)
class DecisionAttribution:
    """Scores, taken apart; `added` per token, `constant` and `error` add up to `score`.

    Attributes:
        added: what each active feature adds to its token's score; may be negative.
        constant: the same for all tokens.
        error: `(n,)` what the SAE does not explain.
        score: `(n,)` of option 1: the margin over a threshold, or a logit.
    """

    added: SparseCodes
    constant: float
    error: Float[Tensor, " n"]
    score: Float[Tensor, " n"]

    @property
    def error_share(self) -> float:
        """Mean absolute error over mean absolute score: how far the features are from telling all."""
        return float(self.error.abs().sum() / self.score.abs().sum())

    @property
    def mean_added(self) -> Float[Tensor, " n_features"]:
        """What each feature adds, averaged over all tokens."""
        return self._summed(self.added.values) / len(self.score)

    @property
    def mean_size(self) -> Float[Tensor, " n_features"]:
        """The same without sign: how much a feature matters."""
        return self._summed(self.added.values.abs()) / len(self.score)

    def _summed(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.added.n_features).index_add(0, self.added.features, values)


@torch.no_grad()
def attribute_decisions(sae: SAE, vectors: Float[Tensor, "n d_model"], step: Step) -> DecisionAttribution:
    """Take the scores of a step apart, given what it read.

    Raises:
        SaekitError: a step whose score is not linear in what it reads, or an SAE whose output is not in its codes.
        ShapeError: an SAE of another width.
    """
    direction, constant = _linear(step)
    if len(direction) != sae.d_model or vectors.shape[1] != sae.d_model:
        raise ShapeError(
            f"the SAE reads {sae.d_model} numbers, the vectors have {vectors.shape[1]} and {step.reads} "
            f"{len(direction)}; use an SAE of that Site"
        )
    if sae.output_needs_input:
        raise SaekitError(
            f"what {sae.cfg.normalisation} or a skip connection adds is no feature's, so that nothing adds up; "
            "use an SAE without them"
        )
    codes = sae.encode(vectors)
    writes = sae.W_dec @ direction
    residual = vectors - sae.decode(codes)
    return DecisionAttribution(
        added=codes.with_values(codes.values * writes[codes.features]),
        constant=float(sae.b_dec @ direction) + constant,
        error=residual @ direction,
        score=vectors @ direction + constant,
    )


def _linear(step: Step) -> Readout:
    if step.readout is None:
        raise SaekitError(
            f"the score at {step.score} is not linear in {step.reads}, so that it does not divide among features; "
            "measure the effect of ablating them instead (saekit.adaptive.effects)"
        )
    return step.readout
