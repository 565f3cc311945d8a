"""Small sets of features that carry a behaviour: how much they bring about alone, and how much is missing without them.

A behaviour is a metric that differs between prompts and their corrupted counterparts, which stand at the same
places. With `goal` the metric when the whole Site is as on the other prompts, and `base` when nothing is:

    sufficient(S) = (metric with S alone patched in - base) / (goal - base)           faithfulness of the set
    necessary(S)  = (goal - metric with all but S patched in) / (goal - base)         its completeness

both of the mean over prompts, all tokens that count, error nodes patched with "all". 1 is the whole effect;
parts may exceed it where others work against them.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.activations.mask import MaskPolicy
from saekit.codes import SparseCodes
from saekit.errors import SaekitError
from saekit.patching.attribution import along_decoder, change_between
from saekit.patching.effects import Prompts, check_same_places, read_prompts
from saekit.patching.metric import Metric
from saekit.patching.splice import write, writing_site
from saekit.patching.tokens import TokenMask
from saekit.sae import SAE
from saekit.targets import Site, Target


@dataclass(frozen=True, slots=True)
class SetCurve:
    """A growing set of features.

    Attributes:
        features: `(size,)` in the order in which they were added.
        sufficient: `(size + 1,)` of the first 0, 1, 2, ... features.
        necessary: `(size + 1,)`.
        effect: `goal - base`, in units of the metric.
    """

    features: Int[Tensor, " size"]
    sufficient: Float[Tensor, " sizes"]
    necessary: Float[Tensor, " sizes"]
    effect: float


@dataclass(frozen=True, slots=True)
class Behaviour:
    """Prompts, their counterparts, and what differs at one Site; make one with `read_behaviour`.

    Attributes:
        change: what each entry of the codes gains on the way from `own` to `other`.
        base, goal: mean metric with nothing and with everything patched in.
    """

    target: Target
    sae: SAE
    site: Site
    ids: Int[Tensor, "prompts context"]
    metric: Metric
    own: Prompts
    whole: Float[Tensor, "prompts context d_out"]
    change: SparseCodes
    base: float
    goal: float

    @property
    def written(self) -> Site:
        """Where features are patched in."""
        return writing_site(self.sae, self.site)

    @property
    def rows(self) -> Float[Tensor, "tokens d_out"]:
        """The activations that features write into, in the SAE's type."""
        return self.own.vectors.flatten(0, 1).to(self.sae.b_dec)

    def vectors(self, features: Int[Tensor, " m"], *, all_but: bool) -> Tensor:
        """Activations with the features patched in, or everything but them."""
        entries = (torch.isin(self.change.features, features)).to(self.change.values)
        written = write(self.change.with_values(self.change.values * entries), self.sae, self.rows)
        written = written.detach().to(self.own.vectors).view_as(self.own.vectors)
        return self.whole - written if all_but else self.own.vectors + written

    def shares(self, features: Int[Tensor, " m"]) -> tuple[float, float]:
        """How sufficient and how necessary a set is."""
        with torch.no_grad():
            alone, without = (
                _value(self.target, self.written, self.ids, self.metric, self.vectors(features, all_but=all_but))
                for all_but in (False, True)
            )
        effect = self.goal - self.base
        return (float(alone) - self.base) / effect, (self.goal - float(without)) / effect


def read_behaviour(
    target: Target,
    sae: SAE,
    site: Site,
    ids: Int[Tensor, "prompts context"],
    other_ids: Int[Tensor, "_ _"],
    metric: Metric,
    *,
    mask: MaskPolicy | TokenMask = MaskPolicy(),
) -> Behaviour:
    """Run both sides; `ids` are what one starts from, `other_ids` where features are taken from.

    Raises:
        ShapeError: prompts of different sizes.
        SaekitError: replacing the whole Site does not change the metric, so there is nothing to explain.
    """
    check_same_places(ids, other_ids)
    own, other = (read_prompts(target, sae, site, side, mask=mask) for side in (ids, other_ids))
    whole = torch.where(own.grid.keep[..., None], other.vectors, own.vectors)
    with torch.no_grad():
        base, goal = (
            float(_value(target, writing_site(sae, site), ids, metric, vectors)) for vectors in (own.vectors, whole)
        )
    if base == goal:
        raise SaekitError(
            f"the metric is {base:.4g} with and without what {site} has on the other prompts; choose another Site, "
            "or prompts that differ in what the metric measures"
        )
    return Behaviour(target, sae, site, ids, metric, own, whole, change_between(own, other), base, goal)


