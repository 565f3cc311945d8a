"""What decides the weights of an SAE. Device, logging and paths are arguments of `train`, not of this."""

from dataclasses import dataclass
from typing import Literal

from saekit.errors import SaekitError
from saekit.selection import FeatureChoice, MutualChoice, SelectionRule, Threshold, TopK
from saekit.targets import Site

Auxiliary = Literal["zipf", "k", "none"]
PreBias = Literal["median", "mean", "zero"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One SAE to be trained. Few fields need thought; the rest follow from these or are tuned.

    Attributes:
        site: where the activations come from.
        rule: which matches are kept.
        n_features: width of the dictionary.
        tokens: length of training.
        batch_tokens: tokens per step; also what batch rules share their budget over.
        seed: of the weights and of the order of the data.
        learning_rate: None derives it from the width, see `peak_lr`.
        warmup: share of the run over which the learning rate rises.
        decay: share of the run at its end over which the learning rate falls to zero.
        clip: largest norm of the gradient. Inputs are brought to unit variance per dimension and the loss
            sums over dimensions, so that this bound acts on every step and means the same on every model.
        pre_bias: where `b_dec` starts: the geometric median or the mean of the first activations, or zero.
        equal_norms: scale every centred token to one norm before encoding.
        auxiliary: which unused features are asked to explain the residual.
        aux_weight: its weight, as a share of the main loss's scale.
        k_aux: features asked per token; None is half of d_model.
        dead_after: tokens without firing that make a feature dead; None is a twentieth of the run, at most 10 M.
        under_used_below: for "zipf": share of the expected density under which a feature is under-used.
        ranks_every: steps between new ranks for `FeatureChoice`.
    """

    site: Site
    rule: SelectionRule
    n_features: int
    tokens: int
    batch_tokens: int = 1024
    seed: int = 0
    learning_rate: float | None = None
    warmup: float = 0.05
    decay: float = 0.5
    clip: float = 1.0
    pre_bias: PreBias = "median"
    equal_norms: bool = False
    auxiliary: Auxiliary = "zipf"
    aux_weight: float = 1 / 32
    k_aux: int | None = None
    dead_after: int | None = None
    under_used_below: float = 0.5
    ranks_every: int = 100

    def __post_init__(self) -> None:
        if self.tokens < self.batch_tokens:
            raise SaekitError(
                f"tokens={self.tokens:,} is less than one batch of {self.batch_tokens:,}; "
                "raise tokens, or lower batch_tokens"
            )
        if isinstance(self.rule, Threshold):
            raise SaekitError(
                "a Threshold is found by calibration, not by training; train TopK, MutualChoice or FeatureChoice"
            )
        if isinstance(self.rule, TopK | MutualChoice | FeatureChoice) and self.rule.k >= self.n_features:
            raise SaekitError(
                f"k={self.rule.k} on {self.n_features:,} features would keep everything; "
                "choose k below the number of features"
            )
        if isinstance(self.rule, FeatureChoice):
            self.rule.budgets(self.batch_tokens, self.n_features)  # refuses a batch too small for it

    @property
    def steps(self) -> int:
        return self.tokens // self.batch_tokens

    @property
    def peak_lr(self) -> float:
        """The learning rate between warm-up and decay: 4e-3 at 4,096 features, falling with the root of the width.

        Tuned on two models (1,024 features on 64 dimensions, 4,096 on 256); at twice this features begin to die.
        """
        if self.learning_rate is not None:
            return self.learning_rate
        return min(8e-3, 4e-3 * (4096 / self.n_features) ** 0.5)

    @property
    def dead_threshold(self) -> int:
        """Tokens without firing after which a feature counts as dead."""
        if self.dead_after is not None:
            return self.dead_after
        return min(10_000_000, max(self.tokens // 20, self.batch_tokens))

    def lr_factor(self, step: int) -> float:
        """Share of the peak learning rate at this step: rises, stays, falls to zero."""
        rise = (step + 1) / max(1.0, self.warmup * self.steps)
        fall = (self.steps - step) / max(1.0, self.decay * self.steps)
        return min(1.0, rise, fall)
