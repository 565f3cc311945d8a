"""How well something tells decisions apart: a feature, a linear probe, or what is known without looking inside.

A feature that is active where a patch stops has not said much if the patch's position says the same. So everything
here is a score for each decision, and scores of any origin are compared by one number, the area under the ROC curve.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from saekit.codes import SparseCodes
from saekit.errors import DataError, SaekitError
from saekit.patching.statistics import mean_ranks

FEWEST_ACTIVE = 5


def auc(score: Float[Tensor, " n"], positive: Bool[Tensor, " n"]) -> float:
    """The chance that a positive one has the larger score (half where equal); nan where all are of one sort."""
    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    if not n_positive or not n_negative:
        return float("nan")
    return float((mean_ranks(score)[positive].sum() - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))


def activation_of(codes: SparseCodes, feature: int) -> Float[Tensor, " n_tokens"]:
    """One feature's column, zeros and all."""
    entries = codes.features == feature
    return codes.values.new_zeros(codes.n_tokens).index_add(0, codes.token_of_entry()[entries], codes.values[entries])


def activation_sums(codes: SparseCodes) -> Float[Tensor, " n_features"]:
    """The sum of each feature's activations."""
    return codes.values.new_zeros(codes.n_features).index_add(0, codes.features, codes.values)


def purity(codes: SparseCodes, key: Int[Tensor, " n_tokens"], *, fewest: int) -> Float[Tensor, " n_features"]:
    """Of the tokens on which each feature is active, the share with their commonest key; nan where they are too few."""
    codes, counts = codes.active(), torch.zeros(codes.n_features, int(key.max()) + 1)
    where = codes.features, key[codes.token_of_entry()]
    counts.index_put_(where, torch.ones(len(codes.features)), accumulate=True)
    fired = counts.sum(1)
    return torch.where(fired >= fewest, counts.max(1).values / fired.clamp(min=1), torch.nan)


def feature_aucs(codes: SparseCodes, positive: Bool[Tensor, " n_tokens"]) -> Float[Tensor, " n_features"]:
    """The same of each feature's activation; nan where it fires on fewer than five tokens."""
    found = torch.full((codes.n_features,), torch.nan)
    columns = codes.active().by_feature()
    for feature in (codes.feature_counts() >= FEWEST_ACTIVE).nonzero()[:, 0].tolist():
        begin, end = columns.column_starts[feature : feature + 2].tolist()
        activation = columns.values.new_zeros(codes.n_tokens)
        activation[columns.tokens[begin:end]] = columns.values[begin:end]
        found[feature] = auc(activation, positive)
    return found


@dataclass(frozen=True, slots=True)
class Telling:
    """The feature that tells best, chosen on some data and measured on other.

    Attributes:
        auc: on the other data, turned so that what was above one half in the choice counts upwards.
        with_decision: whether it is active where the positive ones are.
    """

    feature: int
    auc: float
    with_decision: bool


def best_telling(
    train: tuple[SparseCodes, Bool[Tensor, " n"]], test: tuple[SparseCodes, Bool[Tensor, " m"]]
) -> Telling:
    """Choose by the training half, measure on the other.

    Raises:
        DataError: all decisions of the training half are the same, or no feature fires there.
    """
    chosen = feature_aucs(*train)
    if bool(chosen.isnan().all()):
        raise DataError("no feature tells anything: one decision everywhere, or no feature active; give more examples")
    feature = int((chosen - 0.5).abs().nan_to_num(-1).argmax())
    codes, positive = test
    activation = activation_of(codes, feature)
    upwards = bool(chosen[feature] > 0.5)
    return Telling(feature, auc(activation if upwards else -activation, positive), upwards)


def rate_by(key: Int[Tensor, " n"], positive: Shaped[Tensor, " n"], asked: Int[Tensor, " m"]) -> Float[Tensor, " m"]:
    """The baseline that looks at a key alone (position, token id): the mean of `positive` among those of the same key.

    A key that was not seen gets the mean of all.
    """
    size = int(torch.cat([key, asked]).max()) + 1
    counts = torch.bincount(key, minlength=size).float()
    sums = torch.bincount(key, weights=positive.float(), minlength=size).float()
    return torch.where(counts > 0, sums / counts.clamp(min=1), positive.float().mean())[asked]


def probe(
    train: Float[Tensor, "n d"], labels: Int[Tensor, " n"], test: Float[Tensor, "m d"]
) -> Float[Tensor, "m classes"]:
    """Log-probabilities by a logistic regression on standardised inputs; the classes are those of `labels`, in order.

    Raises:
        SaekitError: scikit-learn is not there.
        DataError: labels of one class.
    """
    try:
        from sklearn.linear_model import LogisticRegression  # optional, and slow to import
    except ImportError as error:
        raise SaekitError("probes are scikit-learn's; pip install 'saekit[adaptive]'") from error
    if len(labels.unique()) < 2:
        raise DataError("a probe needs two classes, and all labels are the same; give other examples")
    mean, spread = train.mean(0), train.std(0).clamp(min=1e-6)
    fitted = LogisticRegression(max_iter=1000).fit(((train - mean) / spread).numpy(), labels.numpy())
    logits = torch.from_numpy(fitted.decision_function(((test - mean) / spread).numpy()))
    if logits.ndim == 1:  # of two classes it gives the difference
        logits = torch.stack([torch.zeros_like(logits), logits], 1)
    return logits.log_softmax(1)


def probe_auc(
    train: Float[Tensor, "n d"], positive: Bool[Tensor, " n"], test: Float[Tensor, "m d"], asked: Bool[Tensor, " m"]
) -> float:
    """How well a probe trained on the one tells the other."""
    return auc(probe(train, positive.long(), test)[:, 1], asked)


def mutual_information(one: Int[Tensor, " n"], two: Int[Tensor, " n"]) -> float:
    """Of two numbered properties, in bits, from their joint counts; biased upwards by (cells / 2n) / ln 2."""
    _, a = one.unique(return_inverse=True)
    _, b = two.unique(return_inverse=True)
    joint = torch.zeros(int(a.max()) + 1, int(b.max()) + 1, dtype=torch.float64)
    joint.index_put_((a, b), torch.ones(len(a), dtype=torch.float64), accumulate=True)
    joint /= len(a)
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return float((joint * (joint / apart).log2().nan_to_num(0, neginf=0)).sum())


def overlap(one: Sequence[int], two: Sequence[int]) -> float:
    """Of two sets of equal size, the share in both."""
    return len(set(one) & set(two)) / max(1, len(one))
