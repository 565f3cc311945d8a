"""A-ViT: what features do, by path and by dose, and what goes on without the tokens that left."""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.adaptive.a_vit_report import accuracy
from saekit.adaptive.effects import (
    against_random,
    answers_changed,
    dose_response,
    effect_of,
    matched_features,
    trace_edited,
)
from saekit.adaptive.interventions import DecisionEdit, Force, Replay, deciding, shuffled
from saekit.adaptive.questions.a_vit_views import View
from saekit.adaptive.telling import FEWEST_ACTIVE
from saekit.adaptive.trace import DecisionTrace
from saekit.codes import SparseCodes
from saekit.patching import Intervention, OffDistributionWarning, Scale, intervening
from saekit.patching.operation import Clamp, Operation
from saekit.targets import Site

CONTROLS = 19
FEWER_CONTROLS = 5  # where a run of all layers is needed for each
STRONG = 0.95


def caused(views: Sequence[View]) -> dict[str, float]:
    """Each layer's feature, taken from the gate, from the content with depths frozen, or from both."""
    found: dict[str, float] = {}
    for view in views:
        here, images, feature = f"layer {view.step}", view.halves[1].images, view.chosen
        clean, codes = view.halves[1].trace, view.codes[1]
        ranked = against_random(view.target, images, view.sae, codes, feature, view.step, count=CONTROLS)
        found |= {
            f"{here}: gate alone, flipped": ranked.effect.flipped,
            f"{here}: gate alone, features like it, mean": sum(ranked.others) / len(ranked.others),
            f"{here}: gate alone, features like it, most": max(ranked.others),
            f"{here}: gate alone, p": ranked.p,
        }
        for dose, effect in dose_response(view.target, images, view.sae, feature, view.step).items():
            found[f"{here}: gate alone, change of multiplications at dose {dose:g}"] = effect.macs
        matched = matched_features(codes, feature, count=FEWER_CONTROLS)
        frozen = [_answers_changed(view, clean, one) for one in (feature, *matched)]
        both = trace_edited(view.target, images, view.sae, [feature], view.step, path="both")
        found |= {
            f"{here}: content alone, answers changed": frozen[0],
            f"{here}: content alone, features like it, mean": sum(frozen[1:]) / len(matched),
            f"{here}: both, flipped": effect_of(clean, both, view.step).flipped,
            f"{here}: both, accuracy": accuracy(both.more["logits"], view.halves[1].labels),
        }
    return found


def moved_at(view: View) -> dict[str, float]:
    """Shares of places that decide otherwise: by the gate here, and by what later blocks make of the content."""
    images, clean, feature = view.halves[1].images, view.halves[1].trace, view.chosen
    now = trace_edited(view.target, images, view.sae, [feature], view.step)
    matched = matched_features(view.codes[1], feature, count=FEWER_CONTROLS)
    later = [float(clean.changed(_content_edited(view, one)).float().mean()) for one in (feature, *matched)]
    return {
        "now": float(clean.changed(now).float().mean()),
        "later": later[0],
        "later, features like it": sum(later[1:]) / len(matched),
    }


def lost_with_tokens(view: View) -> dict[str, float]:
    """The class token behind a late layer, where it is live: against no token ever leaving, and others leaving.

    Features that are others: 1 less the share of active features that both runs have. Attention is what the last
    layer's class token pays patches with ink, beside their share of the patches that are left.
    """
    site, half = view.target.step(view.step).content, view.halves[1]
    usual, codes, live = _class_token(view, site, [])
    found: dict[str, float] = {}
    others = {"no token leaves": Force("go on"), "as many leave, elsewhere": Replay(shuffled(half.trace))}
    for name, edit in others.items():
        vectors, there, live_there = _class_token(view, site, [edit])
        both = (live & live_there).nonzero()[:, 0]
        found[f"{name}: features that are others"] = 1 - _shared(codes.select(both), there.select(both))
        found[f"{name}: cosine of states"] = float(
            torch.nn.functional.cosine_similarity(usual[both], vectors[both]).mean()
        )
    last = Site.parse(f"layers.{half.trace.decision.shape[1] - 1}.block.attention.pattern:out")
    pattern = view.target.target.read(half.images, [last])[last][:, :, 0, 1:].mean(1)
    left, inked = half.trace.live[:, -1, 1:], half.ink > 0
    asks = half.trace.live[:, -1, 0] & left.any(1)
    paid = (pattern * (left & inked)).sum(1) / (pattern * left).sum(1)
    found["attention to patches with ink"] = float(paid[asks].mean())
    found["their share of what is left"] = float(((left & inked).sum(1) / left.sum(1))[asks].mean())
    return found


