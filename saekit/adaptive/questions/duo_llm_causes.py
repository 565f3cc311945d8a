"""What a feature of a Duo-LLM router does: to choices, to the loss through choices, to the loss through content.

Losses are nats per token and always a difference from the clean run on the same rows. An edit of the choice also
changes what is spent, so that each is looked at twice: as it comes, and with the layer's threshold moved until as
many tokens take big as before (or, in `steering`, with the threshold alone moved until as many do as after).
"""

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from saekit.adaptive.attribution import attribute_decisions
from saekit.adaptive.duo_llm import BIG
from saekit.adaptive.effects import effect_of, matched_features, rank_p, strongest, trace_edited
from saekit.adaptive.interventions import Shift, Where, deciding, trace_with
from saekit.adaptive.questions.duo_llm_halves import Case
from saekit.adaptive.trace import DecisionTrace
from saekit.errors import SaekitError
from saekit.patching import Add, Clamp, Intervention, intervening
from saekit.patching.operation import Operation
from saekit.patching.statistics import bootstrap

DOSES = (0.0, 0.5, 1.0, 2.0)
TOGETHER = 5


def what_a_feature_does(case: Case, other: int, *, controls: int = 19) -> dict[str, float]:
    """The feature that moves the margin most, taken away where the router reads, or where the feed-forwards read.

    Args:
        other: another layer, whose router the same feature is taken away from.
        controls: how many features of about the same rate and strength it is held against.

    Raises:
        SaekitError: too few of them.
    """
    first = strongest(attribute_decisions(case.sae, case.train.read.vectors, case.step), count=TOGETHER)
    feature, clean = first[0], case.target.trace(case.test.ids)
    alike = matched_features(case.test.codes, feature, count=controls)
    own = _ablated(case, clean, [feature])
    others = [_ablated(case, clean, [one]) for one in alike]
    found = {
        "feature": float(feature),
        "rate": float(case.test.activation(feature).count_nonzero()) / case.test.codes.n_tokens,
        "big_layers_per_token": big_layers(clean),
        "nats": float(clean.more["nats"].mean()),
    }
    for name, value in own.items():
        sizes = [abs(one[name]) for one in others]
        found |= {
            name: value,
            f"{name}_mean_size_of_matched": sum(sizes) / len(sizes),
            f"{name}_p": rank_p(abs(value), sizes),
        }
    chosen = {
        dose: trace_edited(case.target, case.test.ids, case.sae, [feature], case.number, dose=dose) for dose in DOSES
    }
    for dose in DOSES:
        content = trace_edited(case.target, case.test.ids, case.sae, [feature], case.number, path="content", dose=dose)
        found |= {
            f"choice_flipped_at_dose_{dose:g}": effect_of(clean, chosen[dose], case.number).flipped,
            f"choice_nats_at_dose_{dose:g}": nats_change(clean, chosen[dose]),
            f"content_nats_at_dose_{dose:g}": nats_change(clean, content),
        }
    elsewhere = [
        effect_of(clean, trace_edited(case.target, case.test.ids, case.sae, [one], other), other).flipped
        for one in (feature, *alike)
    ]
    found |= {
        "other_layer": float(other),
        "other_layer_flipped": elsewhere[0],
        "other_layer_flipped_mean_of_matched": sum(elsewhere[1:]) / len(alike),
    }
    together = _ablated(case, clean, first)
    return (
        found
        | _interval("choice_nats", clean, chosen[0.0])
        | {f"five_strongest_{name}": value for name, value in together.items()}
    )


@torch.no_grad()
def steering(case: Case, *, controls: int = 19) -> dict[str, float]:
    """Two features, each set to a multiple of its typical strength on every token, where the router reads.

    `more` is of those that speak for big the one that moves the margin most, `less` of those against it. Held against
    the layer's threshold moved until as many tokens take big (`shift`), and against features like it, each set to its
    own typical strength. *Adding* a feature everywhere is no question: a linear router makes a shift of it, as
    `adding_differs_from_a_shift` says.

    Raises:
        SaekitError: too few features like one.
    """
    size = attribute_decisions(case.sae, case.train.read.vectors, case.step).mean_size
    for_big = case.sae.W_dec @ _direction(case) > 0
    clean = case.target.trace(case.test.ids)
    found = {"big_layers_per_token": big_layers(clean), "nats": float(clean.more["nats"].mean())}
    for name, those in (("more", for_big), ("less", ~for_big)):
        feature = int(size.masked_fill(~those, -1).argmax())
        by_dose = _by_dose(case, clean, feature)
        beside = _beside_matched(case, clean, feature, by_dose["big_layers_at_dose_1"], controls)
        found |= {f"{name}_{what}": value for what, value in (by_dose | beside).items()}
    return found


def _by_dose(case: Case, clean: DecisionTrace, feature: int) -> dict[str, float]:
    typical = _typical(case, feature)
    found = {"feature": float(feature), "typical_strength": typical}
    for dose in DOSES:
        set_to = _edited(case, Clamp(dose * typical, dose * typical), feature)
        shifted = _spending(case, clean, _taken(case, set_to))
        found |= {
            f"big_layers_at_dose_{dose:g}": big_layers(set_to),
            f"nats_at_dose_{dose:g}": nats_change(clean, set_to),
            f"shift_big_layers_at_dose_{dose:g}": big_layers(shifted),
            f"shift_nats_at_dose_{dose:g}": nats_change(clean, shifted),
            f"differs_from_shift_at_dose_{dose:g}": effect_of(shifted, set_to, case.number).flipped,
        } | _interval(f"nats_less_shift_at_dose_{dose:g}", shifted, set_to)
    return found


