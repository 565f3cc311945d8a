"""What decides the weights of an SAE. Device, logging and paths are arguments of `train`, not of this."""

import math
from dataclasses import dataclass, fields
from types import NoneType
from typing import Any, Literal

from saekit.errors import SaekitError
from saekit.losses import AuxK, AuxZipf
from saekit.selection import FeatureChoice, MutualChoice, SelectionRule, Threshold, TopK
from saekit.targets import Site
from saekit.training.objectives import Gated, JumpReLU, Objective, Reconstruction
from saekit.training.resample import Resample
from saekit.training.schedule import AnnealK, ThenFeatureChoice

PreBias = Literal["median", "mean", "zero"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One SAE to be trained. Few fields need thought; the rest follow from these or are tuned.

    Attributes:
        site: where the activations come from.
        rule: which matches are kept. `Threshold` only with an objective that finds its own sparsity.
        n_features: width of the dictionary.
        tokens: length of training.
        batch_tokens: tokens per step; also what batch rules share their budget over.
        site_out: what is to be reconstructed, if not the input: then it is a transcoder.
        skip: whether a transcoder has a linear connection past its features.
        objective: what is asked beside the rule; see `saekit.training.objectives`.
        auxiliary: which unused features are asked to explain the residual; None for none.
        anneal: how k falls to that of the rule at the start of the run.
        then: a second phase under Feature Choice.
        resample: when dead features get new weights.
        seed: of the weights and of the order of the data.
        learning_rate: None derives it from the width and the batch, see `peak_lr`.
        warmup: share of the run over which the learning rate rises.
        decay: share of the run at its end over which the learning rate falls to zero.
        clip: largest norm of the gradient. Inputs are brought to unit variance per dimension and the loss
            sums over dimensions, so that this bound acts on every step and means the same on every model.
        pre_bias: where `b_dec` starts: the geometric median or the mean of the first activations, or zero.
        encoder_start: how long the encoder is at first: as fits best, or unit norm as the decoder
            (`saekit.training.first_scale`).
        equal_norms: scale every centred token to one norm before encoding.
        ranks_every: steps between new ranks for `FeatureChoice`.
        density_horizon: tokens that the running average of densities looks back over, by which features are ranked and
            under-used; None is a tenth of the run, at least 20 batches.
        bf16_screening: find candidates in bfloat16 and select among their exact scores, on CPUs where that is
            faster (`saekit.kernels.screen`); of entries that are equal up to rounding others may be kept.
    """

    site: Site
    rule: SelectionRule
    n_features: int
    tokens: int
    batch_tokens: int = 1024
    site_out: Site | None = None
    skip: bool = False
    objective: Objective = Reconstruction()
    auxiliary: AuxZipf | AuxK | None = AuxZipf()
    anneal: AnnealK | None = None
    then: ThenFeatureChoice | None = None
    resample: Resample | None = None
    seed: int = 0
    learning_rate: float | None = None
    warmup: float = 0.05
    decay: float = 0.5
    clip: float = 1.0
    pre_bias: PreBias = "median"
    encoder_start: Literal["fit", "unit"] = "fit"
    equal_norms: bool = False
    ranks_every: int = 100
    density_horizon: int | None = None
    bf16_screening: bool = False

    def __post_init__(self) -> None:
        if self.batch_tokens < 1:
            raise SaekitError(f"batch_tokens={self.batch_tokens}: give at least 1 token for each step")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise SaekitError(f"learning_rate={self.learning_rate}: give a number above 0, or leave it out")
        if self.density_horizon is not None and self.density_horizon < 1:
            raise SaekitError(f"density_horizon={self.density_horizon}: give a number of tokens, or leave it out")
        if self.tokens < self.batch_tokens:
            raise SaekitError(
                f"tokens={self.tokens:,} is less than one batch of {self.batch_tokens:,}; "
                "raise tokens, or lower batch_tokens"
            )
        if isinstance(self.rule, Threshold) and not self.objective.finds_sparsity:
            raise SaekitError(
                "nothing would make an SAE with a Threshold sparse; train TopK, MutualChoice or FeatureChoice, "
                "or give an objective that finds its own sparsity (ReLUL1, Gated, JumpReLU)"
            )
        if self.objective.finds_sparsity and not isinstance(self.rule, Threshold):
            raise SaekitError(
                f"{self.objective} finds its own sparsity and would ignore {self.rule}; give rule=Threshold(0.0)"
            )
        if isinstance(self.objective, Gated | JumpReLU) and self.resample:
            raise SaekitError(
                f"new weights would not wake a feature that the gates or thresholds of {self.objective} keep closed; "
                "leave resample away"
            )
        asked = self.k or getattr(self.objective, "k", 0)
        if asked >= self.n_features:
            raise SaekitError(
                f"k={asked} on {self.n_features:,} features would keep everything; "
                "choose k below the number of features"
            )
        if self.site_out == self.site:
            raise SaekitError(f"{self.site} to itself is an autoencoder; leave site_out away, or name another Site")
        if self.site_out is None and self.skip:
            raise SaekitError("a skip connection from a Site to itself would explain everything; give site_out too")
        if self.site_out is not None and self.equal_norms:
            raise SaekitError(
                "equal_norms brings a token back to its own norm, which a transcoder's output does not share; "
                "leave one of equal_norms and site_out away"
            )
        if (self.anneal or self.then) and self.k is None:
            raise SaekitError(
                f"{type(self.rule).__name__} has no k to anneal or to hand on; "
                "train TopK, MutualChoice or FeatureChoice"
            )
        if self.anneal and not (self.k or 0) <= self.anneal.start < self.n_features:
            raise SaekitError(
                f"k cannot fall from {self.anneal.start} to {self.k} on {self.n_features:,} features; "
                "start at least at the rule's k, and below the number of features"
            )
        self._check_pools()

    def _check_pools(self) -> None:
        """Refuse now what would fail in the middle of the run."""
        if isinstance(self.rule, FeatureChoice) and self.rule.smallest_batch(self.n_features) > self.tokens:
            raise SaekitError(
                f"{self.rule} on {self.n_features:,} features shares its budgets over "
                f"{self.rule.smallest_batch(self.n_features):,} tokens, and the run has {self.tokens:,}; "
                "choose a smaller exponent, a larger offset, floor=1, or a longer run"
            )
        if self.then and isinstance(self.rule, FeatureChoice):
            raise SaekitError(
                f"then goes on under Feature Choice, and {self.rule} is that from the start; begin with TopK or "
                "MutualChoice, or leave then away"
            )
        if self.then and self.k is not None:
            if self.k > self.then.cap * self.n_features:
                raise SaekitError(
                    f"in the second phase {self.n_features:,} features on at most {self.then.cap:g} of all tokens each "
                    f"cannot spend k={self.k} on every token; choose a smaller k, or a larger cap"
                )
            if not 0 < self.then.first_step(self.steps) < self.steps:
                raise SaekitError(
                    f"at={self.then.at} of {self.steps:,} steps leaves one of the two phases empty; "
                    "move it, or train longer"
                )
            if self.then.pool * self.batch_tokens * self.k < self.n_features:
                raise SaekitError(
                    f"a pool of {self.then.pool} batches of {self.batch_tokens:,} tokens cannot grant each of "
                    f"{self.n_features:,} features a token at k={self.k}; "
                    "raise batch_tokens, or the pool of ThenFeatureChoice"
                )

    @property
    def k(self) -> int | None:
        """Mean number of active features per token that the rule grants; None if it grants none."""
        return self.rule.k if isinstance(self.rule, TopK | MutualChoice | FeatureChoice) else None

    @property
    def steps(self) -> int:
        return self.tokens // self.batch_tokens

    def pool_starting_at(self, step: int) -> int:
        """How many batches, from this step on, Feature Choice shares its budgets over; 0 where no pool begins.

        As many as the rarest feature needs to be granted one token, or as many as the second phase asks for.
        """
        size, since = self.shared_over, step - (self.then.first_step(self.steps) if self.then else 0)
        return size if size > 1 and since >= 0 and since % size == 0 else 0

    @property
    def shared_over(self) -> int:
        """Batches that the rule with which the run ends shares its budgets over."""
        if self.then:
            return self.then.pool
        if isinstance(self.rule, FeatureChoice):
            return math.ceil(self.rule.smallest_batch(self.n_features) / self.batch_tokens)
        return 1

    @property
    def peak_lr(self) -> float:
        """The learning rate between warm-up and decay: 3e-3 at 4,096 features and up to 1,024 tokens a step.

        It falls with the root of the width, and grows with the root of the batch where that is larger, which suits
        Adam: about as few features die under 4,096 tokens a step as under 1,024. Not under Feature Choice, whose
        features hardly ever die at this rate and do above, and whose batches are large for another reason.

        Tuned on two models (1,024 and 4,096 features on 64 dimensions, 4,096 on 256) in runs of 1 to 4 M tokens: at
        twice this, one has a fifth to a third of its features dead and gains nothing; the other reconstructs better.
        """
        if self.learning_rate is not None:
            return self.learning_rate
        by_width = min(8e-3, 3e-3 * (4096 / self.n_features) ** 0.5)
        if isinstance(self.rule, FeatureChoice):
            return by_width
        return by_width * max(1.0, self.batch_tokens / 1024) ** 0.5

    @property
    def dead_threshold(self) -> int:
        """Tokens without firing after which a feature counts as dead: a twentieth of the run, at most 10 M."""
        if self.auxiliary is not None and self.auxiliary.dead_after is not None:
            return self.auxiliary.dead_after
        return min(10_000_000, max(self.tokens // 20, self.batch_tokens))

    def lr_factor(self, step: int) -> float:
        """Share of the peak learning rate at this step: rises, stays, falls to zero; a second phase does so anew."""
        steps, warmup = self.steps, self.warmup
        if self.then is not None:
            first = self.then.first_step(steps)
            step, steps, warmup = (
                (step, first, warmup) if step < first else (step - first, steps - first, self.then.rewarm)
            )
        rise = (step + 1) / max(1.0, warmup * steps)
        fall = (steps - step) / max(1.0, self.decay * steps)
        return min(1.0, rise, fall)


def recipe(config: TrainConfig) -> dict[str, Any]:
    """A config as a file can hold it: numbers and names as they are, everything else as it prints."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    plain = (bool, int, float, str, NoneType)
    return {name: value if isinstance(value, plain) else str(value) for name, value in values.items()}
