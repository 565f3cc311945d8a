"""RIN's questions about dictionaries: slots or content, early or late, read or computed, this model or another.

Those about causes are in `rin_causes` and `rin_steering`. Features are learnt and chosen on some pictures and measured
on others: the steps of one picture are much alike, so that pictures are divided, never vectors.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.adaptive.deciding import DecidingTarget
from saekit.adaptive.digits import load_digits
from saekit.adaptive.questions.answers import Answers, answered
from saekit.adaptive.questions.paired import Paired
from saekit.adaptive.questions.rin_causes import memory, solved
from saekit.adaptive.questions.rin_runs import (
    N_FEATURES,
    Dictionary,
    Judging,
    K,
    Places,
    Runs,
    learn,
    quality,
    read_runs,
)
from saekit.adaptive.questions.rin_steering import steering
from saekit.adaptive.rin import RIN
from saekit.adaptive.rin_report import Judge
from saekit.adaptive.rin_target import rin_target
from saekit.adaptive.telling import purity
from saekit.crosscoder import Crosscoder
from saekit.errors import ShapeError
from saekit.losses import fvu
from saekit.patching.statistics import rank_correlation
from saekit.selection import TopK
from saekit.targets import Site
from saekit.training.config import TrainConfig
from saekit.training.crosscoder import train_crosscoder

FEWEST_FIRINGS = 20
PURE = 0.9
_BEFORE, _AFTER = Site.parse("model.z_read"), Site.parse("model.z_final")


def ask(
    target: DecidingTarget,
    model: RIN,
    train_inputs: Int[Tensor, " n"],
    test_inputs: Int[Tensor, " m"],
    *,
    tokens: int = 200_000,
    seed: int = 0,
    judge: Judging | None = None,
    other: RIN | None = None,
) -> Answers:
    """All questions.

    Args:
        target: of `model`, as `rin_target` makes it.
        train_inputs, test_inputs: numbers of pictures, each after the other. Those of one round of classes share their
            noise, so that a round must not be divided; ten pictures are one noise, and conclusions need many rounds.
        tokens: that each dictionary is trained on.
        seed: of dictionaries and controls.
        judge: pictures `(n, channels, height, width)` in, their classes out; None trains the report's on the digits.
        other: another RIN whose pictures have the same number of steps; without it nothing is said of transfer.
    """
    runs, test = (read_runs(target, model, inputs) for inputs in (train_inputs, test_inputs))
    judge = judge or Judge(load_digits()).says
    content = slice(0, model.config.slots - 2)
    learnt = {
        "raw": (_of_latents, learn(runs.latents, "model.z_final", tokens=tokens, seed=seed, centred=False)),
        "centred": (_of_latents, learn(runs.latents, "model.z_final", tokens=tokens, seed=seed)),
        "content slots": (
            lambda of: of.latents[:, :, content],
            learn(runs.latents[:, :, content], "model.z_final", tokens=tokens, seed=seed),
        ),
        "after reading": (_of_reading, learn(runs.after_reading, "model.z_read", tokens=tokens, seed=seed)),
    }
    main = learnt["centred"][1]
    questions = {
        "slots or content": lambda: (
            {
                f"{name}: {what}": value
                for name, (part, dictionary) in learnt.items()
                for what, value in slots(dictionary, part(runs), part(test), test.labels, seed=seed).items()
            }
            | _shares_of_variance(test.latents)
        ),
        "one dictionary across noise levels": lambda: {
            f"{name}: {what}": value
            for name in ("centred", "content slots")
            for what, value in noise_levels(learnt[name][1], learnt[name][0](test), test.labels, seed=seed).items()
        },
        "memory": lambda: memory(target, model, main, runs, test, judge),
        "read against write": lambda: read_and_write(runs, test, tokens=tokens, seed=seed),
        "already solved": lambda: solved(target, model, main, runs, test, test_inputs),
        "steering": lambda: steering(target, model, main, runs, test, test_inputs, judge, seed=seed),
    }
    if other is not None:
        theirs = rin_target(other, target.target.model.sampling)  # pyright: ignore[reportArgumentType]
        others = [read_runs(theirs, other, inputs) for inputs in (train_inputs, test_inputs)]
        pair = others[0], others[1]
        questions["transfer"] = lambda: transfer(main, (runs, test), pair, tokens=tokens, seed=seed)
    return answered(questions)


def _of_latents(runs: Runs) -> Tensor:
    return runs.latents


def _of_reading(runs: Runs) -> Tensor:
    return runs.after_reading


def slots(
    dictionary: Dictionary,
    train: Float[Tensor, "steps m places width"],
    vectors: Places,
    labels: Int[Tensor, " n"],
    *,
    seed: int,
) -> dict[str, float]:
    """How pure features are in slots and in classes, beside the same where slots, or labels of pictures, are shuffled.

    Slots are permuted within each step of each picture, which keeps how often each occurs.
    """
    steps, n, places, _ = vectors.shape
    generator, codes = torch.Generator().manual_seed(seed), dictionary.encode(vectors)
    keys = {
        "slot": torch.arange(places).expand(steps, n, places),
        "slot, shuffled": torch.rand(steps, n, places, generator=generator).argsort(-1),
        "class": labels[None, :, None].expand(steps, n, places),
        "class, shuffled": labels[torch.randperm(n, generator=generator)][None, :, None].expand(steps, n, places),
    }
    found = quality(dictionary, train, vectors)
    for what, key in keys.items():
        pure = purity(codes, key.flatten(), fewest=FEWEST_FIRINGS)
        pure = pure[~pure.isnan()]
        found[f"purity by {what}"] = float(pure.mean())
        found[f"{PURE:.0%} pure by {what}"] = float((pure >= PURE).float().mean())
    return found


def _shares_of_variance(latents: Places) -> dict[str, float]:
    total = (latents - latents.mean((0, 1, 2))).square().sum()
    by_slot, by_slot_and_step = (latents - latents.mean(over, keepdim=True) for over in ((0, 1), (1,)))
    return {
        "variance that the slot explains": 1 - float(by_slot.square().sum() / total),
        "variance that slot and step explain": 1 - float(by_slot_and_step.square().sum() / total),
    }


def noise_levels(dictionary: Dictionary, vectors: Places, labels: Int[Tensor, " n"], *, seed: int) -> dict[str, float]:
    """Features by when they fire: in the first third of the steps (noisy) or in the last, and shuffled.

    "Only" is for 95% of their firings, "mostly" for half. Steps are shuffled among the vectors of a picture's slot.
    """
    steps, n, places, _ = vectors.shape
    codes = dictionary.encode(vectors)
    generator = torch.Generator().manual_seed(seed)
    when = {
        "": torch.arange(steps)[:, None, None].expand(steps, n, places),
        ", shuffled": torch.rand(steps, n, places, generator=generator).argsort(0),
    }
    codes = codes.active()
    token, fired, third = codes.token_of_entry(), codes.feature_counts(), max(1, steps // 3)
    found = {
        f"fvu, {name} third": quality(dictionary, vectors[part], vectors[part])["fvu"]
        for name, part in (("first", slice(third)), ("last", slice(steps - third, None)))
    }
    alive = fired >= FEWEST_FIRINGS
    for what, step in when.items():
        rate = torch.zeros(codes.n_features, steps)
        rate.index_put_((codes.features, step.flatten()[token]), torch.ones(len(token)), accumulate=True)
        rate = (rate / rate.sum(1, keepdim=True))[alive]
        first, last = (part.sum(1) for part in (rate[:, :third], rate[:, -third:]))
        for word, least in (("only", 0.95), ("mostly", 0.5)):
            found[f"{word} early{what}"] = float((first >= least).float().mean())
            found[f"{word} late{what}"] = float((last >= least).float().mean())
        found[f"at every step{what}"] = float((rate > 0.5 / steps).all(1).float().mean())
        mean_step = rate @ torch.arange(steps).float()
        of_class = purity(codes, labels[None, :, None].expand(steps, n, places).flatten(), fewest=FEWEST_FIRINGS)
        found[f"mean step with class purity{what}"] = rank_correlation(mean_step, of_class[alive])
    return found


def read_and_write(runs: Runs, test: Runs, *, tokens: int, seed: int) -> dict[str, float]:
    """A crosscoder of the latents before and after computing, and dictionaries of what is read and what is written.

    Control: pairs of a slot's latents in any two pictures at any two steps, which share nothing but the slot.
    """
    own, asked = (_pair(of, runs) for of in (runs, test))
    before, after = (asked.vectors[site] for site in (_BEFORE, _AFTER))
    by_map = torch.linalg.lstsq(own.vectors[_BEFORE], own.vectors[_AFTER]).solution
    found = {
        "fvu after, of a linear map from before": float(fvu(after, before @ by_map)),
        "length of the update, as a share": float((after - before).norm() / after.norm()),
    }
    for name, apart in (("", False), (", unrelated", True)):
        config = TrainConfig(
            site=_AFTER, rule=TopK(K), n_features=N_FEATURES, tokens=tokens, seed=seed, encoder_start="unit"
        )
        cross = train_crosscoder(config, _pair(runs, runs, apart=apart), [_BEFORE, _AFTER])
        found |= {f"{what}{name}": value for what, value in sides(cross, _pair(test, runs, apart=apart)).items()}
    for name, site, part in (
        ("what is read", "model.read", lambda of: of.loaded),
        ("what is written", "model.write", lambda of: of.written),
    ):
        dictionary = learn(part(runs), site, tokens=tokens, seed=seed)
        measured = slots(dictionary, part(runs), part(test), test.labels, seed=seed)
        found |= {f"{name}: {what.replace('slot', 'place')}": value for what, value in measured.items()}
    return found


def _pair(of: Runs, centred_by: Runs, *, apart: bool = False) -> Paired:
    before = of.after_reading - centred_by.after_reading.mean((0, 1))
    after = of.latents - centred_by.latents.mean((0, 1))
    if apart:
        order = torch.randperm(of.steps * len(of.labels), generator=torch.Generator().manual_seed(0))
        after = after.flatten(0, 1)[order].view(after.shape)
    return Paired({_BEFORE: before.flatten(0, 2), _AFTER: after.flatten(0, 2)})


@torch.no_grad()
def sides(cross: Crosscoder, test: Paired) -> dict[str, float]:
    """Where the features that fire on `test` live: nine tenths of their decoder's length on one side, or on both."""
    codes = cross.encode(test.vectors)
    alive = codes.feature_counts() > 0
    rebuilt, norms = cross.decode(codes), cross.decoder_norms()[alive]
    after = norms[:, 1] / norms.sum(1)
    rows = [rows[alive] for rows in cross.decoder().values()]
    return {
        "mostly before computing": float((after <= 1 - PURE).float().mean()),
        "mostly after computing": float((after >= PURE).float().mean()),
        "evenly on both sides": float(((after > 0.3) & (after < 0.7)).float().mean()),
        "cosine of the two sides": float(torch.cosine_similarity(*rows, dim=1).mean()),
        "fvu before": float(fvu(test.vectors[_BEFORE], rebuilt[_BEFORE])),
        "fvu after": float(fvu(test.vectors[_AFTER], rebuilt[_AFTER])),
        "dead": float((~alive).float().mean()),
    }


