"""What a run of the study is, and its rules. A new variant is one line of `RULES`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from saekit.errors import SaekitError
from saekit.losses import AuxK, AuxZipf
from saekit.selection import FeatureChoice, MutualChoice, SelectionRule, Threshold, TopK
from saekit.targets import Site
from saekit.training.config import TrainConfig
from saekit.training.objectives import Gated, JumpReLU, Matryoshka, ReLUL1
from saekit.training.schedule import ThenFeatureChoice

SMALLEST_BATCH = 2048
COMMON_LR = 3e-3  # at 4,096 features, falling with the root of the width: hardly any die at 16x and k = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One SAE to train and to measure; together with the data's fingerprint the key of a row of results.

    Attributes:
        expansion: features per dimension.
        lr_scale: multiplies the rate that all rules share, `COMMON_LR`, which does not grow with the batch.
    """

    dataset: str
    rule: str
    expansion: int
    k: int
    seed: int
    tokens: int
    lr_scale: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What all rules share in a run."""

    run: Run
    site: Site
    d_model: int
    pre_bias: str

    @property
    def k(self) -> int:
        return self.run.k

    @property
    def n_features(self) -> int:
        return self.run.expansion * self.d_model

    @property
    def batch_tokens(self) -> int:
        """The same for every rule, and large enough to grant every feature two tokens under equal budgets."""
        batch = SMALLEST_BATCH
        while batch * self.k < 2 * self.n_features:
            batch *= 2
        return batch

    def config(self, rule: SelectionRule, **changes: Any) -> TrainConfig:
        """A recipe that differs from the others in the rule and in what is said."""
        return TrainConfig(
            site=self.site,
            rule=rule,
            n_features=self.n_features,
            tokens=self.run.tokens,
            batch_tokens=self.batch_tokens,
            seed=self.run.seed,
            pre_bias=self.pre_bias,  # pyright: ignore[reportArgumentType]
            learning_rate=self.run.lr_scale * COMMON_LR * (4096 / self.n_features) ** 0.5,
            **changes,
        )


# exponent and offset of Mutual Choice's densities (columns inference_zipf_* of mutual+aux_zipf, median of three
# seeds); on the synthetic truth they fall so steeply that the rarest feature would wait for ever
MUTUAL_CURVES = {
    ("pystd", 16, 8): (1.82, 209.9),
    ("pystd", 16, 32): (0.96, 23.6),
    ("pystd", 64, 8): (1.62, 245.4),
    ("pystd", 64, 32): (1.66, 286.8),
    ("stories260K", 16, 8): (0.65, 5.8),
    ("stories260K", 16, 32): (0.80, 17.3),
    ("stories260K", 64, 8): (2.32, 392.0),
    ("stories260K", 64, 32): (1.25, 96.2),
}


def fitted(setting: Setting) -> FeatureChoice:
    """Feature Choice from the first step on the curve that Mutual Choice found, with ranks of its own.

    Raises:
        SaekitError: where no curve was fitted.
    """
    run = setting.run
    try:
        exponent, offset = MUTUAL_CURVES[run.dataset, run.expansion, run.k]
    except KeyError:
        raise SaekitError(f"no curve is fitted to {run.dataset} at {run.expansion}x, k = {run.k}") from None
    return FeatureChoice(run.k, exponent=exponent, offset=offset)


BY_FEATURE = AuxZipf(claim="feature")
OPEN = Threshold(0.0)  # for objectives that find their own sparsity

RULES: dict[str, Callable[[Setting], TrainConfig]] = {
    "topk": lambda s: s.config(TopK(s.k), auxiliary=None),
    "topk+aux_k": lambda s: s.config(TopK(s.k), auxiliary=AuxK()),
    "topk+aux_zipf": lambda s: s.config(TopK(s.k)),  # what `saekit train` does unless told otherwise
    "topk+aux_zipf+equal_norms": lambda s: s.config(TopK(s.k), equal_norms=True),
    "topk+aux_zipf_by_feature": lambda s: s.config(TopK(s.k), auxiliary=BY_FEATURE),
    "mutual": lambda s: s.config(MutualChoice(s.k), auxiliary=None),
    "mutual+aux_k": lambda s: s.config(MutualChoice(s.k), auxiliary=AuxK()),
    "mutual+aux_zipf": lambda s: s.config(MutualChoice(s.k)),
    "mutual+aux_zipf+equal_norms": lambda s: s.config(MutualChoice(s.k), equal_norms=True),
    "mutual+aux_zipf_by_feature": lambda s: s.config(MutualChoice(s.k), auxiliary=BY_FEATURE),
    "mutual+aux_zipf_by_feature+equal_norms": lambda s: s.config(
        MutualChoice(s.k), auxiliary=BY_FEATURE, equal_norms=True
    ),
    "feature_uniform+aux_zipf": lambda s: s.config(FeatureChoice(s.k)),
    # a guess at the curve, fitted to nothing: the exponent of Zipf's law, its head a little flattened
    "feature_zipf+aux_zipf": lambda s: s.config(FeatureChoice(s.k, exponent=1.0, offset=3.0)),
    "feature_zipf+aux_zipf+no_relu": lambda s: s.config(FeatureChoice(s.k, exponent=1.0, offset=3.0, relu=False)),
    "feature_fitted+aux_zipf": lambda s: s.config(fitted(s)),
    "mutual_then_feature": lambda s: s.config(MutualChoice(s.k), then=ThenFeatureChoice()),
    "matryoshka_mutual": lambda s: s.config(MutualChoice(s.k), objective=Matryoshka()),
    "jumprelu": lambda s: s.config(OPEN, objective=JumpReLU(s.k)),
    "gated": lambda s: s.config(OPEN, objective=Gated(s.k)),
    "relu_l1": lambda s: s.config(OPEN, objective=ReLUL1(s.k)),
    # the same rule as mutual+aux_k, by another library's own trainer
    "dictionary_learning_batchtopk": lambda s: s.config(MutualChoice(s.k), auxiliary=AuxK()),
}
BY_PEER = ("dictionary_learning_batchtopk",)