def _beside_matched(
    case: Case, clean: DecisionTrace, feature: int, at_dose_1: float, controls: int
) -> dict[str, float]:
    alike, sizes = matched_features(case.test.codes, feature, count=controls), []
    for one in alike:
        strength = _typical(case, one)
        sizes.append(abs(big_layers(_edited(case, Clamp(strength, strength), one)) - big_layers(clean)))
    change, typical, direction = at_dose_1 - big_layers(clean), _typical(case, feature), _direction(case)
    moves = typical * float(case.sae.W_dec[feature] @ direction)
    added = _edited(case, cast(Operation, Add(typical)), feature)
    as_shift = trace_with(case.target, case.test.ids, [Shift(moves, _where(case))])
    cosines = [float(cosine_similarity(case.sae.W_dec[one], direction, dim=0)) for one in (feature, *alike)]
    return {
        "big_layers_change_at_dose_1": change,
        "big_layers_change_mean_size_of_matched": sum(sizes) / len(sizes),
        "big_layers_change_largest_of_matched": max(sizes),
        "p": rank_p(abs(change), sizes),
        "cosine_with_router": cosines[0],
        "cosine_with_router_mean_size_of_matched": sum(map(abs, cosines[1:])) / len(alike),
        "margin_at_typical_strength": moves,
        "adding_differs_from_a_shift": float(added.changed(as_shift).float().mean()),
    }


def big_layers(trace: DecisionTrace) -> float:
    """Mean number of big layers per token."""
    return float((trace.decision == BIG).float().sum(1).mean())


def nats_change(clean: DecisionTrace, edited: DecisionTrace) -> float:
    return float((edited.more["nats"] - clean.more["nats"]).mean())


def to_spend(margin: Float[Tensor, " n"], n_big: int) -> float:
    """What to add to margins so that exactly so many exceed 0; halfway between the two next to the edge."""
    ranked = margin.sort(descending=True).values
    outside = torch.cat([ranked[:1] + 2, ranked, ranked[-1:] - 2])
    return -float(outside[n_big : n_big + 2].mean())


def _ablated(case: Case, clean: DecisionTrace, features: Sequence[int]) -> dict[str, float]:
    number, ids = case.number, case.test.ids
    chosen = trace_edited(case.target, ids, case.sae, features, number)
    content = trace_edited(case.target, ids, case.sae, features, number, path="content")
    effect = effect_of(clean, chosen, number)
    amount = to_spend(_margins(case, chosen), _taken(case, clean))
    with deciding(case.target, [Shift(amount, _where(case))]):
        as_before = trace_edited(case.target, ids, case.sae, features, number)
    return {
        "choice_flipped": effect.flipped,
        "choice_towards_big": effect.towards,
        "choice_big_layers": big_layers(chosen) - big_layers(clean),
        "choice_nats": nats_change(clean, chosen),
        "choice_flipped_at_same_spend": effect_of(clean, as_before, number).flipped,
        "choice_nats_at_same_spend": nats_change(clean, as_before),
        "content_nats": nats_change(clean, content),
    }


def _spending(case: Case, clean: DecisionTrace, n_big: int) -> DecisionTrace:
    """With this layer's threshold moved until so many take big there."""
    amount = to_spend(_margins(case, clean), n_big)
    return trace_with(case.target, case.test.ids, [Shift(amount, _where(case))])


def _edited(case: Case, operation: Operation, feature: int) -> DecisionTrace:
    edit = Intervention(site=case.step.reads, operation=operation, features=(feature,), may_idle=True)
    with intervening(case.target.target, [edit], {case.step.reads: case.sae}):
        return case.target.trace(case.test.ids)


def _where(case: Case) -> Where:
    """The places that an edit of features reaches: those behind a BOS."""
    places = range(int(case.test.read.position.min()), case.test.ids.shape[1])
    return Where(steps=(case.number,), places=tuple(places))


def _margins(case: Case, trace: DecisionTrace) -> Float[Tensor, " n"]:
    return trace.margin[:, case.number, int(case.test.read.position.min()) :].flatten()


def _taken(case: Case, trace: DecisionTrace) -> int:
    return int((_margins(case, trace) > 0).sum())


def _typical(case: Case, feature: int) -> float:
    activation = case.train.activation(feature)
    return float(activation.sum() / activation.count_nonzero().clamp(min=1))


def _direction(case: Case) -> Float[Tensor, " width"]:
    readout = case.step.readout
    if readout is None:
        raise SaekitError(f"the score at {case.step.score} is not linear; give a `duo_target`, whose routers are")
    return readout[0]


def _interval(name: str, clean: DecisionTrace, edited: DecisionTrace) -> dict[str, float]:
    """Between which bounds the change lies, were rows drawn anew (95 %)."""
    found = bootstrap((edited.more["nats"] - clean.more["nats"]).mean(1))
    return {f"{name}_low": found.low, f"{name}_high": found.high}
