"""AdaTape: whether a feature of the tape counts ones where they begin, and what it does to the answer."""

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.adaptive.deciding import DecidingTarget
from saekit.adaptive.effects import rank_p
from saekit.adaptive.questions.adatape_queries import DOSES
from saekit.adaptive.questions.adatape_reading import (
    TAPE,
    Reading,
    Screen,
    instead,
    largest,
    like_it,
    mean_of,
    share,
)
from saekit.adaptive.telling import activation_of, auc, best_telling, probe_auc, rate_by
from saekit.errors import DataError
from saekit.patching import Add, Intervention, ReplaceFrom, Scale, intervening
from saekit.patching.operation import Operation
from saekit.patching.statistics import with_random_decoder
from saekit.sae import SAE


def boundary(target: DecidingTarget, sae: SAE, train: Reading, test: Reading, screen: Screen) -> dict[str, float]:
    """Is there a feature that fires where ones begin, one that counts them there, and does the answer hang on it?

    `where_*` tell the boundary slot from other fresh ones, `odd_*` the answer from the boundary slot, each from the
    best feature, a probe on the tape token, a probe on the weights of what was read, and the slot's number alone.

    Raises:
        DataError: no sequence in which a step reads ones among others, or none with two answers there.
    """
    halves = train, test
    found: dict[str, float] = {"sequences_with_boundary": share(test.boundary.any(1))}
    found["parity_from_all_weights"] = _parity_from_weights(train, test)
    asked: dict[str, tuple[Callable[[Reading], Tensor], Callable[[Reading], Tensor]]] = {
        "where": (lambda half: half.fresh, lambda half: half.boundary),
        "odd": (lambda half: half.boundary, lambda half: (half.labels == 1)[:, None].expand(half.live.shape)),
    }
    for name, (of, truth) in asked.items():
        places, positive = [of(half) for half in halves], [truth(half)[of(half)] for half in halves]
        if len(positive[0].unique()) < 2:
            raise DataError("no boundary to tell: no step reads ones among others here; give more, longer sequences")
        codes = [sae.encode(half.tape[place]) for half, place in zip(halves, places, strict=True)]
        weights = [half.trace.more["weights"][place] for half, place in zip(halves, places, strict=True)]
        told = best_telling((codes[0], positive[0]), (codes[1], positive[1]))
        found[f"{name}_feature"] = float(told.feature)
        found[f"{name}_feature_auc"] = told.auc
        found[f"{name}_token_probe_auc"] = probe_auc(
            train.tape[places[0]], positive[0], test.tape[places[1]], positive[1]
        )
        found[f"{name}_weight_probe_auc"] = probe_auc(weights[0], positive[0], weights[1], positive[1])
        slots = [half.slots[place] for half, place in zip(halves, places, strict=True)]
        found[f"{name}_slot_auc"] = auc(rate_by(slots[0], positive[0], slots[1]), positive[1])
    firing = activation_of(sae.encode(test.tape[test.fresh]), int(found["where_feature"])) > 0
    found |= {
        "where_feature_fires": share(firing[test.boundary[test.fresh]]),
        "where_feature_fires_elsewhere": share(firing[~test.boundary[test.fresh]]),
    }
    carrier = _carrier(target, sae, train, screen)
    donated, meant = _donated(train, test)
    for role, feature in (
        ("strongest", _strongest(target, sae, train, screen)),
        ("counter", int(found["odd_feature"])),
    ):
        effects = _ablated(target, sae, feature, train, test, screen)
        effects |= _added(target, sae, feature, train, test, screen)
        found |= {f"{role}_{name}": value for name, value in effects.items()}
    for role, feature in (("carrier", carrier), ("counter", int(found["odd_feature"]))):
        others = like_it(sae.encode(train.tape[train.live]), feature, screen)
        effects = _exchanged(target, sae, feature, others, test, donated, meant)
        found |= {f"{role}_{name}": value for name, value in effects.items()}
    for name, tape in donated.items():
        with target.target.editing({TAPE: instead(tape)}):
            answers = target.trace(test.inputs).more["logits"].argmax(1)
        found[f"flipped_by_{name}"] = share((answers != test.answers)[meant])
    return found


