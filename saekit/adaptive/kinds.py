"""The models of this room by name: how each is trained, finished, measured and made a target."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from saekit.adaptive.a_vit import AViT
from saekit.adaptive.a_vit_recipe import CONTROL, HALTING, AViTRecipe
from saekit.adaptive.a_vit_report import measure_a_vit
from saekit.adaptive.adatape import AdaTape
from saekit.adaptive.adatape_recipe import PARITY, AdaTapeRecipe, sequences
from saekit.adaptive.adatape_report import measure_adatape
from saekit.adaptive.deciding import DecidingTarget, a_vit_target, adatape_target, duo_target
from saekit.adaptive.digits import load_digits
from saekit.adaptive.duo_llm import DuoLLM
from saekit.adaptive.duo_recipe import ROUTER, DuoRecipe, load_once
from saekit.adaptive.duo_report import measure_duo
from saekit.adaptive.duo_router import calibrate, router_logits
from saekit.adaptive.inputs import pystd_tokenizer
from saekit.adaptive.questions import a_vit, adatape, duo_llm, rin
from saekit.adaptive.questions.answers import Answers
from saekit.adaptive.rin import RIN
from saekit.adaptive.rin_recipe import DENOISING, RINRecipe
from saekit.adaptive.rin_report import Judge, measure_rin
from saekit.adaptive.rin_target import rin_target
from saekit.adaptive.saved import Saved, check_folder, filled, save_adaptive
from saekit.adaptive.stages import STATE_FILE, OnReport, Recipe, train_stages
from saekit.errors import UnknownNameError

CALIBRATION_ROWS = 64
# of text, to learn features of deciders from and to test them on
FEATURE_ROWS, TEST_ROWS = 800, 24
# made by RIN, for the same
PICTURES, TEST_PICTURES = 500, 100
# ten share their noise, so that questions whose unit is the picture need more: all, and those to learn from
ASKED_PICTURES, ASKED_OF_THEM = 1300, 1000
ASKED_SEQUENCES = 1024
Weights = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Kind:
    """One sort of model.

    Attributes:
        recipe: of a seed.
        finish: the model, and its control, from the weights of the stages.
        measure: facts on held-out data; `rows` says how much text to read, where it is text.
        target: what traces and interventions take.
        inputs: batches to learn features from, and to test them on.
        ask: what its specification asks of the features of decisions; minutes.
    """

    name: str
    recipe: Callable[[int], Recipe]
    finish: Callable[[Recipe, Weights], Saved]
    measure: Callable[[Saved, int], dict[str, Any]]
    target: Callable[[Saved], DecidingTarget]
    inputs: Callable[[Saved], tuple[Tensor, Tensor]]
    ask: Callable[[Saved], Answers]


def kind_of(name: str) -> Kind:
    """Raises: UnknownNameError: no such kind."""
    if name not in KINDS:
        raise UnknownNameError("kind of adaptive model", name, KINDS)
    return KINDS[name]


def train_kind(
    name: str,
    out: Path,
    *,
    seed: int = 0,
    rows: int = 16,
    resume: bool = False,
    on_report: OnReport = lambda report: None,
) -> Saved:
    """Train a model from nothing and leave its folder in `out`.

    Raises:
        FileError: `resume` without a state, a state without `resume`, or a folder that cannot be written.
    """
    kind, out = kind_of(name), out.expanduser().resolve()
    check_folder(out)
    recipe = kind.recipe(seed)
    beside = out.with_name(out.name + ".training")
    saved = kind.finish(recipe, train_stages(recipe, beside, resume=resume, on_report=on_report))
    return finish_run(kind, saved, out, rows=rows, beside=beside)


def finish_run(kind: Kind, saved: Saved, out: Path, *, rows: int, beside: Path) -> Saved:
    """Measure and save; then the state of the run may go."""
    measured = Saved(
        kind=saved.kind,
        model=saved.model,
        control=saved.control,
        recipe=saved.recipe,
        facts=kind.measure(saved, rows),
    )
    save_adaptive(measured, out)
    (beside / STATE_FILE).unlink(missing_ok=True)
    if beside.is_dir() and not any(beside.iterdir()):
        beside.rmdir()
    return measured


def _finish_a_vit(recipe: Recipe, weights: Weights) -> Saved:
    model, control = (filled(recipe.build(), weights[stage]) for stage in (HALTING, CONTROL))
    return Saved(kind="a-vit", model=model, control=control, recipe=_as_dict(recipe))


def _finish_duo(recipe: Recipe, weights: Weights) -> Saved:
    own = cast(DuoRecipe, recipe)
    model = cast(DuoLLM, filled(recipe.build(), weights[ROUTER]))
    # hard decisions, one layer after another, shift what later routers see: calibrate a few times over
    ids = load_once(own.context).train.ids[:CALIBRATION_ROWS]
    for _ in range(4):
        model.threshold.fill_(calibrate(router_logits(model, ids), own.budget * own.layers))
    return Saved(kind="duo-llm", model=model, recipe=_as_dict(recipe))


def _measure_a_vit(saved: Saved, rows: int) -> dict[str, Any]:
    model, control = cast(AViT, saved.model), cast("AViT | None", saved.control)
    return measure_a_vit(model, control, load_digits(int(saved.recipe.get("seed", 0))))


def _measure_duo(saved: Saved, rows: int) -> dict[str, Any]:
    model = cast(DuoLLM, saved.model)
    return measure_duo(model, load_once(model.config.context).held_out.ids[:rows])


def _finish_adatape(recipe: Recipe, weights: Weights) -> Saved:
    return Saved(kind="adatape", model=filled(recipe.build(), weights[PARITY]), recipe=_as_dict(recipe))


def _finish_rin(recipe: Recipe, weights: Weights) -> Saved:
    return Saved(kind="rin", model=filled(recipe.build(), weights[DENOISING]), recipe=_as_dict(recipe))


def _digits(saved: Saved) -> tuple[Tensor, Tensor]:
    side, seed = cast(AViT, saved.model).config.image, int(saved.recipe.get("seed", 0))
    digits = load_digits(seed)
    return digits.train_images(side), digits.test_images(side)


def _rows(saved: Saved) -> tuple[Tensor, Tensor]:
    corpus = load_once(cast(DuoLLM, saved.model).config.context)
    return corpus.train.ids[:FEATURE_ROWS], corpus.held_out.ids[:TEST_ROWS]


def _sequences(saved: Saved, tested: int = 4096) -> tuple[Tensor, Tensor]:
    length = cast(AdaTape, saved.model).config.length
    learnt, test = (sequences(4096, length, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    return learnt, test[:tested]


def _as_dict(recipe: Recipe) -> dict[str, Any]:
    return asdict(recipe)  # pyright: ignore[reportArgumentType]


KINDS: Mapping[str, Kind] = {
    "a-vit": Kind(
        name="a-vit",
        recipe=lambda seed: AViTRecipe(seed=seed),
        finish=_finish_a_vit,
        measure=_measure_a_vit,
        target=lambda saved: a_vit_target(cast(AViT, saved.model)),
        inputs=_digits,
        ask=lambda saved: a_vit.ask(cast(AViT, saved.model), load_digits(int(saved.recipe.get("seed", 0)))),
    ),
    "duo-llm": Kind(
        name="duo-llm",
        recipe=lambda seed: DuoRecipe(seed=seed),
        finish=_finish_duo,
        measure=_measure_duo,
        target=lambda saved: duo_target(cast(DuoLLM, saved.model), pystd_tokenizer()),
        inputs=_rows,
        ask=lambda saved: duo_llm.ask(
            duo_target(cast(DuoLLM, saved.model), pystd_tokenizer()), cast(DuoLLM, saved.model), *_rows(saved)
        ),
    ),
    "adatape": Kind(
        name="adatape",
        recipe=lambda seed: AdaTapeRecipe(seed=seed),
        finish=_finish_adatape,
        measure=lambda saved, rows: measure_adatape(cast(AdaTape, saved.model)),
        target=lambda saved: adatape_target(cast(AdaTape, saved.model)),
        inputs=_sequences,
        ask=lambda saved: adatape.ask(cast(AdaTape, saved.model), *_sequences(saved, ASKED_SEQUENCES)),
    ),
    "rin": Kind(
        name="rin",
        recipe=lambda seed: RINRecipe(seed=seed),
        finish=_finish_rin,
        measure=lambda saved, rows: measure_rin(cast(RIN, saved.model), seed=int(saved.recipe.get("seed", 0))),
        target=lambda saved: rin_target(cast(RIN, saved.model)),
        inputs=lambda saved: (torch.arange(PICTURES), torch.arange(PICTURES, PICTURES + TEST_PICTURES)),
        ask=lambda saved: rin.ask(
            rin_target(cast(RIN, saved.model)),
            cast(RIN, saved.model),
            *torch.arange(ASKED_PICTURES).split(ASKED_OF_THEM),
            judge=Judge(load_digits(int(saved.recipe.get("seed", 0)))).says,
        ),
    ),
}
