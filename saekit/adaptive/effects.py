"""What a feature does to decisions: taken away from the decision path, from the content path, or from both.

An effect means little by itself, since any edit moves some token over a threshold. It is held against features drawn
from those of about the same rate and strength, and against smaller and larger doses of the same edit.
"""

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.adaptive.attribution import DecisionAttribution
from saekit.adaptive.deciding import DecidingTarget
from saekit.adaptive.harvest import harvest, live_only
from saekit.adaptive.interventions import Replay, deciding
from saekit.adaptive.telling import FEWEST_ACTIVE, activation_sums
from saekit.adaptive.trace import DecisionTrace
from saekit.codes import SparseCodes
from saekit.errors import DataError, SaekitError
from saekit.patching import Intervention, OffDistributionWarning, Scale, intervening
from saekit.patching.operation import Operation
from saekit.sae import SAE

Path = Literal["decision", "content", "both"]


@dataclass(frozen=True, slots=True)
class DecisionEffect:
    """The difference that one edit made, over the places whose decision at the step was open in the clean run.

    Attributes:
        flipped: share of them that decided otherwise at that step.
        towards: share that went over to option 1 less the share that left it.
        anywhere: share of all places with any other decision at any step: decisions cascade.
        macs: change of the executed multiplications, as a share of the clean run's.
    """

    flipped: float
    towards: float
    anywhere: float
    macs: float


def rank_p(value: float, others: Sequence[float]) -> float:
    """The share of them and itself that is at least as large: the chance of such a rank by luck."""
    return (1 + sum(other >= value for other in others)) / (1 + len(others))


@dataclass(frozen=True, slots=True)
class AgainstRandom:
    """One feature's effect beside that of others like it.

    Attributes:
        effect: of the feature.
        others: `flipped` of each of the matched features.
        p: share of features at least as strong, the feature itself counted: the chance of such a rank by luck.
    """

    feature: int
    effect: DecisionEffect
    matched: tuple[int, ...]
    others: tuple[float, ...]

    @property
    def p(self) -> float:
        return rank_p(self.effect.flipped, self.others)


def trace_edited(
    target: DecidingTarget,
    batch: Tensor,
    sae: SAE,
    features: Sequence[int],
    step: int,
    *,
    path: Path = "decision",
    dose: float = 0.0,
) -> DecisionTrace:
    """The decisions with some features scaled by `dose` (0 ablates) where the step reads its residual stream.

    On the content path alone, all decisions are held as they are in the clean run.

    Raises:
        SaekitError: a feature that the SAE does not have, or a step without a free decision.

    Warns:
        OffDistributionWarning: an edit of the content, or of what a reader that is not linear reads, that takes
            vectors far off what came before.
    """
    here = target.step(step)
    sites = {"decision": (here.reads,), "content": (here.content,), "both": (here.reads, here.content)}[path]
    operation = cast(Operation, Scale(dose))
    edits = [Intervention(site=site, operation=operation, features=tuple(features), may_idle=True) for site in sites]
    with ExitStack() as stack:
        if path == "decision" and here.readout is not None:
            # a linear reader has no norm that it is used to
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", OffDistributionWarning)
        if path == "content":
            stack.enter_context(deciding(target, [Replay(target.trace(batch))]))
        stack.enter_context(intervening(target.target, edits, dict.fromkeys(sites, sae)))
        return target.trace(batch)


def effect_of(clean: DecisionTrace, edited: DecisionTrace, step: int) -> DecisionEffect:
    """Compare two runs on the same batch."""
    was, now, live = (trace[:, step] for trace in (clean.decision, edited.decision, clean.live & edited.live))
    n = max(1, int(live.sum()))
    return DecisionEffect(
        flipped=int(((was != now) & live).sum()) / n,
        towards=(int(((now == 1) & live).sum()) - int(((was == 1) & live).sum())) / n,
        anywhere=float(clean.changed(edited).float().mean()),
        macs=float(edited.macs.sum() / clean.macs.sum()) - 1,
    )


def answers_changed(clean: DecisionTrace, edited: DecisionTrace) -> float:
    """The share of examples of which the model says something else; of models that classify."""
    was, now = (trace.more["logits"].argmax(-1) for trace in (clean, edited))
    return float((was != now).float().mean())


