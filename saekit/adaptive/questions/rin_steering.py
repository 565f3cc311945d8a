"""Steering RIN by the latents that it carries from step to step, and how soon the picture has overwritten it."""

import torch
from jaxtyping import Int
from torch import Tensor

from saekit.adaptive.deciding import DecidingTarget
from saekit.adaptive.questions.rin_runs import (
    CONTROLS,
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
)
from saekit.adaptive.rin import RIN
from saekit.adaptive.telling import activation_sums
from saekit.codes import SparseCodes
from saekit.targets import Site
from saekit.targets.target import Edit

DOSES = (0.5, 1.0, 2.0, 32.0)
SHORT = ("class changed", "ink moved", "ink moved in the next estimate")


def steering(
    target: DecidingTarget,
    model: RIN,
    dictionary: Dictionary,
    runs: Runs,
    test: Runs,
    inputs: Int[Tensor, " m"],
    judge: Judging,
    *,
    seed: int,
) -> dict[str, float]:
    """A decoder direction more in the carried latents of one step, in the slot where its feature fires most.

    Doses are in units of the feature's mean strength where it is active. The feature is the one that moves the ink of
    the next estimate most on training pictures; beside it stand features like it and random directions, and what the
    latents, or the label, of another class would do.
    """
    generator, found, some = torch.Generator().manual_seed(seed), {}, pictures(runs, slice(SCREENED))
    for name, step in moments(runs.steps).items():
        codes = dictionary.encode(runs.latents[step - 1])

        def ink(of: Runs, edit: Edit, step: int = step) -> float:
            return float((estimate(target, model, of, step, edit(of.latents[step - 1])) - of.seen[step]).mean())

        def push(feature: int, dose: float, along: Tensor | None = None, codes: SparseCodes = codes) -> Edit:
            return pushing(dictionary, codes, feature, dose, along)

        chosen = chosen_by(codes, lambda feature: abs(ink(some, push(feature, 2.0))))
        random = torch.randn(CONTROLS, model.config.latent, generator=generator)
        controls = {
            "matched": [ink(test, push(other, 2.0)) for other in like(codes, chosen)],
            "random": [ink(test, push(chosen, 2.0, direction)) for direction in random],
        }
        for control, others in controls.items():
            ranked = rank_of(ink(test, push(chosen, 2.0)), others)
            found[f"{name}, dose 2: p among {control}"] = ranked["p"]
            found[f"{name}, {control}, dose 2: strongest on ink of the next estimate"] = ranked["strongest of matched"]
        after = range(step, runs.steps)
        cases = {
            **{f"dose {dose:g}": {given(step): push(chosen, dose)} for dose in DOSES},
            f"dose {DOSES[-1]:g} at every later step": dict.fromkeys(map(given, after), push(chosen, DOSES[-1])),
            "latents of another class": {
                given(step): lambda latents, step=step: test.latents[step - 1].roll(1, 0),
            },
            "label of another class": {
                Site.parse(f"model.label:out@{one}"): lambda label: label.roll(1, 0) for one in after
            },
        }
        for case, edits in cases.items():
            effects = compared(test, read_edited(target, model, inputs, edits), judge, step)
            kept = SHORT if case in ("dose 0.5", "dose 1") else effects
            found |= {f"{name}, {case}: {what}": effects[what] for what in kept}
    never = {given(step): torch.zeros_like for step in range(1, runs.steps)}
    effects = compared(test, read_edited(target, model, inputs, never), judge, 1)
    return found | {f"no latents at any step: {what}": value for what, value in effects.items()}


def pushing(
    dictionary: Dictionary, codes: SparseCodes, feature: int, dose: float, direction: Tensor | None = None
) -> Edit:
    """`dose` times a feature's mean strength along its decoder row (or a direction, brought to its length).

    Args:
        codes: by which strength and slot are told, slots fastest.
    """
    codes = codes.active()
    own = codes.features == feature
    row = dictionary.sae.W_dec[feature].detach()
    if direction is not None:
        row = direction / direction.norm() * row.norm()
    slots = len(dictionary.centre)
    slot = int(torch.bincount(codes.token_of_entry()[own] % slots, minlength=slots).argmax())
    push = torch.zeros_like(dictionary.centre)
    push[slot] = dose * activation_sums(codes)[feature] / max(1, int(own.sum())) * row

    return lambda latents: latents + push


def compared(clean: Runs, edited: Runs, judge: Judging, step: int) -> dict[str, float]:
    """Two runs that differ from `step` on: the final pictures, and how far apart they are step by step.

    Distances of latents are shares of how far two different pictures' latents are apart at the same step.
    Where half of the first distance is never lost, the number of steps is that of all that were left.
    """
    apart, usual = (
        (clean.latents - other).flatten(2).norm(dim=-1).mean(1) for other in (edited.latents, clean.latents.roll(1, 1))
    )
    by_step = apart[step:] / usual[step:]
    estimates = (clean.seen - edited.seen).square().flatten(1).mean(1).sqrt()
    classes = [[judge(of.seen[at]) for of in (clean, edited)] for at in (step, -1)]
    changed = [float((one != two).float().mean()) for one, two in classes]
    over = (by_step < by_step[0] / 2).nonzero()[:, 0]
    return {
        "class changed": changed[1],
        "class changed in the next estimate": changed[0],
        "ink moved": float((edited.seen[-1] - clean.seen[-1]).mean()),
        "ink moved in the next estimate": float((edited.seen[step] - clean.seen[step]).mean()),
        "next estimate moved": float(estimates[step]),
        "final picture moved": float(estimates[-1]),
        "latents apart behind the step": float(by_step[0]),
        "latents apart at the end": float(by_step[-1]),
        "steps until half of it is left": float(over[0]) if len(over) else float(len(by_step)),
    }