def greedy_set(behaviour: Behaviour, *, size: int) -> SetCurve:
    """Add one feature after the other, always the one that promises most where the set stands.

    The promise is the feature's attribution at the activations with the present set patched in, one forward and
    one backward pass per feature; the curves are exact.

    Raises:
        SaekitError: fewer features differ between the two sides than are asked for.
    """
    _check_size(behaviour, size)
    chosen = torch.zeros(0, dtype=torch.int64, device=behaviour.change.device)
    for _ in range(size):
        promise = _promise(behaviour, chosen)
        promise[chosen] = -torch.inf
        chosen = torch.cat([chosen, promise.argmax()[None]])
    return curve_of(behaviour, chosen)


def halved_set(behaviour: Behaviour, *, size: int) -> SetCurve:
    """Hierarchical attribution: of all features that differ, halve away the weaker ones until `size` are left.

    A round asks each feature for its attribution among those that are still in, the mean of its gradient with nothing
    and with all of them patched in. That takes two passes per halving, however large the set, where `greedy_set` takes
    one per feature; it is our choice among the ways to attribute in levels.

    Raises:
        SaekitError: as for `greedy_set`.
    """
    _check_size(behaviour, size)
    left = behaviour.change.features.unique()
    nothing = _promise(behaviour, left[:0])
    while True:
        promise = (nothing + _promise(behaviour, left))[left]
        left = left[promise.argsort(descending=True, stable=True)]
        if len(left) == size:
            return curve_of(behaviour, left)
        left = left[: max(size, len(left) // 2)]


def curve_of(behaviour: Behaviour, features: Int[Tensor, " size"]) -> SetCurve:
    """How sufficient and how necessary the first 0, 1, 2, ... of some features are; exact, two passes for each."""
    curve = [(0.0, 0.0), *(behaviour.shares(features[:n]) for n in range(1, len(features) + 1))]
    sufficient, necessary = torch.tensor(curve, dtype=torch.float64).T
    return SetCurve(features, sufficient, necessary, behaviour.goal - behaviour.base)


def _check_size(behaviour: Behaviour, size: int) -> None:
    different = len(behaviour.change.features.unique())
    if not 1 <= size <= different:
        raise SaekitError(
            f"a set of {size} features is asked for, and {different} differ between the prompts; "
            "give a size of 1 up to that"
        )


def _promise(behaviour: Behaviour, chosen: Int[Tensor, " m"]) -> Float[Tensor, " n_features"]:
    """Attribution of each feature towards the goal, with `chosen` patched in; -inf for those that do not differ."""
    change = behaviour.change
    upwards = 1.0 if behaviour.goal > behaviour.base else -1.0
    with torch.enable_grad():
        start = behaviour.vectors(chosen, all_but=False).requires_grad_()
        value = _value(behaviour.target, behaviour.written, behaviour.ids, behaviour.metric, start)
        gradient = torch.autograd.grad(value, start)[0]
    gradient = gradient.flatten(0, 1).to(behaviour.sae.b_dec)
    promise = along_decoder(change, gradient, behaviour.sae, behaviour.rows) * upwards
    of_feature = promise.new_full((change.n_features,), -torch.inf)
    of_feature[change.features] = 0.0
    return of_feature.index_add_(0, change.features, promise)


def _value(target: Target, site: Site, ids: Tensor, metric: Metric, vectors: Tensor) -> Tensor:
    """Mean metric with the Site at these vectors."""
    return metric(target.run(ids, edits={site: lambda _: vectors}), torch.arange(len(ids))).mean()
