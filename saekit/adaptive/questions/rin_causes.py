"""What RIN's carried latents do: who knows the picture first, whether a feature says that it is done.

Edits are made where a step is given the last step's latents, with the noisy picture as it is: whatever changes there
came by way of the memory. A picture without noise added is determined by its first noise, so that runs compare.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.adaptive.deciding import DecidingTarget
from saekit.adaptive.questions.rin_runs import (
    SCREENED,
    Dictionary,
    Judging,
    Runs,
    chosen_by,
    estimate,
    given,
    like,
    moments,
    pictures,
    rank_of,
    read_edited,
    rms,
)
from saekit.adaptive.rin import RIN
from saekit.adaptive.telling import best_telling, probe, probe_auc
from saekit.codes import SparseCodes
from saekit.patching.statistics import rank_correlation


def memory(
    target: DecidingTarget, model: RIN, dictionary: Dictionary, runs: Runs, test: Runs, judge: Judging
) -> dict[str, float]:
    """Who knows the final picture first, and what becomes of the next estimate without a feature of the memory."""
    found = race(model, runs, test, judge) | knowing_features(dictionary, runs, test)
    for name, step in moments(runs.steps).items():
        found |= {f"{name}: {what}": value for what, value in forgetting(target, model, test, step).items()}
        found |= {
            f"{name}: {what}": value for what, value in ablating(target, model, dictionary, runs, test, step).items()
        }
    return found


def race(model: RIN, runs: Runs, test: Runs, judge: Judging) -> dict[str, float]:
    """What linear probes can tell of the final picture from what is there behind a step.

    Of the latents (all but the slots of time and class; and the same in as few components as a picture has pixels),
    of the picture that goes on to the next step, and of the clean picture as it is estimated. What is told: the class
    that the judge sees (accuracy), which the label that was asked for gives away from the start; and whether there is
    more ink than usual for the class (area under the curve), which it does not.
    """
    slots, (ink, asked) = model.config.slots - 2, inky(runs, test)
    final, final_test = judge(runs.seen[-1]), judge(test.seen[-1])
    classes = final.unique()
    found = {"class: from the label asked for": float((test.labels == final_test).float().mean())}
    for step in sorted({0, runs.steps // 8, runs.steps // 4, runs.steps // 2, runs.steps * 3 // 4}):
        if step + 1 >= runs.steps:
            continue
        latents = [of.latents[step, :, :slots].flatten(1) for of in (runs, test)]
        sources = {
            "latents": latents,
            "few components of latents": _components(*latents, count=runs.noisy[0, 0].numel()),
            "noisy picture": [of.noisy[step + 1].flatten(1) for of in (runs, test)],
            "estimate": [of.seen[step].flatten(1) for of in (runs, test)],
        }
        sources = {name: _varying(*pair) for name, pair in sources.items()}
        for name, (x, x_test) in sources.items():
            found[f"ink after step {step}: {name}"] = probe_auc(x, ink, x_test, asked)
            if len(classes) > 1:
                said = classes[probe(x, final, x_test).argmax(1)]
                found[f"class after step {step}: {name}"] = float((said == final_test).float().mean())
    return found


def inky(runs: Runs, test: Runs) -> tuple[Tensor, Tensor]:
    """Whether the final picture has more ink than the training pictures of its class have on average."""
    ink, ink_test = (of.seen[-1].flatten(1).mean(1) for of in (runs, test))
    usual = torch.full((int(runs.labels.max().maximum(test.labels.max())) + 1,), float(ink.mean()))
    for label in runs.labels.unique().tolist():
        usual[label] = ink[runs.labels == label].mean()
    return ink > usual[runs.labels], ink_test > usual[test.labels]


def _varying(train: Float[Tensor, "n d"], test: Float[Tensor, "m d"]) -> list[Tensor]:
    """Without what hardly varies in training (corners of a picture), which standardising would blow up."""
    spread = train.std(0)
    return [x[:, spread > 0.01 * spread.max()] for x in (train, test)]


def _components(train: Float[Tensor, "n d"], test: Float[Tensor, "m d"], *, count: int) -> list[Tensor]:
    mean = train.mean(0)
    axes = torch.linalg.svd(train - mean, full_matrices=False)[2][:count]
    return [(x - mean) @ axes.T for x in (train, test)]


def knowing_features(dictionary: Dictionary, runs: Runs, test: Runs) -> dict[str, float]:
    """The feature (its activation summed over slots) that tells best whether there will be more ink than usual."""
    ink, asked = inky(runs, test)
    found = {}
    for name, step in moments(runs.steps).items():
        pair = []
        for of in (runs, test):
            n, slots, _ = of.latents[step].shape
            dense = dictionary.encode(of.latents[step]).to_dense().view(n, slots, -1).sum(1)
            pair.append(SparseCodes.from_dense(dense))
        found[f"{name}: best feature on ink"] = best_telling((pair[0], ink), (pair[1], asked)).auc
    return found


def same_class(labels: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """For each picture the next one of its class."""
    donors = torch.arange(len(labels))
    for label in labels.unique().tolist():
        own = (labels == label).nonzero()[:, 0]
        donors[own] = own.roll(-1)
    return donors


def forgetting(target: DecidingTarget, model: RIN, test: Runs, step: int) -> dict[str, float]:
    """How far a step's estimate moves (root mean square, greys from -1 to 1) if its latents are not its own."""
    clean, latents = test.seen[step], test.latents[step - 1]
    others = {
        "none": torch.zeros_like(latents),
        "of another picture of the class": latents[same_class(test.labels)],
        # every round of classes shares its noise
        "of another class, same noise": latents.unflatten(0, (-1, model.config.classes)).roll(1, 1).flatten(0, 1),
        "of the step before": test.latents[max(0, step - 2)],
    }
    moved = {f"latents {name}": estimate(target, model, test, step, z) - clean for name, z in others.items()}
    return {name: rms(change) for name, change in moved.items()} | {
        "what is still to change": rms(test.seen[-1] - clean)
    }


