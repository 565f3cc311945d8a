"""A-ViT: which features tell that a patch halts, what else would tell it, and what the features are of.

Features are chosen on the images that the model learnt from, by an SAE on what each layer's gate reads; all
numbers are of the test images. What the features *do* is asked in `a_vit_causes`.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.adaptive.a_vit import AViT
from saekit.adaptive.a_vit_report import accuracy
from saekit.adaptive.attribution import attribute_decisions
from saekit.adaptive.deciding import a_vit_target
from saekit.adaptive.digits import LabelledImages
from saekit.adaptive.effects import strongest
from saekit.adaptive.harvest import harvest, live_only, train_sae_on
from saekit.adaptive.interventions import Shift, deciding
from saekit.adaptive.questions.a_vit_causes import attacked, caused, lost_with_tokens, moved_at
from saekit.adaptive.questions.a_vit_views import Seen, View
from saekit.adaptive.questions.answers import Answers, answered
from saekit.adaptive.telling import activation_of, auc, best_telling, overlap, probe_auc, rate_by
from saekit.errors import DataError
from saekit.patching.statistics import rank_correlation

FEWEST = 20  # decisions of either sort, for a layer to be asked about
INK_BINS = 20
TOP = 10
SHIFTS = (-1.0, 1.0)


def ask(model: AViT, digits: LabelledImages, *, tokens: int = 200_000, seed: int = 0) -> Answers:
    """The questions of the A-ViT specification.

    Args:
        tokens: that each layer's SAE learns from.

    Raises:
        DataError: no layer in which some patches halt and others go on.
    """
    target, side = a_vit_target(model), model.config.image
    images = digits.train_images(side), digits.test_images(side)
    learnt, asked = (
        Seen(batch, labels, target.trace(batch), model.config.patch)
        for batch, labels in zip(images, (digits.train_labels, digits.test_labels), strict=True)
    )
    halves = learnt, asked
    views = [View(target, step, halves, tokens=tokens, seed=seed) for step in open_layers(halves)]
    if not views:
        raise DataError(
            f"in no layer do {FEWEST} patches halt and {FEWEST} go on; train it longer, or give more images"
        )
    return answered(
        {
            "what tells that a patch halts": lambda: who_halts(views, tokens=tokens, seed=seed),
            "what tells that a patch stays to the end": lambda: who_stays(views),
            "what features do to decisions and answers": lambda: caused(views),
            "what the features are of": lambda: of_what(views),
            "what leaves with the tokens": lambda: lost_with_tokens(views[-1]),
            "whether the same features decide when less or more halts": lambda: at_other_levels(views),
            "what tells an image that takes long": lambda: long_images(views),
            "when the class token has its answer": lambda: class_token(views),
            "how far one feature can drive the cost": lambda: attacked(views),
        }
    )


def open_layers(halves: Sequence[Seen]) -> list[int]:
    """Those in which enough patches of each half halt, and enough go on."""
    counts = []
    for half in halves:
        live, halts = half.trace.live[:, :-1, 1:], half.trace.decision[:, :-1, 1:] == 1
        counts.append(torch.minimum((live & halts).sum((0, 2)), (live & ~halts).sum((0, 2))))
    return (torch.stack(counts).min(0).values >= FEWEST).nonzero()[:, 0].tolist()


def who_halts(views: Sequence[View], *, tokens: int, seed: int) -> dict[str, float]:
    """AUC of halting here: the best feature, one of an SAE that never saw channel 0, probes, position, ink."""
    found: dict[str, float] = {}
    target = views[0].target
    for view in views:
        here, (train, test) = f"layer {view.step}", (view.halts(0), view.halts(1))
        codes = [view.codes[half].select(view.patches(half)) for half in (0, 1)]
        vectors = [view.batches[half].vectors[view.patches(half)] for half in (0, 1)]
        without = [batch[:, 1:] for batch in vectors]
        site, name = target.step(view.step).reads, target.target.name
        blind = train_sae_on(site, without[0], n_features=192, k=8, tokens=tokens, seed=seed, name=name)
        best = best_telling((codes[0], train), (codes[1], test))
        with torch.no_grad():
            best_blind = best_telling((blind.encode(without[0]), train), (blind.encode(without[1]), test))
        found |= {
            f"{here}: halt": float(test.float().mean()),
            f"{here}: best feature": best.auc,
            f"{here}: best feature of an SAE without channel 0": best_blind.auc,
            f"{here}: probe on all but channel 0": probe_auc(without[0], train, without[1], test),
            f"{here}: position alone": auc(rate_by(_place(view, 0), train, _place(view, 1)), test),
            f"{here}: ink alone": auc(rate_by(_binned(view.ink(0)), train, _binned(view.ink(1))), test),
        }
    return found


def who_stays(views: Sequence[View]) -> dict[str, float]:
    """AUC of being live in the last layer, for the features of each layer, beside position and ink."""
    found: dict[str, float] = {}
    for view in views:
        codes = [view.codes[half].select(view.patches(half)) for half in (0, 1)]
        stays = []
        for half in (0, 1):
            batch = view.batches[half].select(view.patches(half))
            stays.append(view.halves[half].trace.live[batch.document, -1, batch.position])
        here = f"layer {view.step}"
        found |= {
            f"{here}: best feature": best_telling((codes[0], stays[0]), (codes[1], stays[1])).auc,
            f"{here}: position alone": auc(rate_by(_place(view, 0), stays[0], _place(view, 1)), stays[1]),
            f"{here}: ink alone": auc(rate_by(_binned(view.ink(0)), stays[0], _binned(view.ink(1))), stays[1]),
        }
    return found


def of_what(views: Sequence[View]) -> dict[str, float]:
    """Of each layer's feature: background or stroke, and whether it acts on the gate or by later layers.

    aligned is the share of its decoder's norm in channel 0. now and later are shares of places that decide otherwise
    when it is taken from the gate's input here, or from what later blocks compute with; beside it later for the mean
    of features like it.
    """
    found: dict[str, float] = {}
    for view in views:
        here, patches = f"layer {view.step}", view.patches(1)
        activation = activation_of(view.codes[1], view.chosen)[patches]
        inked = view.ink(1) > 0
        row = view.sae.W_dec[view.chosen].detach()
        found |= {
            f"{here}: rate on patches with ink": float((activation[inked] > 0).float().mean()),
            f"{here}: rate on patches without": float((activation[~inked] > 0).float().mean()),
            f"{here}: rank correlation with ink": rank_correlation(activation, view.ink(1)),
            f"{here}: aligned with channel 0": float(row[0].abs() / row.norm()),
        }
        found |= {f"{here}: {name}": value for name, value in moved_at(view).items()}
    return found


def at_other_levels(views: Sequence[View]) -> dict[str, float]:
    """Overlap of the ten features that move the score most, with the score shifted by -1 and 1 in all layers."""
    found: dict[str, float] = {}
    images = views[0].halves[1].images
    for amount in SHIFTS:
        with deciding(views[0].target, [Shift(amount)]):
            found[f"score {amount:+g}: multiplications"] = float(views[0].target.trace(images).mac_ratio.mean())
            for view in views:
                step = view.target.step(view.step)
                vectors = live_only(harvest(view.target, images, view.step)).vectors
                there = strongest(attribute_decisions(view.sae, vectors, step), count=TOP)
                usual = strongest(attribute_decisions(view.sae, view.batches[1].vectors, step), count=TOP)
                found[f"score {amount:+g}, layer {view.step}: of {TOP} the same"] = overlap(there, usual)
    return found


def long_images(views: Sequence[View]) -> dict[str, float]:
    """Rank correlation with an image's mean depth: the best feature's mean activation, ink, the digit it shows.

    Within digits both have the mean of their digit taken off.
    """
    depths = [half.trace.depth[:, 1:].float().mean(1) for half in views[0].halves]
    labels = [half.labels for half in views[0].halves]
    inks = [half.ink.mean(1) for half in views[0].halves]
    found = {
        "ink alone": rank_correlation(inks[1], depths[1]),
        "digit alone": rank_correlation(rate_by(labels[0], depths[0], labels[1]), depths[1]),
    }
    for view in views:
        means = [_per_image(view, half) for half in (0, 1)]
        chosen = torch.tensor([rank_correlation(column, depths[0]) for column in means[0].T]).nan_to_num(0)
        feature = int(chosen.abs().argmax())
        column = means[1][:, feature]
        within = [values - rate_by(labels[1], values, labels[1]) for values in (column, depths[1])]
        found |= {
            f"layer {view.step}: best feature": rank_correlation(column, depths[1]),
            f"layer {view.step}: the same within digits": rank_correlation(*within),
            f"layer {view.step}: the same with ink": rank_correlation(column, inks[1]),
        }
    return found


def class_token(views: Sequence[View]) -> dict[str, float]:
    """What the class token would say by itself where it halts, a layer before, and after the first block."""
    trace, labels = views[0].halves[1].trace, views[0].halves[1].labels
    logits, answers = trace.more["class_logits"], trace.more["logits"].argmax(1)
    where = trace.depth[:, 0] - 1
    rows = torch.arange(len(trace))
    found = {"depth": float(trace.depth[:, 0].float().mean()), "accuracy": accuracy(trace.more["logits"], labels)}
    for name, layer in {
        "where it halts": where,
        "a layer before": (where - 1).clamp(min=0),
        "first layer": where * 0,
    }.items():
        found[f"{name}: accuracy"] = accuracy(logits[rows, layer], labels)
        found[f"{name}: says the final answer"] = float((logits[rows, layer].argmax(1) == answers).float().mean())
    return found


def _place(view: View, half: int) -> Int[Tensor, " patches"]:
    return view.batches[half].position[view.patches(half)]


def _binned(ink: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    return (ink.clamp(0, 1) * INK_BINS).ceil().long()


def _per_image(view: View, half: int) -> Float[Tensor, "n features"]:
    """Mean activation of each feature over the live tokens of each image."""
    codes, batch = view.codes[half], view.batches[half]
    n = len(view.halves[half].images)
    sums = torch.zeros(n, codes.n_features)
    sums.index_put_((batch.document[codes.token_of_entry()], codes.features), codes.values, accumulate=True)
    return sums / torch.bincount(batch.document, minlength=n).clamp(min=1)[:, None]