def _parity_from_weights(train: Reading, test: Reading) -> float:
    """A linear probe on the weights of all fresh steps together."""
    first = int(min(train.fresh.sum(1).min(), test.fresh.sum(1).min()))
    seen = [half.trace.more["weights"][:, :first].flatten(1) for half in (train, test)]
    return probe_auc(seen[0], train.labels == 1, seen[1], test.labels == 1)


def _answers(target: DecidingTarget, inputs: Tensor, edits: Sequence[Intervention], sae: SAE) -> Int[Tensor, " n"]:
    with intervening(target.target, edits, {TAPE: sae}):
        return target.trace(inputs).more["logits"].argmax(1)


def _scaled(feature: int, dose: float) -> Intervention:
    return Intervention(site=TAPE, operation=cast(Operation, Scale(dose)), features=(feature,), may_idle=True)


def _strongest(target: DecidingTarget, sae: SAE, train: Reading, screen: Screen) -> int:
    """Whose ablation changes most answers, among those that write most."""
    inputs, clean = train.inputs[: screen.inputs], train.answers[: screen.inputs]
    tried = largest(sae.encode(train.tape[train.live]), sae, screen)
    return max(tried, key=lambda one: share(_answers(target, inputs, [_scaled(one, 0.0)], sae) != clean))


def _ablated(
    target: DecidingTarget, sae: SAE, feature: int, train: Reading, test: Reading, screen: Screen
) -> dict[str, float]:
    """Answers changed by dose; beside features like it, and beside the same firing that writes in random directions."""

    def flipped(one: int, dose: float = 0.0, of: SAE = sae) -> float:
        return share(_answers(target, test.inputs, [_scaled(one, dose)], of) != test.answers)

    codes = sae.encode(train.tape[train.live])
    found = {f"flipped_at_{dose:g}": flipped(feature, dose) for dose in DOSES}
    others = [flipped(one) for one in like_it(codes, feature, screen)]
    drawn = [flipped(feature, of=with_random_decoder(sae, seed=seed)) for seed in range(screen.directions)]
    return found | {
        "odd_answers_when_ablated": float(_answers(target, test.inputs, [_scaled(feature, 0.0)], sae).float().mean()),
        "rate": float(codes.feature_counts()[feature]) / codes.n_tokens,
        "controls": float(len(others)),
        "flipped_by_others": mean_of(others),
        "flipped_by_others_most": max(others, default=0.0),
        "flipped_p": rank_p(found["flipped_at_0"], others),
        "flipped_by_random_directions": mean_of(drawn),
        "flipped_by_random_directions_most": max(drawn),
    }


def _added(
    target: DecidingTarget, sae: SAE, feature: int, train: Reading, test: Reading, screen: Screen
) -> dict[str, float]:
    """Add the feature at the boundary slot of sequences that lack it there and whose answer is the other.

    What a feature stands for is the parity that is more common where it fires at a training boundary. The dose is in
    units of its mean strength there; others are added as strongly. `restored` is of answers that ablation changed.
    """
    on_train = activation_of(sae.encode(train.tape[train.boundary]), feature)
    active = on_train > 0
    if not bool(active.any()):  # tells by its absence, or never fires there: nothing says how much to add
        return {"added_to": 0.0}
    parities = train.labels[:, None].expand(train.live.shape)[train.boundary]
    stands_for, strength = int(parities[active].float().mean() > 0.5), float(on_train[active].mean())
    here = torch.zeros(test.live.shape, dtype=torch.bool)
    here[test.boundary] = activation_of(sae.encode(test.tape[test.boundary]), feature) > 0
    lacks = test.boundary & ~here & (test.answers != stands_for)[:, None]

    def flipped(one: int, dose: float) -> float:
        if not bool(lacks.any()):
            return 0.0
        edited = _answers(target, test.inputs, _adds(one, dose * strength, lacks), sae)
        return share((edited != test.answers)[lacks.any(1)])

    found = {"added_to": share(lacks.any(1)), "stands_for_odd": float(stands_for)}
    found |= {f"flipped_by_adding_{dose:g}": flipped(feature, dose) for dose in DOSES if dose}
    others = [flipped(one, 1.0) for one in like_it(sae.encode(train.tape[train.live]), feature, screen)]
    ablated = _answers(target, test.inputs, [_scaled(feature, 0.0)], sae)
    lost = (ablated != test.answers)[:, None] & here
    back = [_scaled(feature, 0.0), *_adds(sae.W_dec[feature], strength * float(sae.W_dec[feature].norm()), lost)]
    restored = _answers(target, test.inputs, back, sae) == test.answers if bool(lost.any()) else lost.any(1)
    return found | {
        "flipped_by_adding_others": mean_of(others),
        "flipped_by_adding_others_most": max(others, default=0.0),
        "flipped_by_adding_p": rank_p(found["flipped_by_adding_1"], others),
        "restored": share(restored[lost.any(1)]),
    }