def ablating(
    target: DecidingTarget, model: RIN, dictionary: Dictionary, runs: Runs, test: Runs, step: int
) -> dict[str, float]:
    """The feature of the carried latents whose ablation moves the next estimate most, and features like it.

    Chosen on training pictures, measured on others.
    """
    some = pictures(runs, slice(SCREENED))
    codes = dictionary.encode(runs.latents[step - 1])

    def effect(of: Runs, feature: int, dose: float = 0.0) -> float:
        edited = dictionary.scaling(feature, dose)(of.latents[step - 1])
        return rms(estimate(target, model, of, step, edited) - of.seen[step])

    chosen = chosen_by(codes, lambda feature: effect(some, feature))
    matched = like(codes, chosen)
    found = rank_of(effect(test, chosen), [effect(test, other) for other in matched])
    found = {f"ablated {what}": value for what, value in found.items()}
    return found | {f"feature at dose {dose:g}": effect(test, chosen, dose) for dose in (0.5, 1.0, 2.0)}


def solved(
    target: DecidingTarget, model: RIN, dictionary: Dictionary, runs: Runs, test: Runs, inputs: Int[Tensor, " m"]
) -> dict[str, float]:
    """Features of the carried latents that go with little still to do, in the last third of the steps.

    Of each slot: the entropy of where it reads, and how far computing moves it. All rank correlations "within" are
    among pictures at the same step and slot, where the step number has nothing to say; the step alone stands beside.
    """
    late = range(max(1, runs.steps * 2 // 3), runs.steps)
    found, chosen = {}, {}
    scores, asked = (late_codes(dictionary, of, late) for of in (runs, test))
    measures, measures_test = (late_measures(of, late) for of in (runs, test))
    pooled = asked.flatten(0, 2)
    fired = (scores > 0).flatten(0, 2).sum(0)
    step = torch.tensor(list(late))[:, None, None].expand(asked.shape[:3]).flatten()
    codes = SparseCodes.from_dense(scores.flatten(0, 2))
    for what in ("entropy", "update"):
        by_train = within(scores, measures[what]).masked_fill(fired < len(scores[0]), torch.inf)
        best = chosen[what] = int(by_train.argmin())
        by_test = {name: within(asked, value) for name, value in measures_test.items()}
        others = [float(by_test[what][other]) for other in like(codes, best)]
        found |= {f"{what}: {name}": value for name, value in rank_of(float(by_test[what][best]), others).items()}
        found[f"{what}: feature, chosen on training pictures"] = float(by_train[best])
        found[f"{what}: feature with what is still to change"] = float(by_test["unsolved"][best])
        flat = measures_test[what].flatten()
        found[f"{what}: feature, steps not held"] = rank_correlation(pooled[:, best], flat)
        found[f"{what}: step alone"] = rank_correlation(step, flat)
        usual = measures[what].mean(1, keepdim=True).expand_as(measures_test[what]).flatten()
        found[f"{what}: slot and step alone"] = rank_correlation(usual, flat)
        found[f"{what}: with what is still to change"] = float(
            within(measures_test["unsolved"][..., None], measures_test[what])[0]
        )
    for what, feature in chosen.items():
        active = asked[..., feature] > 0
        found |= {
            f"{what}: {name}": value
            for name, value in _without(
                target, model, dictionary, inputs, late, what, (feature, *like(codes, feature)[:8]), active
            ).items()
        }
    return found


def _without(
    target: DecidingTarget,
    model: RIN,
    dictionary: Dictionary,
    inputs: Int[Tensor, " m"],
    late: range,
    what: str,
    features: tuple[int, ...],
    active: Tensor,
) -> dict[str, float]:
    """The change of a measure, as a share of it, without a feature at all late steps; where the first is active."""

    def measured(feature: int, dose: float) -> Tensor:
        edits = dict.fromkeys(map(given, late), dictionary.scaling(feature, dose))
        edited = read_edited(target, model, inputs, edits)
        return late_measures(edited, late)[what]

    clean = measured(features[0], 1.0)
    where = active if bool(active.any()) else torch.ones_like(active)
    change = [float((measured(one, 0.0)[where].mean() / clean[where].mean()) - 1) for one in features]
    found = {f"ablated {name}": value for name, value in rank_of(change[0], change[1:]).items()}
    twice = measured(features[0], 2.0)
    return found | {"feature at dose 2": float(twice[where].mean() / clean[where].mean()) - 1}


def late_codes(dictionary: Dictionary, runs: Runs, late: range) -> Float[Tensor, "late n slots n_features"]:
    """Activations in the latents that each late step is given."""
    latents = runs.latents[late.start - 1 : late.stop - 1]
    return dictionary.encode(latents).to_dense().view(*latents.shape[:3], -1)


def late_measures(runs: Runs, late: range) -> dict[str, Float[Tensor, "late n slots"]]:
    """What each late step does: entropy (nats) of reading, length of the update; and what is still to change."""
    part = slice(late.start, late.stop)
    pattern = runs.pattern[part].clamp(min=1e-12)
    update = (runs.latents[part] - runs.after_reading[part]).norm(dim=-1)
    left = (runs.seen[-1] - runs.seen[late.start - 1 : late.stop - 1]).flatten(2).norm(dim=-1)
    return {
        "entropy": -(pattern * pattern.log()).sum(-1).mean(2),
        "update": update,
        "unsolved": left[..., None].expand_as(update),
    }


def within(
    scores: Float[Tensor, "steps n slots n_features"], value: Float[Tensor, "steps n slots"]
) -> Float[Tensor, " n_features"]:
    """Rank correlation of each feature with `value` among pictures at the same step and slot; 0 where one is constant.

    Ranks are taken, and their means removed, within each step and slot, and are then pooled.
    """
    one, two = _ranks(scores.transpose(1, 3)), _ranks(value.transpose(1, 2)[:, None].contiguous())
    together = (one * two).sum((0, 2, 3))
    return together / (one.square().sum((0, 2, 3)) * two.square().sum()).sqrt().clamp(min=1e-12)


def _ranks(x: Float[Tensor, "*groups n"]) -> Float[Tensor, "*groups n"]:
    x = x.contiguous()
    ordered = x.sort(-1).values
    ranks = (torch.searchsorted(ordered, x) + torch.searchsorted(ordered, x, right=True)).float()
    return ranks - ranks.mean(-1, keepdim=True)