def attacked(views: Sequence[View]) -> dict[str, float]:
    """Multiplications and accuracy with one feature of each layer at its strong level for every token, gates alone.

    Strong is its 95th percentile where it fires. Slowing is the feature of each layer whose score is most negative
    at that level, stopping the one whose is most positive; features like them are the control.
    """
    clean, labels = views[0].halves[1].trace, views[0].halves[1].labels
    found = {"usual: multiplications": float(clean.mac_ratio.mean())}
    found["usual: accuracy"] = accuracy(clean.more["logits"], labels)
    strong = [_strong(view) for view in views]
    for name, sign in (("slowing", -1.0), ("stopping", 1.0)):
        chosen = []
        for view, level in zip(views, strong, strict=True):
            readout = view.target.step(view.step).readout
            assert readout is not None
            pushes = sign * level * (view.sae.W_dec.detach() @ readout[0])
            chosen.append(int(pushes.nan_to_num(-torch.inf).argmax()))
        for dose in (0.5, 1.0, 2.0):
            trace = _clamped(views, chosen, strong, dose)
            found[f"{name}, dose {dose:g}: multiplications"] = float(trace.mac_ratio.mean())
            found[f"{name}, dose {dose:g}: accuracy"] = accuracy(trace.more["logits"], labels)
        like = [
            matched_features(view.codes[0], feature, count=FEWER_CONTROLS)
            for view, feature in zip(views, chosen, strict=True)
        ]
        costs = [float(_clamped(views, each, strong, 1.0).mac_ratio.mean()) for each in zip(*like, strict=True)]
        found[f"{name}, features like them: multiplications"] = sum(costs) / len(costs)
    return found


def _answers_changed(view: View, clean: DecisionTrace, feature: int) -> float:
    edited = trace_edited(view.target, view.halves[1].images, view.sae, [feature], view.step, path="content")
    return answers_changed(clean, edited)


def _content_edited(view: View, feature: int) -> DecisionTrace:
    """The run with a feature taken from the content, decisions free."""
    site = view.target.step(view.step).content
    edit = Intervention(site=site, operation=cast(Operation, Scale(0.0)), features=(feature,), may_idle=True)
    return _with_edits(view, [edit], {site: view})


def _clamped(views: Sequence[View], chosen: Sequence[int], strong: Sequence[Tensor], dose: float) -> DecisionTrace:
    edits, by_site = [], {}
    for view, feature, level in zip(views, chosen, strong, strict=True):
        site, value = view.target.step(view.step).reads, dose * float(level[feature])
        operation = cast(Operation, Clamp(low=value, high=value))
        edits.append(Intervention(site=site, operation=operation, features=(feature,), may_idle=True))
        by_site[site] = view
    return _with_edits(views[0], edits, by_site)


def _with_edits(view: View, edits: Sequence[Intervention], by_site: Mapping[Site, View]) -> DecisionTrace:
    with warnings.catch_warnings():
        # how far off one gets is what is asked
        warnings.simplefilter("ignore", OffDistributionWarning)
        with intervening(view.target.target, list(edits), {site: of.sae for site, of in by_site.items()}):
            return view.target.trace(view.halves[1].images)


@torch.no_grad()
def _strong(view: View) -> Float[Tensor, " features"]:
    """Of each feature, a strong level on the training images; nan where it fires on fewer than five tokens."""
    columns = view.codes[0].active().by_feature()
    parts = columns.values.split(columns.column_starts.diff().tolist())
    never = torch.full((), torch.nan)
    return torch.stack([part.quantile(STRONG) if len(part) >= FEWEST_ACTIVE else never for part in parts])


def _class_token(view: View, site: Site, edits: Sequence[DecisionEdit]) -> tuple[Tensor, SparseCodes, Tensor]:
    """Its state behind a layer, the features active there, and in which images it is live."""
    images = view.halves[1].images
    with deciding(view.target, edits) if edits else nullcontext():
        vectors, trace = view.target.target.read(images, [site])[site], view.target.trace(images)
    return vectors[:, 0], view.sae.encode(vectors[:, 0]), trace.live[:, view.step, 0]


def _shared(one: SparseCodes, two: SparseCodes) -> float:
    """Mean share of the features that are active in both, of those active in either."""
    a, b = ((codes.to_dense() > 0).float() for codes in (one, two))
    return float(((a * b).sum(1) / torch.maximum(a, b).sum(1).clamp(min=1)).mean())