def _adds(what: int | Tensor, amount: float, where: Bool[Tensor, "n steps"]) -> list[Intervention]:
    """A feature, or a direction, so much stronger in some slots of some sequences."""
    return [
        Intervention(
            site=TAPE,
            operation=cast(Operation, Add(amount)),
            features=(what,) if isinstance(what, int) else None,
            direction=None if isinstance(what, int) else what,
            positions=(slot,),
            rows=tuple(where[:, slot].nonzero()[:, 0].tolist()),
        )
        for slot in range(where.shape[1])
        if bool(where[:, slot].any())
    ]


def _donated(train: Reading, test: Reading) -> tuple[dict[str, Float[Tensor, "n steps width"]], Bool[Tensor, " n"]]:
    """Tapes whose boundary slot has another token, and which sequences are meant: the most that a feature could do.

    The token is that of a test sequence with the other parity, or with the same, whose boundary is in the same slot;
    or its own, moved along the difference of means of the two parities in that slot of the training half.
    """
    moved = {name: test.tape.clone() for name in ("other_parity", "same_parity", "mean_difference")}
    asked = torch.zeros(len(test.inputs), dtype=torch.bool)
    for slot in range(test.first_pass):
        rows = [(test.boundary[:, slot] & (test.labels == label)).nonzero()[:, 0] for label in (0, 1)]
        means = [train.tape[:, slot][train.boundary[:, slot] & (train.labels == label)] for label in (0, 1)]
        if min(map(len, [*rows, *means])) < 2:
            continue
        for label, (own, other) in enumerate((rows, rows[::-1])):
            moved["other_parity"][own, slot] = test.tape[other[torch.arange(len(own)) % len(other)], slot]
            moved["same_parity"][own, slot] = test.tape[own.roll(1), slot]
            moved["mean_difference"][own, slot] += means[1 - label].mean(0) - means[label].mean(0)
            asked[own] = True
    return moved, asked


def _exchanged(
    target: DecidingTarget,
    sae: SAE,
    feature: int,
    others: Sequence[int],
    test: Reading,
    donated: Mapping[str, Tensor],
    meant: Bool[Tensor, " n"],
) -> dict[str, float]:
    """The strength of one feature alone as it is in a donor's boundary slot; beside that of others."""
    of_others = [_given(target, sae, one, test, donated["other_parity"], meant) for one in others]
    reached = _given(target, sae, feature, test, donated["other_parity"], meant)
    return {
        "feature": float(feature),
        "flipped_by_exchange": reached,
        "flipped_by_exchange_same_parity": _given(target, sae, feature, test, donated["same_parity"], meant),
        "flipped_by_exchange_of_others": mean_of(of_others),
        "flipped_by_exchange_of_others_most": max(of_others, default=0.0),
        "flipped_by_exchange_p": rank_p(reached, of_others),
    }


def _given(
    target: DecidingTarget, sae: SAE, feature: int, reading: Reading, donor: Tensor, meant: Bool[Tensor, " n"]
) -> float:
    operation = cast(Operation, ReplaceFrom(donor))
    edit = Intervention(site=TAPE, operation=operation, features=(feature,), may_idle=True)
    return share((_answers(target, reading.inputs, [edit], sae) != reading.answers)[meant])


def _carrier(target: DecidingTarget, sae: SAE, train: Reading, screen: Screen) -> int:
    """Whose exchange changes most answers, where donors are of the other parity."""
    few = train.part(screen.inputs)
    donated, meant = _donated(train, few)
    tried = largest(sae.encode(train.tape[train.live]), sae, screen)
    return max(tried, key=lambda one: _given(target, sae, one, few, donated["other_parity"], meant))