def transfer(
    dictionary: Dictionary, own: tuple[Runs, Runs], others: tuple[Runs, Runs], *, tokens: int, seed: int
) -> dict[str, float]:
    """This model's dictionary on another's latents: as they are, and after the linear map that fits best.

    Each model's slots are centred by its own means. The map, from the other's latents to this one's, is fitted on the
    same pictures' numbers in training; what it does not explain is counted apart. Beside it, a dictionary of the other.

    Args:
        own, others: of training and of test inputs.

    Raises:
        ShapeError: a model whose latents are of another size.
    """
    (train, test), (their_train, their_test) = own, others
    zero = Dictionary(dictionary.sae, torch.zeros_like(dictionary.centre))
    flat = [
        (of.latents - like.latents.mean((0, 1)))
        for of, like in ((train, train), (test, train), (their_train, their_train), (their_test, their_train))
    ]
    if flat[0].shape[2:] != flat[2].shape[2:]:
        raise ShapeError(
            f"the other model's latents are {tuple(flat[2].shape[2:])} a step, this one's {tuple(flat[0].shape[2:])}; "
            "give one of the same slots and width"
        )
    by_map = torch.linalg.lstsq(flat[2].flatten(0, 2), flat[0].flatten(0, 2)).solution
    of_other = learn(their_train.latents, "model.z_final", tokens=tokens, seed=seed)
    cases = {
        "own": quality(dictionary, train.latents, test.latents),
        "other": quality(zero, flat[2], flat[3]),
        "other, mapped": quality(zero, flat[2] @ by_map, flat[3] @ by_map),
        "other, its own dictionary": quality(of_other, their_train.latents, their_test.latents),
    }
    missed = (flat[1] - flat[3] @ by_map).square().sum() / flat[1].square().sum()
    return {f"{name}: {what}": value for name, case in cases.items() for what, value in case.items()} | {
        "own latents that the map explains": 1 - float(missed)
    }