def matched_features(codes: SparseCodes, feature: int, *, count: int = 20) -> tuple[int, ...]:
    """The features most like this one in how often they fire and how strongly, both on a logarithmic scale.

    Raises:
        SaekitError: a feature that never fires here, or too few others that do.
    """
    rate = codes.feature_counts().float()
    strength = activation_sums(codes) / rate.clamp(min=1)
    usable = rate >= FEWEST_ACTIVE
    if not 0 <= feature < codes.n_features or not bool(usable[feature]):
        raise SaekitError(
            f"feature {feature} fires on fewer than {FEWEST_ACTIVE} of these tokens; choose one that does"
        )
    apart = (rate / rate[feature]).log().abs() + (strength / strength[feature]).clamp(min=1e-9).log().abs()
    apart[~usable] = torch.inf
    apart[feature] = torch.inf
    if int(apart.isfinite().sum()) < count:
        raise SaekitError(f"only {int(apart.isfinite().sum())} other features fire here; ask for fewer than {count}")
    return tuple(apart.topk(count, largest=False).indices.tolist())


def as_many_like(codes: SparseCodes, feature: int, *, most: int) -> tuple[int, ...]:
    """The same, and fewer where no more others fire."""
    others = int((codes.feature_counts() >= FEWEST_ACTIVE).sum()) - 1
    return matched_features(codes, feature, count=min(most, others))


def against_random(
    target: DecidingTarget, batch: Tensor, sae: SAE, codes: SparseCodes, feature: int, step: int, *, count: int = 20
) -> AgainstRandom:
    """Ablate a feature in the decision path, and each of `count` features like it.

    Args:
        codes: of live tokens, by which likeness is told.
    """
    clean = target.trace(batch)
    matched = matched_features(codes, feature, count=count)
    effects = [effect_of(clean, trace_edited(target, batch, sae, [one], step), step) for one in (feature, *matched)]
    return AgainstRandom(feature, effects[0], matched, tuple(effect.flipped for effect in effects[1:]))


def strongest(attribution: DecisionAttribution, *, count: int = 5) -> list[int]:
    """The features that move the score most, over all tokens."""
    return attribution.mean_size.topk(count).indices.tolist()


def strongest_by_effect(
    target: DecidingTarget, inputs: Tensor, sae: SAE, step: int, *, count: int = 5, candidates: int = 24
) -> list[int]:
    """The features whose ablation in the decision path changes most decisions, where a score is not linear.

    Args:
        inputs: not those on which the effect is to be reported: whoever comes out first here was lucky too.
        candidates: how many are tried, of those that move what is read most (activation times decoder norm).
    """
    codes = sae.encode(live_only(harvest(target, inputs, step)).vectors)
    tried = writing_most(codes, sae, count=candidates)
    if not tried:
        raise DataError(
            f"no feature fires on {FEWEST_ACTIVE} of these tokens, so that none can be tried; give more inputs"
        )
    clean = target.trace(inputs)
    flipped = [effect_of(clean, trace_edited(target, inputs, sae, [one], step), step).flipped for one in tried]
    return [tried[place] for place in torch.tensor(flipped).topk(min(count, len(tried))).indices.tolist()]


def writing_most(codes: SparseCodes, sae: SAE, *, count: int) -> list[int]:
    """The features that move what is read most (activation times decoder norm), of those that fire often enough."""
    size = activation_sums(codes) * sae.W_dec.norm(dim=1) * (codes.feature_counts() >= FEWEST_ACTIVE)
    return size.topk(min(count, int((size > 0).sum()))).indices.tolist()


def dose_response(
    target: DecidingTarget,
    batch: Tensor,
    sae: SAE,
    feature: int,
    step: int,
    *,
    doses: Sequence[float] = (0.0, 0.5, 1.0, 2.0),
) -> dict[float, DecisionEffect]:
    """The effect in the decision path by dose; at 1 nothing is changed."""
    clean = target.trace(batch)
    return {
        dose: effect_of(clean, trace_edited(target, batch, sae, [feature], step, dose=dose), step) for dose in doses
    }


def score_shift(attribution: DecisionAttribution, feature: int) -> Float[Tensor, " n"]:
    """How far each token's score moves if the feature is taken away: exactly what it added, with the sign turned."""
    entries = (attribution.added.features == feature).nonzero()[:, 0]
    tokens = attribution.added.token_of_entry()[entries]
    return -attribution.error.new_zeros(len(attribution.score)).index_add(0, tokens, attribution.added.values[entries])
